"""Timing on a GPU: graphs, floors and peers that are there, on a small model."""

import csv
import importlib.util
import json

import pytest
import torch
from cli.command import run
from helpers import small_spec

from mlagen.bench.run import EARLY, EMPTY, OWN, STREAM, bench, measure_methods, methods_of
from mlagen.errors import MlagenError
from mlagen.peers.registry import PEERS
from mlagen.runtime import load
from mlagen.timing.candidate import Candidate, kernel_candidate
from mlagen.timing.check import Oracle, rounded
from mlagen.timing.floor import Floor
from mlagen.timing.graphs import Graph
from mlagen.timing.workload import make_workload

pytestmark = pytest.mark.gpu

SPEC = small_spec(lora_rank=128)


@pytest.fixture(scope="module")
def kernel():
    return load(SPEC, "cuda")


@pytest.fixture
def workload(kernel):
    return make_workload(SPEC, kernel.target, 5, 3, device=kernel.device)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # whatever the peers use
def test_all_that_is_here_is_right_and_has_a_time(kernel):
    peers = [peer for peer in PEERS.values() if not peer.missing(kernel.target) and not peer.misfit(SPEC, kernel.target)]
    methods = methods_of(kernel, Floor(kernel.target, kernel.device), peers)
    for row in bench(kernel, methods, [1, 33], layers=3, repeats=2):
        assert not row.failures
        assert list(row.us) == list(methods)
        assert all(0 < us < 1e5 for us in row.us.values())


@pytest.mark.parametrize(
    "changes",
    [{"weight": "none"}, {"q_dtype": "bf16", "kv_dtype": "bf16"}, {"rope_style": "none", "rope_dim": 0}, {"rope_style": "neox"}],
    ids=str,
)
def test_other_specs(changes):
    kernel = load(small_spec(**changes), "cuda")
    fit = [PEERS[name] for name in ("eager", "bmm") if not PEERS[name].misfit(kernel.spec, kernel.target)]
    methods = methods_of(kernel, Floor(kernel.target, kernel.device), fit)
    (row,) = bench(kernel, methods, [5], layers=3, repeats=2)
    assert not row.failures


def test_the_floor_writes_all_that_a_prologue_writes(kernel, workload):
    floor = Floor(kernel.target, kernel.device)
    candidates = floor.stream(workload)
    assert len({candidate.name for candidate in candidates}) == len(candidates)
    for candidate in candidates:
        cache = workload.caches[1]
        out = candidate.launch(1)
        for tensor in (out, cache):
            tensor.view(torch.uint8).fill_(0xFF)
        candidate.launch(1)
        for tensor in (out, cache[: workload.tokens]):
            assert not bool((tensor.contiguous().view(torch.int32) == -1).any())
        assert bool((cache[workload.tokens :].view(torch.uint8) == 0xFF).all())


def test_a_graph_runs_each_layer_once(workload):
    done = torch.zeros(workload.layers, dtype=torch.int32, device=workload.q.device)

    def launch(layer):
        done[layer] += 1
        return done

    graph = Graph(launch, workload.layers)
    done.zero_()
    graph.replay()
    assert done.tolist() == [1] * workload.layers
    assert graph.microseconds() > 0
    assert done.tolist() == [3] * workload.layers


def test_times_grow_with_the_work(workload):
    def sleeping(cycles):
        def launch(layer):
            torch.cuda._sleep(cycles)
            return workload.q_scale

        return Graph(launch, 3).microseconds()

    assert 5 < sleeping(1_000_000) / sleeping(100_000) < 15


def test_a_replay_that_writes_nothing_is_wrong(kernel, workload):
    right = kernel_candidate(kernel, workload)
    result = right.launch(2)

    def idle(layer):
        torch.cuda._sleep(100)
        return result

    stale = Candidate("stale", idle, rounded)
    row = measure_methods(Oracle.of(workload, 2), {"stale": lambda work: [stale], OWN: lambda work: [right]}, 1, Graph)
    assert list(row.us) == [OWN]
    assert row.failures["stale"]


def test_too_much_for_the_memory(kernel):
    with pytest.raises(MlagenError, match="do not fit into the GPU's memory: ask for fewer tokens or layers"):
        list(bench(kernel, {}, [1 << 34], layers=1, repeats=1))


def test_the_command(tmp_path):
    table, picture = tmp_path / "times.csv", tmp_path / "times.svg"
    outputs = ["--csv", table] + (["--plot", picture] if importlib.util.find_spec("matplotlib") else [])
    options = ["--tp", "8", "--tokens", "1,5", "--layers", "3", "--repeats", "2", "--peers", "eager,bmm"]
    result = run("bench", "minicpm3", *options, "--json", *outputs)
    assert result.status == 0, result
    found = json.loads(result.out)
    assert [list(row["us"]) for row in found["rows"]] == [[EMPTY, STREAM, OWN, EARLY, "eager", "bmm"]] * 2
    with table.open() as file:
        assert len(list(csv.DictReader(file))) == 12
    assert run("bench", "minicpm3", *options).status == 0
