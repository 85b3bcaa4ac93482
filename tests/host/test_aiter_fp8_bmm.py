"""The drop-in for AITER's fused_fp8_bmm_rope_cat_and_cache_mla: its vectors, signature, layouts, results, and what it refuses."""

import inspect
from typing import Any

import pytest
import torch
from aiter_triton_model import MAX_POSITION, SLOTS, Call, differences, gpu, model, unexplained
from fp8_bmm_calls import RESULTS, call_of, run
from golden_vectors import FP8_BMM, Vectors, read, same_bits
from helpers import covering
from torch._subclasses import FakeTensorMode

from mlagen.errors import ArgumentError, MissingKernelError
from mlagen.integrations.aiter import fp8_bmm, fused_fp8_bmm_rope_cat_and_cache_mla
from mlagen.integrations.aiter.remembered import Remembered
from mlagen.plan import Plan

pytestmark = pytest.mark.host

# ROCm/aiter at commit e404860, aiter/ops/triton/fusions/fused_bmm_rope_kv_cache.py
AITER_SIGNATURE = (
    *("q_nope", "w_k", "w_k_scale", "q_pe", "k_nope", "k_rope", "kv_cache", "slot_mapping", "positions", "cos", "sin"),
    *(("group_size", 128), ("transpose_bm", True), ("config", None), ("k_scale", None), ("is_neox", False)),
    *(("q_out_dtype", torch.bfloat16), ("num_decode_toks_for_zeros", 0)),
)


def test_the_signature_is_aiters():
    parameters = inspect.signature(fused_fp8_bmm_rope_cat_and_cache_mla).parameters.values()
    found = tuple(each.name if each.default is each.empty else (each.name, each.default) for each in parameters)
    assert found == AITER_SIGNATURE
    assert {each.kind for each in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def same(one: Call, other: Call) -> bool:
    """Whether two calls give the same bits."""
    ours, theirs = run(one), run(other)
    return all(torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in ours)


# What AITER gave


def golden_call(vectors: Vectors) -> Call:
    _, _, nope, _, _, is_neox, *_ = vectors["meta"].tolist()
    cache = torch.zeros_like(vectors["kv_cache"].view(torch.uint8)).view(vectors["kv_cache"].dtype)
    return {
        **{name: vectors[name] for name in ("w_k", "w_k_scale", "slot_mapping", "positions", "cos", "sin", "k_scale")},
        "q_nope": vectors["q"][..., :nope].transpose(0, 1),
        "q_pe": vectors["q"][..., nope:],
        "k_nope": vectors["kv_c"].unsqueeze(1),
        "k_rope": vectors["k_pe"].unsqueeze(1),
        "kv_cache": cache.unsqueeze(1),
        "group_size": 128,
        "is_neox": bool(is_neox),
        "q_out_dtype": vectors["q_out"].dtype,
        "num_decode_toks_for_zeros": 2,
    }


@pytest.mark.parametrize("path", FP8_BMM, ids=lambda path: path.stem)
def test_aiters_vectors(path):
    """ql_nope within 0.5 % of AITER's norm, the copied columns of the cache bit for bit, all else explained by its arithmetic."""
    vectors = read(path)
    call = golden_call(vectors)
    ours, latent = run(call), vectors["meta"][3]
    golden = vectors["q_out"][..., :latent].float()
    assert (ours["q_out"][..., :latent].float() - golden).norm() <= 0.005 * golden.norm()
    assert not differences(call, ours, model(call, gpu("gfx950")))
    assert same_bits(*(each[..., :latent].contiguous() for each in (ours["kv_cache"].squeeze(1), vectors["kv_cache"]))).all()


def test_the_vectors_are_there():
    assert len(FP8_BMM) == 3


FACTORS = {
    "arch": ["gfx942", "gfx950"],
    "tokens": [1, 5, 20],
    "heads": [(3, 1), (4, 2)],
    "nope": [64, 192],
    "prefill": [0, 2],
    "neox": [True, False],
    "cache": ["fp8", "model"],
    "query": ["model", "fp8"],
    "slots": [torch.int64, torch.int32],
    "table": ["half", "full", "4 dimensions", "fp32"],
    "scale": [True, False],
    "zeros": [0, 1],
    "dtype": [torch.bfloat16, torch.float16],
}


def one_rounding(row: dict[str, Any]) -> bool:
    """A scale beside a cache that is not fp8 meets k_rope before RoPE, which is a rounding more than AITER's with fp32 tables."""
    return row["cache"] == "fp8" or not row["scale"]


@pytest.mark.parametrize("row", covering(FACTORS, one_rounding), ids=lambda row: "-".join(map(str, row.values())))
def test_aiters_arithmetic_explains_every_element(row):
    call = call_of(**row)
    assert not differences(call, run(call), model(call, gpu(row["arch"])))


def test_rows_without_a_slot_are_rotated_too():
    call = call_of()
    assert (call["slot_mapping"] < 0).any()
    assert not unexplained(run(call)["k_pe_out"], model(call, gpu("gfx950"))["k_pe_out"])


# What it takes


def joined(call: Call, one: str, other: str) -> dict[str, torch.Tensor]:
    """Two tensors as parts of one."""
    width = call[one].shape[-1]
    whole = torch.cat((call[one], call[other]), -1)
    return {one: whole[..., :width], other: whole[..., width:]}


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same rows, farther apart."""
    room = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 16).to(tensor.dtype)
    room[..., : tensor.shape[-1]] = tensor
    return room[..., : tensor.shape[-1]]


LAYOUTS = {
    "query by tokens": lambda call: {"q_nope": call["q_nope"].transpose(0, 1).contiguous().transpose(0, 1)},
    "q_nope spread": lambda call: {"q_nope": spread(call["q_nope"])},
    "q_pe by heads": lambda call: {"q_pe": call["q_pe"].transpose(0, 1).contiguous().transpose(0, 1)},
    "keys of one tensor": lambda call: joined(call, "k_nope", "k_rope"),
    "w_k transposed": lambda call: {"w_k": call["w_k"].view(torch.uint8).mT.contiguous().mT.view(call["w_k"].dtype)},
    "slots spread": lambda call: {"kv_cache": torch.zeros(SLOTS, 1, 96, dtype=call["kv_cache"].dtype)[..., :80]},
    "bytes": lambda call: {"kv_cache": call["kv_cache"].view(torch.uint8)},
    "scale without dimensions": lambda call: {"w_k_scale": call["w_k_scale"].reshape(())},
    "scale of two dimensions": lambda call: {"w_k_scale": call["w_k_scale"].reshape(1, 1)},
    "key scale of three": lambda call: {"k_scale": call["k_scale"].reshape(1, 1, 1)},
    "a number": lambda call: {"k_scale": float(call["k_scale"])},
    "int32": lambda call: {name: call[name].int() for name in ("slot_mapping", "positions")},
    "tables of four dimensions": lambda call: {name: call[name][:, None, None] for name in ("cos", "sin")},
    "whole tables": lambda call: {name: torch.cat((call[name], call[name]), -1) for name in ("cos", "sin")},
    "unused": lambda call: {"transpose_bm": False, "config": None},
    "one group": lambda call: {"group_size": 64},
    "a group beyond the columns": lambda call: {"group_size": 256},
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
def test_another_layout_gives_the_same_bits(change):
    plain, call = call_of(), call_of()
    call |= change(call)
    ours, theirs = run(plain), run(call)
    for name, each in ours.items():
        assert torch.equal(each.view(torch.uint8), theirs[name].contiguous().view(torch.uint8)), name


def test_whole_tables_of_pairs():
    plain, call = call_of(neox=False), call_of(neox=False)
    assert same(plain, {**call, **{name: call[name].repeat_interleave(2, -1) for name in ("cos", "sin")}})


def test_widths_that_are_no_powers_of_two():
    call = call_of(latent=80, rotary=24)
    assert not differences(call, run(call), model(call, gpu("gfx950")))


def test_config_is_left_as_it_is():
    """AITER writes into it."""
    call = call_of()
    before = dict(call["config"])
    run(call)
    assert call["config"] == before


def test_no_q_out_dtype_is_bf16():
    assert run({**call_of(), "q_out_dtype": None})["q_out"].dtype is torch.bfloat16


# What it returns


@pytest.mark.parametrize("query", ["model", "fp8"])
@pytest.mark.parametrize("zeros", [0, 3, 5, 7])
def test_the_first_rows_of_the_query_without_its_latent(query, zeros):
    """Also of more rows than there are, which AITER leaves as they were."""
    call = {**call_of(query=query), "num_decode_toks_for_zeros": zeros}
    ours, plain = run(call), run(call_of(query="model"))
    shown = plain["q_out"][:zeros, :, 64:]
    assert torch.equal(ours["decode_q_pe_out"][:5], shown)
    assert not ours["decode_q_pe_out"][5:].any()
    assert not ours["q_nope_zeros_out"].any()
    assert [list(ours[name].shape) for name in RESULTS] == [[5, 3, 80], [zeros, 3, 16], [5, 1, 16], [zeros, 3, 64]]
    assert all(ours[name].dtype is torch.bfloat16 and ours[name].is_contiguous() for name in RESULTS[1:])


@pytest.mark.parametrize("row", [{}, {"cache": "model", "scale": False}], ids=["fp8", "model"])
@pytest.mark.parametrize("heads", [(3, 1), (4, 2), (4, 3)])
def test_a_prefills_rows_are_not_rotated(heads, row):
    call = call_of(heads=heads, prefill=3, **row)
    call["slot_mapping"] = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(3))[:8]
    ours = run(call)
    assert not differences(call, ours, model(call, gpu("gfx950")))
    assert torch.equal(ours["k_pe_out"][5:], call["k_rope"][5:])


def test_rows_behind_the_slots_are_not_read():
    call = call_of(prefill=3)
    call["slot_mapping"] = call["slot_mapping"][:5]
    ours = run(call)
    entries = model({**call, "slot_mapping": call["slot_mapping"]}, gpu("gfx950"))["kv_entry"].map(lambda end: end[:5])
    kept = call["slot_mapping"] >= 0
    written = ours["kv_cache"].double()[call["slot_mapping"][kept]]
    assert not unexplained(written, entries.map(lambda end: end[kept]))
    assert int((ours["kv_cache"].double() != 0).any(-1).sum()) == int(kept.sum())


def test_only_a_prefill():
    call = call_of(prefill=3)
    call |= {"q_nope": call["q_nope"][:, :0], "q_pe": call["q_pe"][:0]}
    ours = run(call)
    assert ours["q_out"].shape == (0, 3, 80)
    assert torch.equal(ours["k_pe_out"], call["k_rope"])
    assert int((ours["kv_cache"].double() != 0).any(-1).sum()) == int((call["slot_mapping"] >= 0).sum())


def test_nothing_at_all():
    call = call_of()
    call |= {"q_nope": call["q_nope"][:, :0]}
    call |= {name: call[name][:0] for name in ("q_pe", "k_nope", "k_rope", "slot_mapping", "positions")}
    assert [len(each) for each in fused_fp8_bmm_rope_cat_and_cache_mla(**call)] == [0, 0, 0, 0]
    assert not call["kv_cache"].view(torch.uint8).any()


@pytest.mark.parametrize("whole", [True, False])
def test_a_scale_beside_a_16_bit_cache(whole):
    """As in AITER the entries are scaled: the latent columns bit for bit, the rotary ones with a rounding before RoPE."""
    call = call_of(cache="model", prefill=2)
    call["slot_mapping"] = torch.arange(7)
    if whole:
        call["k_scale"] = float(call["k_scale"])
    ours = run(call)["kv_cache"][:7]
    factor = torch.tensor(float(call["k_scale"])).reciprocal()
    assert torch.equal(ours[..., :64], (call["k_nope"].float() * factor).bfloat16())
    expected = model({**call, "k_scale": torch.tensor(float(call["k_scale"]))}, gpu("gfx950"))["kv_entry"]
    assert not unexplained(ours[..., 64:], expected.map(lambda end: end[..., 64:]))


def launches(monkeypatch: pytest.MonkeyPatch, call: Call) -> int:
    count = []
    monkeypatch.setattr(Plan, "run", lambda self, given, run=Plan.run: (count.append(self), run(self, given)))
    run(call)
    monkeypatch.undo()
    return len(count)


@pytest.mark.parametrize(
    ("row", "expected"), [({}, 2), ({"zeros": 1}, 2), ({"zeros": 1, "query": "fp8"}, 3), ({"prefill": 2}, 3)], ids=str
)
def test_how_many_launches_it_is(row, expected, monkeypatch):
    assert launches(monkeypatch, call_of(**row)) == expected


def test_a_kernel_that_cannot_be_had_is_found_before_a_launch(monkeypatch):
    def load(spec, *given, **options):
        if not spec.write_q:
            raise MissingKernelError("none")
        return fp8_bmm_load(spec, *given, **options)

    fp8_bmm_load = fp8_bmm.load
    monkeypatch.setattr(fp8_bmm, "_KERNELS", {})
    monkeypatch.setattr(fp8_bmm, "load", load)
    call = call_of(prefill=2)
    with pytest.raises(MissingKernelError):
        run(call)
    assert not call["kv_cache"].view(torch.uint8).any()


# Where AITER's result is a defect


def test_positions_are_clamped():
    near, far = call_of(), call_of()
    near["positions"][:3] = torch.tensor([0, MAX_POSITION - 1, MAX_POSITION - 1])
    far["positions"][:3] = torch.tensor([-9, MAX_POSITION, 2**40])
    assert same(near, far)


def test_tokens_without_a_slot():
    """AITER reads slots from behind the tensor."""
    short, padded = call_of(), call_of()
    short["slot_mapping"] = short["slot_mapping"][:3]
    padded["slot_mapping"][3:] = -1
    assert same(short, padded)


def test_sin_has_strides_of_its_own():
    plain, call = call_of(), call_of()
    assert same(plain, {**call, "sin": spread(call["sin"])})


@pytest.mark.parametrize(("arch", "limit"), [("gfx942", 240.0), ("gfx950", 448.0)])
def test_finite_values_saturate_and_nan_stays(arch, limit):
    call = call_of(arch=arch, query="fp8", scale=False)
    call["positions"][:] = 0  # cos 1, sin 0
    call["slot_mapping"] = torch.arange(5)
    for name in ("q_nope", "q_pe", "k_nope", "k_rope"):
        call[name].fill_(1e6)
    call["k_nope"][1, 0, 3] = torch.nan
    ours = run(call)
    assert set(ours["q_out"][..., 64:].float().unique().tolist()) == {limit}
    rows = ours["kv_cache"][:5].float()
    assert rows.isnan().nonzero().tolist() == [[1, 0, 3]]
    assert set(rows[~rows.isnan()].tolist()) == {limit}


# W_K is packed once


@pytest.fixture
def packings(monkeypatch):
    """One entry for each time that weights are packed."""
    done = []
    monkeypatch.setattr(fp8_bmm, "_pack", lambda *given, pack=fp8_bmm._pack: done.append(given) or pack(*given))
    return done


def test_the_same_weights_are_packed_once(packings):
    call = call_of(seed=11)
    for tokens in (5, 3, 1):
        run({**call, **{name: call[name][:tokens] for name in ("q_pe",)}, "q_nope": call["q_nope"][:, :tokens]})
    run({**call, "w_k": call["w_k"].view(call["w_k"].shape)})  # another object, of the same elements
    assert len(packings) == 1


@pytest.mark.parametrize("name", ["w_k", "w_k_scale"])
def test_weights_changed_in_place_are_packed_again(name, packings):
    call, other = call_of(seed=12), call_of(seed=13)
    run(call)
    (before,) = fp8_bmm._PACKED.find("w_k", packings[0][0], (call["w_k"], call["w_k_scale"]), pytest.fail)
    address = before.data_ptr()
    call[name].copy_(other[name])
    changed = run({**call, "kv_cache": call["kv_cache"].clone()})
    assert len(packings) == 2
    fresh = {**call, "w_k": call["w_k"].clone(), "w_k_scale": call["w_k_scale"].clone()}
    assert torch.equal(changed["q_out"], run(fresh)["q_out"])
    (after,) = fp8_bmm._PACKED.find("w_k", packings[0][0], (call["w_k"], call["w_k_scale"]), pytest.fail)
    assert after.data_ptr() == address, "a captured graph reads it there"


def test_weights_at_the_address_of_freed_ones_are_packed(packings):
    one, other = call_of(seed=14), call_of(seed=15)
    room = bytearray(one["w_k"].view(torch.uint8).numpy().tobytes())
    results = []
    for source in (one, other):
        room[:] = source["w_k"].view(torch.uint8).numpy().tobytes()
        w_k = torch.frombuffer(room, dtype=torch.uint8).view(source["w_k"].dtype).view(source["w_k"].shape)
        address = w_k.data_ptr()
        results.append((address, run({**one, "w_k": w_k})["q_out"]))
        del w_k
    assert results[0][0] == results[1][0]
    assert len(packings) == 2
    assert torch.equal(results[1][1], run({**one, "w_k": other["w_k"]})["q_out"])
    assert not torch.equal(results[0][1], results[1][1])


def test_what_was_made_of_freed_weights_is_freed():
    before = len(fp8_bmm._PACKED._entries)
    for seed in range(20, 25):
        run(call_of(seed=seed))
    assert len(fp8_bmm._PACKED._entries) <= before + 1


def test_weights_made_in_inference_mode(packings):
    with torch.inference_mode():
        call = call_of(seed=16)
        first, second = run(call)["q_out"], run(call)["q_out"]
    assert torch.equal(first, second)
    assert len(packings) == 1


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_weights_that_are_new_in_a_capture_are_refused(monkeypatch):
    with FakeTensorMode():
        weights = torch.empty(4, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ArgumentError, match=r"^w_k: new or changed since .* make a call with it before$"):
        Remembered().find("w_k", None, (weights,), pytest.fail)


def test_whole_tables_changed_in_place_are_seen():
    call, other = call_of(table="full"), call_of(table="full")
    run(call)
    call["cos"].mul_(0.5)
    call["kv_cache"].zero_()
    assert same(call, {**other, "cos": call["cos"].clone()})


# What it refuses


def cut(name: str, *index: Any) -> Any:
    return lambda call: {name: call[name][index]}


def put(name: str, value: Any) -> Any:
    return lambda call: {name: value}


REFUSED = [
    (put("q_nope", None), "q_nope: expected a tensor, got NoneType"),
    (put("w_k_scale", 1.0), "w_k_scale: expected a tensor, got float"),
    (lambda call: {"q_nope": call["q_nope"].float()}, "q_nope: dtype float32, expected bfloat16 or float16"),
    (cut("q_nope", 0), "q_nope: shape [5, 64], expected [H, B, P] = [any, any, any]"),
    (lambda call: {"w_k": call["w_k"].view(torch.uint8)}, "w_k: dtype uint8, expected float8_e4m3fn or float8_e4m3fnuz"),
    (lambda call: {"w_k": call["w_k"][:, :40]}, "k_nope: shape [5, 1, 64], expected [Bk, KH, L] = [any, any, 40]"),
    (lambda call: {"w_k": call["w_k"][:2]}, "w_k: shape [2, 64, 64], expected [H, L, P] = [3, any, 64]"),
    (lambda call: {"w_k": call["w_k"][..., :32]}, "w_k: shape [3, 64, 32], expected [H, L, P] = [3, any, 64]"),
    (lambda call: {"w_k_scale": torch.ones(3)}, "w_k_scale: shape [3], dtype float32, expected one value"),
    (lambda call: {"w_k_scale": torch.ones(1, dtype=torch.int32)}, "w_k_scale: shape [1], dtype int32, expected one value"),
    (cut("q_pe", slice(0, 4)), "q_pe: shape [4, 3, 16], expected [B, H, R] = [5, 3, any]"),
    (lambda call: {"q_pe": call["q_pe"].half()}, "q_pe: dtype float16, expected bfloat16"),
    (cut("k_rope", slice(0, 4)), "k_rope: shape [4, 1, 16], expected [Bk, KH, R] = [5, 1, 16]"),
    (lambda call: {name: call[name][:4] for name in ("k_nope", "k_rope")}, "k_nope: 4 rows, expected 5 or more: B = 5, S = 5"),
    (lambda call: {"slot_mapping": torch.arange(6)}, "k_nope: 5 rows, expected 6 or more: B = 5, S = 6"),
    (lambda call: {"k_nope": call["k_nope"].half()}, "k_nope: dtype float16, expected bfloat16"),
    (lambda call: {"k_rope": call["k_rope"].half()}, "k_rope: dtype float16, expected bfloat16"),
    (lambda call: {"q_nope": call["q_nope"].mT.contiguous().mT}, "q_nope: last stride 5, expected 1"),
    (cut("kv_cache", slice(None), 0), "kv_cache: shape [24, 80], expected [slots, KH, L+R] = [any, 1, 80]"),
    (lambda call: {"kv_cache": call["kv_cache"].half()}, "kv_cache: float16, expected bfloat16 or float8_e4m3fn or uint8, beside"),
    (put("q_out_dtype", torch.float16), "q_out_dtype: float16, expected bfloat16 or float8_e4m3fn, beside a q_nope of bfloat16"),
    (put("q_out_dtype", torch.float8_e4m3fnuz), "q_out_dtype: float8_e4m3fnuz, expected bfloat16 or float8_e4m3fn"),
    (put("slot_mapping", torch.tensor(3)), "slot_mapping: shape [], expected [S] = [any]"),
    (lambda call: {"slot_mapping": call["slot_mapping"].float()}, "slot_mapping: dtype float32, expected int64 or int32"),
    (lambda call: {"slot_mapping": torch.full((5,), SLOTS)}, "slot_mapping: slot 24, but kv_cache"),
    (cut("positions", slice(0, 4)), "positions: shape [4], expected [>= 5]"),
    (cut("cos", ..., slice(0, 4)), "cos: shape [40, 4], expected [>=1, 8]"),
    (cut("sin", slice(0, 9)), "sin: shape [9, 8], expected [40, 8]"),
    (lambda call: {name: call[name].repeat_interleave(2, -1) for name in ("cos", "sin")}, "cos: its halves differ, expected equal"),
    (put("k_scale", torch.ones(2)), "k_scale: shape [2], dtype float32, expected one value, float32, or a number, or None"),
    (put("k_scale", torch.ones(1).double()), "k_scale: shape [1], dtype float64, expected one value"),
    (put("group_size", 32), "group_size: 32, expected 128, or 64 or more: a scale is for 128 columns of q_nope"),
    (put("num_decode_toks_for_zeros", -1), "num_decode_toks_for_zeros: -1, expected 0 or more"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_wrong_argument_is_refused_by_aiters_name(change, message):
    call = call_of()
    with pytest.raises(ArgumentError) as caught:
        fused_fp8_bmm_rope_cat_and_cache_mla(**{**call, **change(call)})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not call["kv_cache"].view(torch.uint8).any()


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        ({"nope": 192}, {"group_size": 256}, "group_size: 256, expected 128: a scale is for 128 columns of q_nope"),
        ({"dtype": torch.float16}, {"q_out_dtype": torch.bfloat16}, "q_out_dtype: bfloat16, expected float16 or float8_e4m3fn"),
        ({"nope": 40}, {}, "q_nope: nope_dim=40: must be"),
        ({"latent": 40}, {}, "w_k: lora_rank=40: must be"),
        ({"rotary": 1024}, {}, "q_pe: rope_dim=1024: must be"),
    ],
    ids=str,
)
def test_what_no_kernel_is_for(row, change, message):
    call = {**call_of(**row), **change}
    with pytest.raises(ArgumentError) as caught:
        fused_fp8_bmm_rope_cat_and_cache_mla(**call)
    assert str(caught.value).startswith(message)


def test_tables_of_pairs_that_differ():
    call = call_of(neox=False)
    call |= {name: torch.cat((call[name], call[name]), -1) for name in ("cos", "sin")}
    with pytest.raises(ArgumentError, match=r"^cos: its columns of a pair differ, expected equal ones: RoPE takes"):
        fused_fp8_bmm_rope_cat_and_cache_mla(**call)
