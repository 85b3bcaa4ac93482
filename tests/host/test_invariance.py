"""A row of the result is a function of that row's inputs: not of the batch, of other rows, of the threads, or of the schedule."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import Workload, build_kernel, check, failures, make_launch, output_bytes, small_spec

from mlagen.codegen import kernel_name, render
from mlagen.lowering import lower
from mlagen.runtime import Kernel, load
from mlagen.schedule import choose_schedule
from mlagen.spec import PrologueSpec
from mlagen.target import find_target

pytestmark = pytest.mark.host

TOKENS = 65
SPECS = {
    "gptj": small_spec(),
    "neox-stepwise": small_spec(rope_style="neox", rounding="stepwise", q_dtype="bf16"),
    "fp16": small_spec(dtype="fp16", lora_rank=128, nope_dim=64, kv_dtype="fp16"),
    "absorbed": small_spec(weight="none", rope_style="none"),
    "token": small_spec(q_scaling="token"),
    "split": small_spec(q_split=True, lora_rank=128),
    "fp8 weights": small_spec(weight="fp8", q_dtype="bf16"),
    "fp8-block": small_spec(weight="fp8-block", nope_dim=192, lora_rank=160),
    "mxfp4": small_spec(weight="mxfp4", nope_dim=96, q_dtype="bf16"),
    "a8": small_spec(weight="fp8", compute="a8", nope_dim=208),
}
KERNELS = [(name, arch) for name in SPECS for arch in ("gfx942", "gfx950")]
KERNELS += [(name, "sm_90") for name in ("fp8-block", "mxfp4", "a8")]  # where tokens lie in a lane otherwise
each_kernel = pytest.mark.parametrize(("name", "arch"), KERNELS)


def batch(kernel: Kernel) -> dict[str, Any]:
    """Arguments of a launch whose row t writes slot t."""
    arguments = make_launch(kernel, Workload(tokens=TOKENS, slots="first", block_size=1, cache="dense", layout="dense")).arguments
    return {**arguments, "slot_mapping": torch.arange(TOKENS)}


def run(kernel: Kernel, arguments: dict[str, Any], rows: slice = slice(None)) -> tuple[torch.Tensor, ...]:
    """What is returned, and the cache entries, of a launch with only the tokens in `rows`, as bytes."""
    arguments = dict(arguments)
    for name in ("kv_c", "k_pe", "slot_mapping", "positions"):
        arguments[name] = None if arguments[name] is None else arguments[name][rows]
    arguments["q"] = tuple(part[rows] for part in arguments["q"])
    cache = arguments["kv_cache"] = torch.zeros_like(arguments["kv_cache"])
    made = kernel(**{**arguments, "out": None})
    queries = [each.view(torch.uint8) for each in (made if isinstance(made, tuple) else (made,))]
    return (*queries, cache[:, 0][rows].view(torch.uint8))


@each_kernel
def test_each_row_equals_that_row_alone(name, arch):
    kernel = load(SPECS[name], "cpu", arch=arch)
    arguments = batch(kernel)
    together = run(kernel, arguments)
    for token in range(TOKENS):
        alone = run(kernel, arguments, slice(token, token + 1))
        for whole, row in zip(together, alone, strict=True):
            assert torch.equal(whole[token : token + 1], row), f"token {token}"


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@each_kernel
def test_other_rows_do_not_leak(name, arch, poison):
    """Every second row full of NaN or infinities: the rows between keep their bits, first and last row of each tile among them."""
    kernel = load(SPECS[name], "cpu", arch=arch)
    arguments = batch(kernel)
    clean = run(kernel, arguments)
    for odd in (0, 1):
        poisoned = dict(arguments)
        rows = slice(odd, None, 2)
        for tensor in ("kv_c", "k_pe"):
            poisoned[tensor] = arguments[tensor].clone()
            poisoned[tensor][rows] = poison
        poisoned["q"] = tuple(part.clone() for part in arguments["q"])
        for part in poisoned["q"]:
            part[rows] = poison
        dirty = run(kernel, poisoned)
        for before, after in zip(clean, dirty, strict=True):
            assert torch.equal(before[1 - odd :: 2], after[1 - odd :: 2])
            assert not torch.equal(before[rows], after[rows])


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_the_threads_of_the_host_do_not_matter(threads, monkeypatch):
    kernel = load(small_spec(), "cpu", arch="gfx942")
    launches = [make_launch(kernel, Workload(tokens=TOKENS)) for _ in range(2)]
    kernel(**launches[0].arguments)
    for module in {each.module() for each in kernel.variants}:
        monkeypatch.setattr(module, "cpu_threads", threads)
    kernel(**launches[1].arguments)
    assert torch.equal(output_bytes(launches[0]), output_bytes(launches[1]))


def test_calls_from_several_threads():
    """One kernel, many launches at a time, each with outputs of its own."""
    kernel = load(small_spec(), "cpu", arch="gfx950")
    launches = [make_launch(kernel, Workload(tokens=TOKENS)) for _ in range(9)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda launch: kernel(**launch.arguments), launches))
    results = [output_bytes(launch) for launch in launches]
    assert all(torch.equal(results[0], other) for other in results)
    assert not failures(kernel, launches[0])


def scheduled(spec: PrologueSpec, arch: str, waves: int, m_tiles: int) -> Kernel:
    target = find_target(arch)
    program = spec.program(target)
    lowered = lower(program)
    schedule = choose_schedule(lowered, target, waves_per_workgroup=waves, m_tiles=m_tiles)
    return build_kernel(spec, arch, render(kernel_name(spec, target), program, lowered, schedule, target))


@pytest.mark.parametrize("waves", [1, 2, 4, 8])
@pytest.mark.parametrize("m_tiles", [1, 2, 4])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_the_schedule_does_not_matter(arch, m_tiles, waves):
    """The same bits, guard bytes included, whatever the tiles and the waves of a workgroup are."""
    spec = small_spec(heads=9, lora_rank=512, rope_style="neox" if arch == "gfx950" else "gptj")
    chosen, other = load(spec, "cpu", arch=arch), scheduled(spec, arch, waves, m_tiles)
    workload = Workload(tokens=37)
    launches = [make_launch(kernel, workload) for kernel in (chosen, other)]
    for kernel, launch in zip((chosen, other), launches, strict=True):
        kernel(**launch.arguments)
    assert torch.equal(output_bytes(launches[0]), output_bytes(launches[1]))
    check(other, workload)
