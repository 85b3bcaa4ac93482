"""The results of AITER's own kernels, reproduced by the host run of the gfx950 program."""

import pytest
import torch
from golden_vectors import HIP, NO_ABSORB, Vectors, read, same_bits, saturated

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


def test_the_vectors_are_there():
    assert len(HIP) == 8
    assert len(NO_ABSORB) == 2
