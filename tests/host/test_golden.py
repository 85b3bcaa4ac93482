"""The results of AITER's own kernels, reproduced by the host run of the gfx950 program."""

import pytest
import torch
from golden_vectors import FP8_BMM, HIP, NO_ABSORB, Vectors, read, same_bits, saturated

from mlagen.reference import evaluate
from mlagen.runtime import load
from mlagen.spec import PrologueSpec

pytestmark = pytest.mark.host


def run(vectors: Vectors, q_nope: torch.Tensor, q_pe: torch.Tensor, is_neox: bool, fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(q_out, kv_cache) of the same launch by our kernel; what it does not write holds `fill` bytes."""
    output_types = {torch.float8_e4m3fn: "fp8", torch.bfloat16: "bf16"}
    heads, rank = q_nope.shape[1:]
    spec = PrologueSpec(
        heads=heads,
        nope_dim=128,
        lora_rank=rank,
        rope_dim=q_pe.shape[-1],
        rope_style="neox" if is_neox else "gptj",
        weight="none",
        q_dtype=output_types[vectors["q_out"].dtype],
        kv_dtype=output_types[vectors["kv_cache"].dtype],
    )
    golden = vectors["kv_cache"]
    cache = torch.full_like(golden.view(torch.uint8), fill).view(golden.dtype)
    q_out = load(spec, "cpu", arch="gfx950")(
        (q_nope, q_pe), vectors["kv_c"], vectors["k_pe"], None, cache if cache.dim() == 3 else cache.unsqueeze(0),
        vectors["slot_mapping"], vectors["positions"], (vectors["cos"], vectors["sin"]),
        q_scale=vectors.get("q_scale"), k_scale=vectors["k_scale"],
    )  # fmt: skip
    return q_out, cache


@pytest.mark.parametrize("path", HIP, ids=lambda path: path.stem)
def test_aiter_hip_bit_for_bit(path):
    vectors = read(path)
    _, _, _, _, is_neox, _, _, _, compute_all, _ = vectors["meta"].tolist()
    q_out, cache = run(vectors, vectors["q_nope"], vectors["q_pe"], is_neox=is_neox, fill=0xA5)
    assert (same_bits(cache, vectors["kv_cache"]) | saturated(cache, vectors["kv_cache"])).all()
    rows = (vectors["slot_mapping"] >= 0) | bool(compute_all)  # the others AITER leaves unwritten
    ours, golden = q_out[rows], vectors["q_out"][rows]
    assert (same_bits(ours, golden) | saturated(ours, golden)).all()


@pytest.mark.parametrize("path", NO_ABSORB, ids=lambda path: path.stem)
def test_aiter_triton_without_absorb(path):
    vectors = read(path)
    _, _, nope, rank, _, is_neox, _, _, _ = vectors["meta"].tolist()
    q_out, cache = run(vectors, vectors["ql_nope"], vectors["q"][..., nope:], is_neox=is_neox, fill=0)
    assert same_bits(cache, vectors["kv_cache"]).all()
    assert same_bits(q_out[..., :rank], vectors["q_out"][..., :rank]).all()
    ours, golden = q_out[..., rank:].float(), vectors["q_out"][..., rank:].float()
    assert ((ours - golden).abs() <= 2.0**-8 * golden.abs()).all()


def product(vectors: Vectors, compute: str) -> tuple[PrologueSpec, torch.Tensor, torch.Tensor]:
    """The spec, q_out and the cache of AITER's product of fp8 codes, by our kernel."""
    heads, _, nope, rank, rope, is_neox, cache_is_fp8, _, _ = vectors["meta"].tolist()
    spec = PrologueSpec(
        heads=heads,
        nope_dim=nope,
        lora_rank=rank,
        rope_dim=rope,
        rope_style="neox" if is_neox else "gptj",
        weight="fp8",
        q_dtype="bf16",
        kv_dtype="fp8" if cache_is_fp8 else "bf16",
        compute=compute,
    )
    kernel, cache = load(spec, "cpu", arch="gfx950"), torch.zeros_like(vectors["kv_cache"])
    q_out = kernel(
        vectors["q"], vectors["kv_c"], vectors["k_pe"], kernel.pack_weights(vectors["w_k"].mT, vectors["w_k_scale"]),
        cache.unsqueeze(1), vectors["slot_mapping"], vectors["positions"], (vectors["cos"], vectors["sin"]),
        k_scale=vectors["k_scale"],
    )  # fmt: skip
    return spec, q_out, cache


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The norm of the difference, as a share of theirs."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("path", FP8_BMM, ids=lambda path: path.stem)
def test_aiter_triton_with_fp8_products(path):
    """The latent part: the norm, and each element within what the roundings of fp32 and of bf16 explain."""
    vectors = read(path)
    spec, q_out, cache = product(vectors, "a8")
    rank, nope = spec.lora_rank, spec.nope_dim
    golden = vectors["q_out"]
    assert distance(q_out[..., :rank], golden[..., :rank]) < 0.005
    inputs = {
        "q_nope": vectors["q"][..., :nope], "q_pe": vectors["q"][..., nope:], "kv_c": vectors["kv_c"], "k_pe": vectors["k_pe"],
        "w_uk": vectors["w_k"].mT, "w_scale": vectors["w_k_scale"].expand(spec.heads), "slot_mapping": vectors["slot_mapping"],
        "positions": vectors["positions"], "cos_sin_cache": torch.cat((vectors["cos"], vectors["sin"]), -1),
        "k_scale": vectors["k_scale"],
    }  # fmt: skip
    latent = evaluate(spec.program(load(spec, "cpu", arch="gfx950").target), inputs)["ql_nope"]
    low, high = (end.to(torch.bfloat16) for end in (latent.low, latent.high))
    inside = (golden[..., :rank] >= low) & (golden[..., :rank] <= high)
    assert inside.all(), f"{int((~inside).sum())} of {inside.numel()} are not explained"
    # AITER rotates in bf16: three roundings of addends that are no larger than the pair.
    ours, theirs = q_out[..., rank:].float(), golden[..., rank:].float()
    pair = vectors["q"][..., nope:].float().abs().amax()
    assert ((ours - theirs).abs() <= 2.0**-8 * (theirs.abs() + 3 * pair)).all()
    assert distance(ours, theirs) < 2.0**-7
    assert same_bits(cache[..., :rank], vectors["kv_cache"][..., :rank]).all()
    written = vectors["slot_mapping"][vectors["slot_mapping"] >= 0]
    ours, theirs = cache[..., rank:].float(), vectors["kv_cache"][..., rank:].float()
    # Of its roundings of 2^-9 each four meet in a value of bf16; in fp8 a value next to a tie falls to the other side.
    assert distance(ours[written], theirs[written]) < (2.0**-4 if spec.kv_dtype == "fp8" else 2.0**-7)
    untouched = torch.ones(len(cache), dtype=torch.bool)
    untouched[written] = False
    assert not cache[untouched].float().any()


@pytest.mark.parametrize("path", FP8_BMM, ids=lambda path: path.stem)
def test_activations_of_16_bits_are_not_those_of_8(path):
    """What sets the two apart is far beyond the tolerance above: a kernel that left q_nope alone would not pass it."""
    vectors = read(path)
    spec, q_out, _ = product(vectors, "a16")
    assert distance(q_out[..., : spec.lora_rank], vectors["q_out"][..., : spec.lora_rank]) > 0.01


def test_the_vectors_are_there():
    assert len(HIP) == 8
    assert len(NO_ABSORB) == 2
    assert len(FP8_BMM) == 3
