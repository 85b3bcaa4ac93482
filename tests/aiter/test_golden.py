"""The model of AITER's Triton operators explains what they gave on an H200: it is theirs where no AITER is at hand, too."""

import pytest
import torch
from aiter_triton_model import Call, gpu, model, unexplained
from golden_vectors import GOLDEN, Vectors, read

VECTORS = sorted(GOLDEN.glob("aiter_triton_*.npz"))


def golden_call(vectors: Vectors) -> Call:
    nope, is_neox, fp8_cache, absorbs = (int(vectors["meta"][at]) for at in (2, 5, 6, 7))
    call = {
        "q_pe": vectors["q"][..., nope:],
        "k_nope": vectors["kv_c"][:, None],
        "kv_cache": vectors["kv_cache"][:, None],
        "slot_mapping": vectors["slot_mapping"],
        "cos": vectors["cos"],
        "sin": vectors["sin"],
        "k_scale": vectors["k_scale"] if fp8_cache else None,
        "is_neox": bool(is_neox),
        "q_out_dtype": vectors["q_out"].dtype,
        "num_decode_toks_for_zeros": 0,
    }
    key, positions = vectors["k_pe"][:, None], vectors["positions"]
    if not absorbs:
        return call | {"q_nope": vectors["ql_nope"], "k_pe": key, "pos": positions, "upcast_operand": True}
    weights = {"w_k": vectors["w_k"], "w_k_scale": vectors["w_k_scale"], "group_size": 128}
    return call | weights | {"q_nope": vectors["q"][..., :nope].transpose(0, 1), "k_rope": key, "positions": positions}


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_the_model_explains_it(path):
    vectors = read(path)
    expected = model(golden_call(vectors), gpu("sm_90"))
    kept, latent = vectors["slot_mapping"] >= 0, vectors["kv_c"].shape[-1]
    entries = vectors["kv_cache"][:, None].double()[vectors["slot_mapping"][kept]]
    assert not unexplained(vectors["q_out"], expected["q_out"])
    assert not unexplained(entries, expected["kv_entry"].map(lambda end: end[kept]))
    assert torch.equal(vectors["q_out"][..., :latent].double(), expected["q_out"].exact[..., :latent])


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
@pytest.mark.parametrize("change", ["group_size", "is_neox", "k_scale"])
def test_a_model_of_something_else_does_not(path, change):
    vectors = read(path)
    call = golden_call(vectors)
    changed = {"group_size": 32, "is_neox": not call["is_neox"], "k_scale": 1.01 * vectors["k_scale"]}
    expected = model(call | {change: changed[change]}, gpu("sm_90"))
    kept = vectors["slot_mapping"] >= 0
    entries = vectors["kv_cache"][:, None].double()[vectors["slot_mapping"][kept]]
    wrong = unexplained(vectors["q_out"], expected["q_out"]) + unexplained(entries, expected["kv_entry"].map(lambda end: end[kept]))
    assert bool(wrong) == (change != "group_size" or "w_k" in call)


def test_there_are_vectors_of_both_operators():
    assert {"w_k" in golden_call(read(path)) for path in VECTORS} == {True, False}
