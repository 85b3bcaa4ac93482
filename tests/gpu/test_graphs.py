"""Capture and replay, streams and devices: what a serving process does with a kernel on a GPU."""

import pytest
import torch
from helpers import Workload, check, make_launch, small_spec

from mlagen import verify
from mlagen.runtime import load
from mlagen.spec import PrologueSpec

pytestmark = pytest.mark.gpu

SPEC = PrologueSpec(heads=16, nope_dim=128, lora_rank=512, rope_dim=64, rope_style="gptj")


def tensors_of(arguments):
    """The tensors of a call by name, pairs taken apart."""
    for name, value in arguments.items():
        for number, part in enumerate(value if isinstance(value, tuple) else (value,)):
            if part is not None:
                yield f"{name}[{number}]", part


@pytest.mark.parametrize("tokens", [1, 16, 64, 256])
def test_a_captured_launch_reads_what_its_inputs_hold_at_replay(tokens):
    """Capture, change every input in place, poison the outputs, replay: the result is that of the new inputs."""
    kernel = load(SPEC, "cuda")
    workload = Workload(tokens=tokens, layout="dense", cache="dense", out="dense")
    captured, fresh = (make_launch(kernel, workload, seed=seed) for seed in (1, 2))
    kernel(**captured.arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(**captured.arguments)
    new = dict(tensors_of(fresh.arguments))
    for name, tensor in tensors_of(captured.arguments):
        tensor.copy_(new[name])
    for output in ("out", "kv_cache"):
        captured.arguments[output].view(torch.uint8).fill_(0xA5)
    graph.replay()
    torch.cuda.synchronize()
    case = verify.Case(fresh.case.inputs, captured.case.q_out, captured.case.kv_cache)
    wrong = [verify.describe(part) for part in verify.compare_case(SPEC, kernel.target, case) if not part.passed]
    assert not wrong, wrong


def test_a_graph_of_300_launches():
    kernel = load(SPEC, "cuda")
    launches = [make_launch(kernel, Workload(tokens=4), seed=seed) for seed in range(3)]
    graph = torch.cuda.CUDAGraph()
    kernel(**launches[0].arguments)
    with torch.cuda.graph(graph):
        for number in range(300):
            kernel(**launches[number % 3].arguments)
    graph.replay()
    torch.cuda.synchronize()
    for launch in launches:
        assert all(part.passed for part in verify.compare_case(SPEC, kernel.target, launch.case))


def test_a_launch_with_out_allocates_nothing():
    kernel = load(SPEC, "cuda")
    launch = make_launch(kernel, Workload(tokens=8))
    kernel(**launch.arguments)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(10):
        kernel(**launch.arguments)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_the_callers_stream_is_used():
    """A launch waits for what its own stream did before, and for nothing else: two streams, each with a slow start."""
    kernel = load(SPEC, "cuda")
    launches = [make_launch(kernel, Workload(tokens=33, layout="dense", cache="dense", out="dense"), seed=seed) for seed in (1, 2)]
    streams = [torch.cuda.Stream() for _ in launches]
    held = [launch.arguments["kv_c"].clone() for launch in launches]
    for launch in launches:
        launch.arguments["kv_c"].zero_()
    torch.cuda.synchronize()
    for stream, launch, latent in zip(streams, launches, held, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # cycles: the copy and the launch come long after this call returned
            launch.arguments["kv_c"].copy_(latent)
            kernel(**launch.arguments)
    torch.cuda.synchronize()
    for launch in launches:
        assert all(part.passed for part in verify.compare_case(SPEC, kernel.target, launch.case))


def test_every_device_runs_its_own_kernel():
    if torch.cuda.device_count() < 2:
        pytest.skip("devices")
    for index in range(torch.cuda.device_count()):
        kernel = load(SPEC, f"cuda:{index}")
        assert kernel.device.index == index
        check(kernel, Workload(tokens=17))


def test_rows_of_any_batch_are_the_same_bits():
    """Row i of 256 tokens equals that row alone."""
    kernel = load(SPEC, "cuda")
    launch = make_launch(kernel, Workload(tokens=256, layout="dense", out="dense", slots="first", block_size=1, cache="dense"))
    arguments = launch.arguments
    whole = kernel(**{**arguments, "out": None}).view(torch.uint8)
    for row in (0, 1, 15, 16, 100, 255):
        alone = {**arguments, "q": tuple(part[row : row + 1] for part in arguments["q"]), "out": None}
        for name in ("kv_c", "k_pe", "slot_mapping", "positions"):
            alone[name] = arguments[name][row : row + 1]
        assert torch.equal(kernel(**alone).view(torch.uint8)[0], whole[row])


def test_rows_that_are_not_aligned_get_a_kernel_of_their_own():
    """Rows of 514 fp8 elements never start at a multiple of 16 bytes; a later aligned call still works."""
    kernel = load(small_spec(lora_rank=512, rope_dim=2), "cuda")
    check(kernel, Workload(tokens=9))
    aligned = load(small_spec(lora_rank=512, rope_dim=64), "cuda")
    for layout in ("dense", "sliced", "dense"):
        check(aligned, Workload(tokens=9, layout=layout, cache="dense", out="dense"))
