"""mlagen bench, on the clock of the tests: what it prints and writes, and what it refuses before anything is timed."""

import csv
import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch
from cli.command import Result, line, run
from clock import Clock, constant

import mlagen.bench.run
import mlagen.timing.floor
from mlagen import cli_bench, runtime
from mlagen.bench.report import COLUMNS
from mlagen.peers.eager import EAGER
from mlagen.peers.registry import PEERS
from mlagen.timing.candidate import Candidate
from mlagen.timing.check import nothing, rounded

MODEL = ("minicpm3", "--tp", "8")


class Floor:
    """In the place of the floor, which only a GPU can run."""

    def __init__(self, target, device) -> None:
        pass

    def empty(self, workload):
        return [Candidate("empty", constant(torch.empty(1)), nothing)]

    stream = empty


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as the command line sees one, behind which the host run of gfx950 and the clock of the tests do the work."""
    load = runtime.load
    monkeypatch.setattr(cli_bench, "gpu_arch", lambda device: "gfx950")
    monkeypatch.setattr(runtime, "load", lambda spec, device: load(spec, "cpu", arch="gfx950"))
    monkeypatch.setattr(mlagen.timing.floor, "Floor", Floor)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "MI355X")
    bench = mlagen.bench.run.bench

    def on_clock(*arguments, layers, repeats):
        clock = Clock(0.5, 2.0, 3.0, 40.0, 0.5, 2.0, 4.0, 50.0)
        return bench(*arguments, layers=2, repeats=repeats, record=clock)

    monkeypatch.setattr(mlagen.bench.run, "bench", on_clock)


@pytest.mark.host
@pytest.mark.parametrize("option", ["--no-write-q", "--no-write-kv", "--q-split", "--q-scaling=token"])
def test_other_results_have_no_peers(gpu, option):
    result = run("bench", *MODEL, "--tokens", "1,5", "--peers", "eager,bmm", option)
    lines = said(result)
    assert lines[1].split() == ["tokens", "empty", "stream", "mlagen", "/", "stream"]
    assert [row.split()[0] for row in lines[2:4]] == ["1", "5"]
    reason = "it makes one q_out and writes the cache"
    assert f"left out: eager ({reason}), bmm ({reason})" in lines


def said(result: Result, status: int = 0) -> list[str]:
    assert result.status == status, result
    return [each.rstrip() for each in result.out.splitlines()]


@pytest.mark.host
def test_bench_prints_a_table(gpu):
    result = run("bench", *MODEL, "--tokens", "1,5,1", "--peers", "eager,bmm+aiter,bmm+flashinfer")
    title, header, first, second, *notes = said(result)
    assert title == "minicpm3, TP 8, 5 heads, MI355X (gfx950)"
    assert header.split() == ["tokens", "empty", "stream", "mlagen", "/", "stream", "eager"]
    assert first.split() == ["1", "0.50", "2.00", "3.00", "1.50", "40.00"]
    assert second.split() == ["5", "0.50", "2.00", "4.00", "2.00", "50.00"]
    assert notes[0] == "microseconds per layer: medians of 30 replays of 1000 layers in one graph"
    assert notes[2] == "eager: torch's operators, one after the other"
    assert notes[3].startswith("left out: bmm+flashinfer (uninstalled), bmm+aiter (")
    assert len(notes) == 4
    assert result.err.splitlines() == [
        "1 token (1/2): empty 0.50, stream 2.00, mlagen 3.00, eager 40.00",
        "5 tokens (2/2): empty 0.50, stream 2.00, mlagen 4.00, eager 50.00",
    ]


@pytest.mark.host
def test_bench_writes_what_it_prints(gpu, tmp_path):
    table = tmp_path / "times.csv"
    table.write_text("old")
    result = run("bench", *MODEL, "--tokens", "1", "--peers", "none", "--json", "--csv", table)
    found = json.loads("\n".join(said(result)))
    assert (found["model"], found["heads"], found["methods"]) == ("minicpm3", 5, ["empty", "stream", "mlagen"])
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    assert [(each["method"], each["us_per_layer"]) for each in lines] == [
        ("empty", "0.5000"),
        ("stream", "2.0000"),
        ("mlagen", "3.0000"),
    ]
    assert os.listdir(tmp_path) == ["times.csv"]


@pytest.mark.host
def test_bench_draws(gpu, tmp_path):
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib")
    assert said(run("bench", *MODEL, "--tokens", "1,5", "--peers", "none", "--plot", tmp_path / "times.svg"))
    assert (tmp_path / "times.svg").read_text().startswith("<?xml")


@pytest.mark.host
def test_a_peer_that_is_wrong_is_told_and_not_timed(gpu, monkeypatch):
    wrong = Candidate("wrong", constant(torch.zeros(5, 5, 288, dtype=torch.float8_e4m3fn)), rounded)
    liar = PEERS["eager"].__class__("eager", EAGER.description, EAGER.missing, EAGER.misfit, lambda workload: [wrong])
    monkeypatch.setattr("mlagen.peers.registry.PEERS", {"eager": liar})
    *_, last = lines = said(run("bench", *MODEL, "--tokens", "5"))
    assert lines[2].split()[-1] == "-"
    assert last.startswith("eager, 5 tokens: wrong: q_out nope: a row is off by ")


@pytest.mark.host
def test_our_own_kernel_is_wrong(gpu, monkeypatch):
    monkeypatch.setattr("mlagen.timing.candidate.explained", lambda oracle, result: "nonsense")
    result = run("bench", *MODEL, "--tokens", "5", "--peers", "none")
    assert said(result, 1)[-1] == "mlagen, 5 tokens: wrong: nonsense"
    assert result.err.splitlines()[-1] == "mlagen: mlagen's own kernel has no time for 5 tokens: wrong: nonsense"


@pytest.mark.host
def test_a_file_that_cannot_be_written_after_all(gpu, tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    result = run("bench", *MODEL, "--tokens", "1", "--peers", "none", "--csv", tmp_path / "times.csv")
    assert said(result, 1)[0].startswith("minicpm3")
    assert result.err.splitlines()[-1] == (
        f"mlagen: --csv {tmp_path / 'times.csv'}: No space left on device; nothing is left half-written; name another file"
    )
    assert os.listdir(tmp_path) == []


# Refusals


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A current folder with a few things in it."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("mine")
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")


def refused(command: str, status: int = 2) -> str:
    before = sorted(os.walk("."))
    words = line(run("bench", *shlex.split(command)), status)
    assert sorted(os.walk(".")) == before
    return words


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("minicpm3 --device cpu", "--device cpu: times of the host run mean nothing; use cuda or hip, where there is a GPU"),
        ("minicpm3 --device host", "--device host: times of the host run mean nothing"),
        ("minicpm3 --device tpu", "--device tpu: expected cuda or hip"),
        ("minicpm3 --tokens 0", "but must be numbers from 1 to 65536 separated by commas"),
        ("minicpm3 --tokens 1,", "--tokens is '1,', but must be"),
        ("minicpm3 --layers 0", "'--layers'"),
        ("minicpm3 --repeats 0", "'--repeats'"),
        ("minicpm3 --peers cudnn", "--peers 'cudnn': possible are all, none, and of eager, compile, bmm,"),
        ("minicpm3 --csv ''", "'--csv': it is empty; name a file"),
        ("minicpm3 --csv nowhere/t.csv", "--csv nowhere/t.csv: nowhere: No such file or directory; name another file"),
        ("minicpm3 --csv file/t.csv", "--csv file/t.csv: file is a file; name another file"),
        ("minicpm3 --csv folder", "--csv folder: it is not a regular file; name another file"),
        ("minicpm3 --csv pipe", "--csv pipe: it is not a regular file; name another file"),
        ("minicpm3 --csv loop/t.csv", "--csv loop/t.csv: loop: Too many levels of symbolic links; name another file"),
        ("minicpm3 --plot t.pdf", "--plot t.pdf: must end in .svg or .png"),
        ("minicpm3 --plot folder/", "--plot folder: it is not a regular file; name another file"),
        ("minicpm3 --plot t.svg --csv t.svg", "--csv and --plot are both t.svg; name two files"),
    ],
)
def test_a_wrong_request(command, words, workplace):
    assert words in refused(command)


def test_a_folder_that_may_not_be_written_to(unprivileged):
    words = line(run("bench", "minicpm3", "--csv", unprivileged / "t.csv"), 2)
    assert words == f"--csv {unprivileged / 't.csv'}: no permission to write to {unprivileged}; name another file"


def test_no_gpu(workplace, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused("minicpm3").endswith("sees no GPU; `mlagen doctor` says what is missing")
    assert refused("minicpm3 --device hip").startswith("--device hip: torch ")


def test_another_platforms_gpu(workplace, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    assert refused("minicpm3 --device hip") == "--device hip: this torch is built for cuda; use --device cuda"


def test_a_model_that_is_none(workplace, monkeypatch):
    monkeypatch.setattr(cli_bench, "gpu_arch", lambda device: "sm_90")
    assert "did you mean deepseek-r1" in refused("deepseek-r9")
    assert "weight='int4': must be one of bf16, fp8, fp8-block, mxfp4, none" in refused("minicpm3 --weight int4")


def test_no_matplotlib(workplace, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert refused("minicpm3 --plot t.svg", 1).startswith("--plot needs matplotlib, which is not installed")
