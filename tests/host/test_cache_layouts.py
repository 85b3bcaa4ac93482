"""The layouts of the cache besides entries that follow one another: their bytes, built here from the definition of each layout."""

import math

import pytest
import torch
from helpers import Workload, build_kernel, check, failures, make_launch, output_bytes, small_spec
from hypothesis import given
from hypothesis import strategies as st
from sweep import ARCHS

from mlagen import toolchain, verify
from mlagen.cache_layout import cache_shape, entries, parts, written
from mlagen.errors import ArgumentError
from mlagen.guarded import GUARD
from mlagen.runtime import Kernel, load
from mlagen.target import TARGETS
from mlagen.timing.candidate import kernel_candidate
from mlagen.timing.check import Oracle, explained
from mlagen.timing.workload import BLOCK_SIZE, make_workload
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


# fp8_ds_mla: what vLLM 0.33.0 writes

DS_MLA = {
    "gptj": {"lora_rank": 256},
    "neox": {"lora_rank": 128, "rope_style": "neox", "dtype": "fp16", "q_dtype": "fp16"},
    "absorbed": {"lora_rank": 512, "weight": "none", "rope_dim": 10, "fp8_max": 224.0},
    "stepwise": {"lora_rank": 128, "rounding": "stepwise"},
}


def ds_mla_entry(row: torch.Tensor, rotary: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes of an entry: L codes, L/128 scales 2^ceil(log2(max(amax / 448, 1e-4))), 224 on FNUZ, and the rotary values."""
    groups = row.double().reshape(-1, 128)
    amax = groups.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).abs().amax(1)
    scales = 2 ** (amax / (448 if dtype is torch.float8_e4m3fn else 224)).clamp(min=1e-4).log2().ceil()
    codes = (groups / scales[:, None]).to(torch.float32).to(dtype)
    return torch.cat([each.contiguous().view(torch.uint8).flatten() for each in (codes, scales.float(), rotary)])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "changes", [*DS_MLA.values(), {"lora_rank": 128, "rope_dim": 0, "rope_style": "none"}], ids=[*DS_MLA, "no rope"]
)
def test_the_oracle_explains_fp8_ds_mla(arch, changes):
    kernel = load(small_spec(kv_layout="fp8_ds_mla", **changes), "cpu", arch=arch)
    for seed, workload in enumerate(WORKLOADS.values()):
        check(kernel, workload, seed=seed)


@given(
    changes=st.sampled_from(list(DS_MLA.values())),
    arch=st.sampled_from(ARCHS),
    tokens=st.integers(0, 20),
    block_size=st.integers(1, 9),
    gap=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
def test_the_bytes_of_fp8_ds_mla(changes, arch, tokens, block_size, gap, seed):
    """Every binade of the model's type, signs, zeros; entries of any stride; nothing besides."""
    spec = small_spec(kv_layout="fp8_ds_mla", **changes)
    kernel = load(spec, "cpu", arch=arch)
    model, fp8 = (torch_dtype(spec.output_dtype(name, kernel.target)) for name in (spec.dtype, "fp8"))
    inputs, blocks = inputs_of(kernel, tokens, seed), tokens // block_size + 2
    generator = torch.Generator().manual_seed(seed)
    far = 110 if model is torch.bfloat16 else 8
    scale = torch.randint(-far, far, (tokens, spec.lora_rank // 128, 1), generator=generator)
    groups = inputs["kv_c"].float().reshape(tokens, spec.lora_rank // 128, 128)
    limit = torch.finfo(model).max
    inputs["kv_c"] = (torch.ldexp(groups, scale) * (scale % 5 != 0)).clamp(-limit, limit).reshape(tokens, spec.lora_rank).to(model)
    inputs["slot_mapping"] = torch.randperm(blocks * block_size, generator=generator)[:tokens]
    inputs["slot_mapping"][1::4] = -1
    width = spec.lora_rank + spec.lora_rank // 32 + 2 * spec.rope_dim
    memory = torch.full((blocks, block_size, width + gap), GUARD, dtype=torch.uint8)
    expected = memory.clone()
    run(kernel, inputs, memory[..., :width])
    rotary = rotated(inputs["k_pe"].float(), inputs, spec.rope_style).to(model)
    for token, slot in enumerate(inputs["slot_mapping"].tolist()):
        if slot >= 0:
            expected[slot // block_size, slot % block_size, :width] = ds_mla_entry(inputs["kv_c"][token], rotary[token], fp8)
    assert torch.equal(memory, expected)


EDGES = {
    "zeros": (0.0, 0.0, 2.0**-13, 0.0),
    "negative zeros": (-0.0, -0.0, 2.0**-13, 0.0),
    "vLLM's example": (336.0, 1.0, 1.0, 1.0),  # 0.75 becomes 1
    "the limit itself": (448.0, 1.0, 1.0, 1.0),
    "beyond the limit": (450.0, 1.0, 2.0, 0.5),
    "negative alone": (-900.0, 3.0, 4.0, 0.75),
    "just over the least": (0.046875, 0.0, 2.0**-13, 0.0),
    "infinity": (torch.inf, 1.0, torch.inf, 0.0),
    "NaN": (torch.nan, 448.0, 1.0, 448.0),
    "the largest of bf16": (float(torch.finfo(torch.bfloat16).max), 0.0, 2.0**120, 0.0),
}


@pytest.mark.parametrize(("one", "others", "scale", "value"), EDGES.values(), ids=EDGES)
def test_the_edges_of_a_scale(one, others, scale, value):
    """A group of `others` with `one` in it: its scale, and the code of the others, as vLLM 0.33.0 defines them, on OCP fp8."""
    spec = small_spec(kv_layout="fp8_ds_mla", lora_rank=256)
    kernel = load(spec, "cpu", arch="gfx950")
    inputs = inputs_of(kernel, 1, 0)
    for place in (0, 77, 127):
        inputs["kv_c"] = torch.full((1, 256), 7.0, dtype=torch.bfloat16)
        inputs["kv_c"][:, 128:] = others
        inputs["kv_c"][0, 128 + place] = one
        cache = torch.zeros(1, 1, spec.cache_width, dtype=torch.uint8)
        inputs["slot_mapping"] = torch.zeros(1, dtype=torch.int64)
        run(kernel, inputs, cache)
        assert cache[0, 0, 256:264].clone().view(torch.float32).tolist() == [2.0**-6, scale]
        codes = cache[0, 0, 128:256].clone().view(torch.float8_e4m3fn).float()
        others_codes = torch.cat((codes[:place], codes[place + 1 :]))
        assert (others_codes == value).all()
        own = codes[place]
        assert own.isnan() if not math.isfinite(one) else own == torch.tensor(one / scale).to(torch.float8_e4m3fn).float()


def test_a_least_scale_keeps_zeros_from_being_nan():
    """The mutation of it that no random input shows."""
    spec = small_spec(kv_layout="fp8_ds_mla", lora_rank=256)
    sound = load(spec, "cpu", arch="gfx942")
    change = ("scale > 0x1p-13f ? scale : 0x1p-13f", "scale")
    wrong = []
    for kernel in (sound, build_kernel(spec, "gfx942", sound.generated, change)):
        launch = make_launch(kernel, Workload(tokens=3, layout="dense"))
        for kv_c in (launch.arguments["kv_c"], launch.case.inputs["kv_c"]):
            kv_c.zero_()
        wrong.append(bool(failures(kernel, launch)))
    assert wrong == [False, True]


def test_k_scale_is_not_read():
    kernel = load(small_spec(kv_layout="fp8_ds_mla", lora_rank=128), "cpu", arch="gfx950")
    launches = [make_launch(kernel, Workload(tokens=5)) for _ in range(3)]
    for launch, k_scale in zip(launches, (launches[0].arguments["k_scale"], torch.tensor(torch.nan), None), strict=True):
        kernel(**{**launch.arguments, "k_scale": k_scale})
    assert torch.equal(output_bytes(launches[0]), output_bytes(launches[1]))
    assert torch.equal(output_bytes(launches[0]), output_bytes(launches[2]))
    assert not any("k_scale" in argument.name for argument in kernel.generated.arguments)


@pytest.mark.parametrize(
    ("dtype", "width", "message"),
    [
        (torch.float8_e4m3fn, 196, "kv_cache: dtype float8_e4m3fn, expected uint8"),
        (torch.bfloat16, 196, "kv_cache: dtype bfloat16, expected uint8"),
        (torch.uint8, 160, "kv_cache: shape [2, 16, 160], expected [any, >=1, 196]"),
    ],
)
def test_an_fp8_ds_mla_cache_of_another_kind_is_refused(dtype, width, message):
    kernel = load(small_spec(kv_layout="fp8_ds_mla", lora_rank=128), "cpu", arch="gfx950")
    launch = make_launch(kernel, Workload(tokens=5))
    with pytest.raises(ArgumentError) as caught:
        kernel(**{**launch.arguments, "kv_cache": torch.zeros(2, 16, width, dtype=dtype)})
    assert str(caught.value).startswith(message)


# Several KV heads

KV_HEADS = {
    "fp8": {},
    "neox, rope first": {"rope_style": "neox", "nope_first": False, "q_dtype": "bf16"},
    "bf16": {"kv_dtype": "bf16", "rope_dim": 6, "weight": "none"},
    "copied": {"kv_dtype": "bf16", "rope_style": "none"},
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("changes", [*KV_HEADS.values(), {"rope_dim": 0, "rope_style": "none"}], ids=[*KV_HEADS, "no rope"])
def test_the_oracle_explains_several_kv_heads(arch, changes):
    """More than the query's three heads, and fewer: one kernel."""
    for heads in (2, 5):
        kernel = load(small_spec(kv_heads=heads, **changes), "cpu", arch=arch)
        for seed, workload in enumerate(WORKLOADS.values()):
            check(kernel, workload, seed=seed)


@given(
    changes=st.sampled_from(list(KV_HEADS.values())),
    arch=st.sampled_from(ARCHS),
    heads=st.integers(2, 6),
    tokens=st.integers(0, 12),
    block_size=st.integers(1, 5),
    gap=st.integers(0, 9),
    head_first=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_bytes_of_several_kv_heads(changes, arch, heads, tokens, block_size, gap, head_first, seed):
    """Each head's row at the token's slot; with the heads inside a slot or, as strides allow, a block of slots for each head."""
    spec = small_spec(kv_heads=heads, **changes)
    kernel = load(spec, "cpu", arch=arch)
    dtype = torch_dtype(spec.output_dtype(spec.kv_dtype, kernel.target))
    inputs, blocks = inputs_of(kernel, tokens, seed), tokens // block_size + 2
    inputs["slot_mapping"] = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(seed))[:tokens]
    inputs["slot_mapping"][1::4] = -1
    middle = (heads, block_size) if head_first else (block_size, heads)
    memory = torch.full((blocks, *middle, (spec.entry_dim + gap) * dtype.itemsize), GUARD, dtype=torch.uint8)
    expected = memory.clone()
    cache, wanted = (each.transpose(1, 2) if head_first else each for each in (memory, expected))
    run(kernel, inputs, cache.view(dtype)[..., : spec.entry_dim])
    for head in range(heads):
        k_pe = inputs["k_pe"][:, head].float()
        parts_ = [inputs["kv_c"][:, head].float(), k_pe if spec.rope_style == "none" else rotated(k_pe, inputs, spec.rope_style)]
        rows = stored(torch.cat(parts_ if spec.nope_first else parts_[::-1], -1), inputs["k_scale"], dtype)
        for token, slot in enumerate(inputs["slot_mapping"].tolist()):
            if slot >= 0:
                wanted[slot // block_size, slot % block_size, head, : rows.shape[1]] = rows[token]
    assert torch.equal(memory, expected)


def test_kernels_of_several_kv_heads_are_one(monkeypatch):
    load(small_spec(kv_heads=2), "cpu", arch="gfx942")
    monkeypatch.setattr(toolchain, "compile_host", None)
    check(load(small_spec(kv_heads=7), "cpu", arch="gfx942"), Workload())


@pytest.mark.parametrize(
    ("name", "index", "message"),
    [
        ("kv_c", (slice(None), 0), "kv_c: shape [5, 96], expected [5, 2, 96]"),
        ("kv_c", (slice(None), slice(1)), "kv_c: shape [5, 1, 96], expected [5, 2, 96]"),
        ("k_pe", (slice(None), 0), "k_pe: shape [5, 32], expected [5, 2, 32]"),
        ("k_pe", (slice(None), slice(1)), "k_pe: shape [5, 1, 32], expected [5, 2, 32]"),
        ("kv_cache", (slice(None), slice(None), 0), "kv_cache: shape [2, 16, 128], expected [any, >=1, 2, 128]"),
    ],
)
def test_tensors_of_another_number_of_kv_heads_are_refused(name, index, message):
    kernel = load(small_spec(kv_heads=2), "cpu", arch="gfx950")
    launch = make_launch(kernel, Workload(tokens=5))
    before = output_bytes(launch).clone()
    for _ in range(2):
        with pytest.raises(ArgumentError) as caught:
            kernel(**{**launch.arguments, name: launch.arguments[name][index]})
        assert str(caught.value).startswith(message)
    assert torch.equal(output_bytes(launch), before)
    check(kernel, Workload(tokens=5))


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


# What is timed


@pytest.mark.parametrize(
    "spec",
    [
        small_spec(kv_layout="segmented"),
        small_spec(kv_layout="fp8_ds_mla", lora_rank=128),
        small_spec(kv_heads=2),
        small_spec(kv_heads=2, kv_dtype="bf16", nope_first=False),
    ],
    ids=["segmented", "fp8_ds_mla", "KV heads", "KV heads, bf16"],
)
def test_other_caches_are_read_where_they_are_written(spec):
    """The kernel's own result on the CPU is explained, and one wrong byte of an entry is not."""
    kernel = load(spec, "cpu", arch="gfx942")
    oracle = Oracle.of(make_workload(spec, kernel.target, 5, 2, device="cpu"), 1)
    result = kernel_candidate(kernel, oracle.workload).launch(1)
    assert explained(oracle, result) == ""
    assert oracle.workload.caches[1].any()
    slot = int(oracle.workload.slot_mapping[3])
    block, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    cache = oracle.workload.paged(1).view(torch.uint8)
    first = cache[block, place * spec.lora_rank :] if spec.kv_layout == "segmented" else cache[block, place].flatten()
    first[0] ^= 0x41
    assert explained(oracle, result).startswith("kv_cache")
