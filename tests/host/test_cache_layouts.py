"""The layouts of the cache besides entries that follow one another: their bytes, built here from the definition of each layout."""

import pytest
import torch
from helpers import Workload, check, make_launch, output_bytes, small_spec
from hypothesis import given
from hypothesis import strategies as st
from sweep import ARCHS

from mlagen import verify
from mlagen.cache_layout import cache_shape, entries, parts, written
from mlagen.errors import ArgumentError
from mlagen.guarded import GUARD
from mlagen.runtime import Kernel, load
from mlagen.target import TARGETS
from mlagen.torch_types import torch_dtype

pytestmark = pytest.mark.host

WORKLOADS = {
    "plain": Workload(tokens=31, special=True),
    "narrow indices": Workload(tokens=17, slots_dtype=torch.int32, positions_dtype=torch.int32, positions="stale"),
    "odd blocks of bytes": Workload(
        tokens=9, block_size=3, bytes_cache=True, cache="interleaved", out="head major", layout="joined"
    ),
    "blocks of one slot": Workload(tokens=8, block_size=1, cache="dense", slots="all", table="pair"),
    "no slots": Workload(tokens=5, slots="none", k_pe_rank=3, scales="none"),
    "nothing": Workload(tokens=0),
}


def rotated(x: torch.Tensor, inputs: dict[str, torch.Tensor], style: str) -> torch.Tensor:
    """k_pe [T,R] in fp32, rotated; each product and sum rounded to fp32, as the kernels have it."""
    table = inputs["cos_sin_cache"].float()
    cos, sin = table[inputs["positions"].clamp(0, len(table) - 1)].chunk(2, -1)
    a, b = (x[:, 0::2], x[:, 1::2]) if style == "gptj" else x.chunk(2, -1)
    pair = a * cos - b * sin, b * cos + a * sin
    return torch.stack(pair, -1).flatten(-2) if style == "gptj" else torch.cat(pair, -1)


def stored(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 values as the bytes of a cache of `dtype`."""
    if dtype.itemsize == 1:
        limit = torch.finfo(dtype).max
        x = (x * (1 / scale.float().reshape(()))).clamp(-limit, limit)
    return x.to(dtype).contiguous().view(torch.uint8)


def inputs_of(kernel: Kernel, tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """Those of make_case, without NaN, whose bits need not be the same everywhere."""
    inputs = verify.make_case(kernel.spec, kernel.target, tokens, seed=seed).inputs
    return {name: each.nan_to_num(1.5) if each.is_floating_point() else each for name, each in inputs.items()}


def run(kernel: Kernel, inputs: dict[str, torch.Tensor], cache: torch.Tensor) -> torch.Tensor:
    """q_out of a call that fills `cache`."""
    packed = kernel.pack_weights(inputs["w_uk"]) if kernel.spec.absorbs else None
    return kernel(
        (inputs["q_nope"], inputs["q_pe"]), inputs["kv_c"], inputs["k_pe"], packed, cache, inputs["slot_mapping"],
        inputs["positions"], inputs["cos_sin_cache"], q_scale=inputs["q_scale"], k_scale=inputs["k_scale"],
    )  # fmt: skip


# Segmented: what AITER's kernel fused_qk_rope_concat_and_cache_mla_seg says of its pages, at any width and page size

SEGMENTED = {
    "fp8": {},
    "neox": {"rope_style": "neox", "q_dtype": "bf16"},
    "bf16": {"kv_dtype": "bf16", "rope_dim": 6},
    "fp16, absorbed": {"dtype": "fp16", "kv_dtype": "fp16", "weight": "none"},
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("changes", [*SEGMENTED.values(), {"rope_dim": 0, "rope_style": "none"}], ids=[*SEGMENTED, "no rope"])
def test_the_oracle_explains_segmented_pages(arch, changes):
    kernel = load(small_spec(kv_layout="segmented", **changes), "cpu", arch=arch)
    for seed, workload in enumerate(WORKLOADS.values()):
        check(kernel, workload, seed=seed)


@given(
    changes=st.sampled_from(list(SEGMENTED.values())),
    arch=st.sampled_from(ARCHS),
    tokens=st.integers(0, 20),
    page=st.integers(1, 9),
    gap=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_the_bytes_of_segmented_pages(changes, arch, tokens, page, gap, seed):
    """latent of slot s at block * stride + s % page * L, rotary at block * stride + page * L + s % page * R; nothing else."""
    spec = small_spec(kv_layout="segmented", **changes)
    kernel = load(spec, "cpu", arch=arch)
    dtype = torch_dtype(spec.output_dtype(spec.kv_dtype, kernel.target))
    inputs, blocks = inputs_of(kernel, tokens, seed), tokens // page + 2
    generator = torch.Generator().manual_seed(seed)
    inputs["slot_mapping"] = torch.randperm(blocks * page, generator=generator)[:tokens]
    inputs["slot_mapping"][1::4] = -1
    lora, rope, size = spec.lora_rank, spec.rope_dim, dtype.itemsize
    stride = page * (lora + rope) + gap
    memory = torch.full((blocks, stride * size), GUARD, dtype=torch.uint8)
    run(kernel, inputs, memory.view(dtype)[:, : stride - gap])
    latent = stored(inputs["kv_c"].float(), inputs["k_scale"], dtype)
    rotary = stored(rotated(inputs["k_pe"].float(), inputs, spec.rope_style), inputs["k_scale"], dtype)
    expected = torch.full((blocks * stride * size,), GUARD, dtype=torch.uint8)
    for token, slot in enumerate(inputs["slot_mapping"].tolist()):
        if slot >= 0:
            start, place = slot // page * stride, slot % page
            for at, bytes_ in ((start + place * lora, latent), (start + page * lora + place * rope, rotary)):
                expected[at * size :][: bytes_.shape[1]] = bytes_[token]
    assert torch.equal(memory.flatten(), expected)


@pytest.mark.parametrize("changes", SEGMENTED.values(), ids=SEGMENTED)
def test_a_page_of_one_slot_is_an_entry(changes):
    """Then the two layouts are the same bytes, and q_out always is."""
    kernels = [load(small_spec(kv_layout=layout, **changes), "cpu", arch="gfx950") for layout in ("paged", "segmented")]
    launches = [make_launch(kernel, Workload(tokens=12, block_size=1, cache="dense")) for kernel in kernels]
    for kernel, launch in zip(kernels, launches, strict=True):
        kernel(**launch.arguments)
    assert torch.equal(*map(output_bytes, launches))


def test_a_layout_is_read_where_it_is_written():
    """The comparison's own views, against places counted here."""
    spec = small_spec(kv_layout="segmented")
    cache = torch.arange(2 * 4 * 128).view(2, 4 * 128)
    assert cache_shape(spec, 2, 4) == (2, 512)
    assert [list(part.shape) for part in parts(spec, cache)] == [[2, 4, 96], [2, 4, 32]]
    (row,) = entries(spec, cache, torch.tensor([6]))
    assert row.tolist() == [*range(512 + 2 * 96, 512 + 3 * 96), *range(512 + 4 * 96 + 2 * 32, 512 + 4 * 96 + 3 * 32)]
    assert cache[written(spec, cache, torch.tensor([6]))].tolist() == row.tolist()


def test_the_comparison_tells_layouts_apart():
    """What a kernel of the one layout writes is not taken for the other's."""
    spec = small_spec(kv_layout="segmented")
    paged = load(small_spec(), "cpu", arch="gfx950")
    case = verify.make_case(spec, TARGETS["gfx950"], 16)
    blocks, width = case.kv_cache.tensor.shape
    cache = case.kv_cache.tensor.as_strided((blocks, width // 128, 128), (case.kv_cache.tensor.stride(0), 128, 1))
    packed = paged.pack_weights(case.inputs["w_uk"])
    paged(
        (case.inputs["q_nope"], case.inputs["q_pe"]), case.inputs["kv_c"], case.inputs["k_pe"], packed, cache,
        case.inputs["slot_mapping"], case.inputs["positions"], case.inputs["cos_sin_cache"], q_scale=case.inputs["q_scale"],
        k_scale=case.inputs["k_scale"], out=case.q_out.tensor,
    )  # fmt: skip
    passed = {part.name: part.passed for part in verify.compare_case(spec, paged.target, case)}
    assert passed == {"q_out nope": True, "q_out pe": True, "kv_cache nope": False, "kv_cache pe": False}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 128), "kv_cache: shape [2, 4, 128], expected [any, >=128]"),
        ((2, 100), "kv_cache: shape [2, 100], expected [any, >=128]"),
        ((2, 0), "kv_cache: shape [2, 0], expected [any, >=128]"),
        ((2, 300), "kv_cache: shape [2, 300], expected [blocks, block_size * 128]: a segmented block is whole slots of 96 latent"),
    ],
)
def test_a_segmented_cache_of_another_shape_is_refused(shape, message):
    kernel = load(small_spec(kv_layout="segmented"), "cpu", arch="gfx950")
    launch = make_launch(kernel, Workload(tokens=2))
    for _ in range(2):
        with pytest.raises(ArgumentError) as caught:
            kernel(**{**launch.arguments, "kv_cache": torch.zeros(shape, dtype=torch.uint8)})
        assert str(caught.value).startswith(message)
    check(kernel, Workload(tokens=2))


def test_a_slot_outside_a_segmented_cache_is_refused():
    kernel = load(small_spec(kv_layout="segmented"), "cpu", arch="gfx950")
    launch = make_launch(kernel, Workload(tokens=2, block_size=4, slots="first"))
    before = output_bytes(launch).clone()
    slots = torch.tensor([0, 8])
    with pytest.raises(ArgumentError, match=r"^slot_mapping: slot 8, but kv_cache \[2, 512\] has slots 0 to 7"):
        kernel(**{**launch.arguments, "slot_mapping": slots})
    assert torch.equal(output_bytes(launch), before)


def test_a_segmented_cache_beyond_32_bits(sparse):
    """The block's start and the rotary part's, kept in 32 bits, would lie elsewhere."""
    spec = small_spec(kv_layout="segmented")
    kernel = load(spec, "cpu", arch="gfx942")
    page = 2**25  # slots: the rotary columns start after 3 * 2^30 elements
    dense = make_launch(kernel, Workload(tokens=1, slots="first", block_size=1, cache="dense", bytes_cache=True))
    kernel(**dense.arguments)
    row = dense.arguments["kv_cache"].flatten()
    cache = sparse((2, page * spec.entry_dim), (page * spec.entry_dim, 1), torch.uint8)
    kernel(**{**dense.arguments, "kv_cache": cache, "slot_mapping": torch.tensor([page + 3])})
    assert torch.equal(cache[1, 3 * 96 :][:96], row[:96])
    assert torch.equal(cache[1, page * 96 + 3 * 32 :][:32], row[96:128])
