"""The sweep of tests/sweep.py on the host, and the edges that no covering array holds: far strides, many tiles, odd weights."""

import itertools

import pytest
import torch
from helpers import Workload, check, small_spec
from sweep import (
    ARCHS,
    HANDS,
    LAUNCH_FACTORS,
    SPEC_FACTORS,
    SPECS,
    kernel_with,
    label,
    other_layouts,
    sensible,
    spec_of,
)

from mlagen import toolchain, verify
from mlagen.runtime import load
from mlagen.target import TARGETS

pytestmark = pytest.mark.host


@pytest.mark.parametrize(("row", "hand"), list(zip(SPECS, HANDS, strict=True)), ids=map(label, SPECS))
def test_any_spec_with_any_launch(row, hand, caplog):
    for number, launch in enumerate(hand):
        workload = Workload(**{name: value for name, value in launch.items() if name != "heads"})
        check(load(spec_of(row, launch["heads"]), "cpu", arch=row["arch"]), workload, seed=number)
    assert not caplog.records, "the compiler has warnings"


@pytest.mark.parametrize(("number", "row", "hand"), list(zip(itertools.count(), SPECS, HANDS)), ids=map(label, SPECS))
def test_any_spec_with_other_layouts(number, row, hand):
    """Each spec with up to five of the layouts that fit it, others for each."""
    target = TARGETS[row["arch"]]
    layouts = other_layouts(spec_of(row, 1), target)
    if not layouts:
        pytest.skip("layouts")
    step = max(1, len(layouts) // 4)
    for seed, layout in enumerate(layouts[number % step :: step]):
        launch = hand[seed % len(hand)]
        workload = Workload(**{name: value for name, value in launch.items() if name != "heads"})
        check(kernel_with(spec_of(row, launch["heads"]), target, torch.device("cpu"), layout), workload, seed=seed)


@pytest.mark.parametrize(
    ("factors", "rows", "allowed"),
    [(SPEC_FACTORS, SPECS, sensible), (LAUNCH_FACTORS, [row for hand in HANDS for row in hand], None)],
    ids=["specs", "launches"],
)
def test_the_sweep_covers_every_pair(factors, rows, allowed):
    for one, two in itertools.combinations(factors, 2):
        covered = {(row[one], row[two]) for row in rows}
        wanted = set(itertools.product(factors[one], factors[two]))
        if allowed and {one, two} == {"rope_dim", "rope_style"}:
            wanted -= {(0, "gptj"), (0, "neox")}
        if allowed and (one, two) == ("lora_rank", "kv_layout"):
            wanted -= {(width, "fp8_ds_mla") for width in factors[one] if width % 128}
        if allowed and (one, two) == ("kv_heads", "kv_layout"):
            wanted = {(heads, layout) for heads, layout in wanted if heads == 1 or layout == "paged"}
        if allowed and (one, two) == ("nope_first", "kv_layout"):
            wanted -= {(False, "segmented"), (False, "fp8_ds_mla")}
        if allowed and (one, two) == ("kv_fp8", "kv_layout"):
            wanted -= {(False, "fp8_ds_mla")}
        if allowed and two == "q_form":
            split, token = {(0, "split")}, {(False, "token")}
            cache = {("cache", "split"), ("cache", "token")}
            wanted -= {"rope_dim": split, "results": cache, "q_fp8": token}.get(one, set())
        if allowed and (one, two) == ("weight", "compute"):
            wanted -= {(weight, "a8") for weight in factors[one] if weight != "fp8"}
        if allowed and (one, two) == ("nope_dim", "weight"):
            wanted -= {(width, weight) for width in factors[one] if width % 32 for weight in ("fp8-block", "mxfp4")}
        if allowed and (one, two) == ("dtype", "weight"):
            wanted -= {("fp16", "mxfp4")}
        assert covered == wanted, (one, two)
    assert all(HANDS), "a spec without a launch"


def test_heads_need_no_other_kernel(monkeypatch):
    load(small_spec(heads=3), "cpu", arch="gfx942")
    monkeypatch.setattr(toolchain, "compile_host", None)
    check(load(small_spec(heads=5), "cpu", arch="gfx942"), Workload())


@pytest.mark.parametrize("arch", ARCHS)
def test_a_workgroup_takes_several_token_tiles(arch):
    """Only many tokens on many heads make a workgroup loop; the last one has fewer tiles than the others."""
    tiles = 19
    kernel = load(small_spec(heads=128, nope_dim=16, lora_rank=48), "cpu", arch=arch)
    launch = kernel.generated.schedule.launch(kernel.generated.lowered.segments, 16 * tiles, 128)
    assert launch.token_tiles_per_workgroup > 1
    assert tiles % launch.token_tiles_per_workgroup, "every workgroup has the same number of tiles"
    check(kernel, Workload(tokens=16 * tiles - 3))


STRIDE = 2**32 + 37
"""Elements.  Kept in 32 bits it is 37: a truncated address is still inside the buffer, and shows as a wrong result."""


@pytest.mark.parametrize("weight", ["bf16", "none"])
def test_strides_beyond_32_bits(sparse, weight):
    """Every stride of every tensor passes 2^32 elements; the result is that of dense tensors."""
    spec = small_spec(heads=2, lora_rank=48, weight=weight, kv_dtype="bf16")
    kernel = load(spec, "cpu", arch="gfx942")
    case = verify.make_case(spec, kernel.target, 2)
    case.inputs["positions"] = torch.tensor([1, 0])
    case.inputs["slot_mapping"] = torch.tensor([17, 0])
    verify.run_case(kernel, case)
    assert all(part.passed for part in verify.compare_case(spec, kernel.target, case))
    dense_out, dense_cache = case.q_out.tensor[:, :2], case.kv_cache.tensor[:2, :2]

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        strides = [STRIDE * 2**number for number in range(tensor.dim() - 1)]
        return sparse(tuple(tensor.shape), (*reversed(strides), 1), tensor.dtype).copy_(tensor)

    inputs = {name: spread(case.inputs[name]) for name in ("q_nope", "q_pe", "kv_c", "k_pe")}
    out, cache = spread(torch.zeros_like(dense_out)), spread(torch.zeros_like(dense_cache))
    kernel(
        (inputs["q_nope"], inputs["q_pe"]), inputs["kv_c"], inputs["k_pe"],
        kernel.pack_weights(case.inputs["w_uk"]) if spec.absorbs else None, cache, torch.tensor([2, 0]), case.inputs["positions"],
        spread(case.inputs["cos_sin_cache"][:2]), q_scale=case.inputs["q_scale"], out=out,
    )  # fmt: skip
    assert torch.equal(out.view(torch.uint8), dense_out.view(torch.uint8))
    assert torch.equal(cache[[1, 0], [0, 0]], dense_cache[[1, 0], [1, 0]])
    assert not cache[:, 1].any()


@pytest.mark.parametrize("strides", [(48 * 96, 1, 48), (96, 3 * 96, 1), (50 * 101, 101, 1)], ids=["mT", "head inside", "sliced"])
def test_weights_of_any_strides(strides):
    """The packed bytes are those of contiguous weights."""
    kernel = load(small_spec(), "cpu", arch="gfx950")
    w_uk = verify.make_case(kernel.spec, kernel.target, 1).inputs["w_uk"]
    strided = torch.full((3 * 50 * 101,), torch.nan, dtype=w_uk.dtype).as_strided(w_uk.shape, strides).copy_(w_uk)
    assert not strided.is_contiguous()
    assert torch.equal(kernel.pack_weights(strided), kernel.pack_weights(w_uk))
