"""The drop-in for AITER's fused_qk_rope_concat_and_cache_mla: its vectors, signature and layouts, and where ours differs."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from aiter_calls import (
    BLOCK_SIZE,
    BLOCKS,
    HEADS,
    LATENT,
    NONE_WRITTEN,
    POSITIONS,
    ROTARY,
    TOKENS,
    Call,
    make_call,
    unwritten,
    wrong,
)
from golden_vectors import HIP, Vectors, read, same_bits
from helpers import OUT_OF_RANGE_SLOT
from torch.utils._python_dispatch import TorchDispatchMode

from mlagen import runtime
from mlagen.errors import ArgumentError
from mlagen.integrations.aiter import fused_qk_rope_concat_and_cache_mla, rope_concat

pytestmark = pytest.mark.host

# ROCm/aiter at commit e404860, aiter/ops/cache.py: what a caller may write by position, by name, or leave out.
AITER_SIGNATURE = (
    *("q_nope", "q_pe", "kv_c", "k_pe", "kv_cache", "q_out", "slot_mapping", "k_scale", "q_scale"),
    *("positions", "cos_cache", "sin_cache", "is_neox", "is_nope_first", ("compute_all_q_rope", False)),
)

ARCHS = ("gfx942", "gfx950")
"""What the host run of the drop-in may take."""


def test_the_signature_is_aiters():
    parameters = inspect.signature(fused_qk_rope_concat_and_cache_mla).parameters.values()
    found = tuple(each.name if each.default is each.empty else (each.name, each.default) for each in parameters)
    assert found == AITER_SIGNATURE
    assert {each.kind for each in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


# What AITER gave


def golden_call(vectors: Vectors) -> Call:
    return {
        **{name: vectors[name] for name in ("q_nope", "q_pe", "kv_c", "k_pe", "slot_mapping", "k_scale", "q_scale", "positions")},
        "kv_cache": unwritten(vectors["kv_cache"]),
        "q_out": unwritten(vectors["q_out"]),
        "cos_cache": vectors["cos"],
        "sin_cache": vectors["sin"],
        "is_neox": bool(vectors["meta"][4]),
        "is_nope_first": True,
        "compute_all_q_rope": bool(vectors["meta"][8]),
    }


@pytest.mark.parametrize("path", HIP, ids=lambda path: path.stem)
def test_aiters_vectors_bit_for_bit(path):
    vectors = read(path)
    call = golden_call(vectors)
    assert fused_qk_rope_concat_and_cache_mla(**call) is None
    for name, rows in (("kv_cache", ...), ("q_out", (vectors["slot_mapping"] >= 0) | bool(call["compute_all_q_rope"]))):
        ours, golden = (each[name].view(torch.uint8)[rows].view(each[name].dtype) for each in (call, vectors))
        assert same_bits(ours, golden).all()
    assert not wrong(call, "gfx950"), "the rows that AITER leaves as they were are the oracle's"


def test_aiter_left_rows_unwritten():
    """That the vectors have such rows: without them the test above would not see ours."""
    assert any(
        bool((vectors["q_out"].view(torch.uint8)[vectors["slot_mapping"] < 0] == NONE_WRITTEN).all(-1).any())
        for vectors in map(read, HIP)
    )


# What it takes


def outputs(call: Call) -> list[torch.Tensor]:
    """The bytes of both outputs after the call."""
    fused_qk_rope_concat_and_cache_mla(**call)
    return [call[name].contiguous().view(torch.uint8).reshape(-1) for name in ("q_out", "kv_cache")]


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Where no output is of an arch's fp8, the host run takes the program of gfx950.
OUTPUTS = [
    *[(arch, q, kv) for arch in ARCHS for q, kv in (("fp8", "fp8"), ("model", "fp8"), ("fp8", "model"), ("fp8", "bytes"))],
    *[("gfx950", "model", kv) for kv in ("model", "bytes")],
]


@pytest.mark.parametrize(("arch", "q", "kv"), OUTPUTS)
@pytest.mark.parametrize("is_nope_first", [True, False])
@pytest.mark.parametrize("is_neox", [True, False])
def test_the_oracle_explains_every_combination(arch, is_nope_first, is_neox, q, kv):
    call = make_call(arch=arch, q=q, kv=kv, is_neox=is_neox, is_nope_first=is_nope_first)
    fused_qk_rope_concat_and_cache_mla(*call.values())
    assert not wrong(call, arch)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("arch", ARCHS)
def test_is_nope_first_swaps_the_columns(arch, is_neox):
    first, last = (make_call(arch=arch, is_neox=is_neox, is_nope_first=order) for order in (True, False))
    for call in (first, last):
        fused_qk_rope_concat_and_cache_mla(**call)
    for name in ("q_out", "kv_cache"):
        ours = first[name].view(torch.uint8)
        assert torch.equal(torch.cat((ours[..., LATENT:], ours[..., :LATENT]), -1), last[name].view(torch.uint8))


def padded_blocks(call: Call) -> dict[str, Any]:
    cache = call["kv_cache"]
    room = torch.full((BLOCKS, BLOCK_SIZE * 100 + 50), NONE_WRITTEN, dtype=torch.uint8)
    return {"kv_cache": room.as_strided(cache.shape, (room.stride(0), 100, 1)).view(cache.dtype)}


LAYOUTS = {
    "kv_cache with a head": lambda call: {"kv_cache": call["kv_cache"].unsqueeze(2)},
    "kv_c, k_pe with a head": lambda call: {"kv_c": call["kv_c"].unsqueeze(1), "k_pe": call["k_pe"].unsqueeze(1)},
    "k_pe alone with a head": lambda call: {"k_pe": call["k_pe"].unsqueeze(1)},
    "tables of four dimensions": lambda call: {name: call[name][:, None, None] for name in ("cos_cache", "sin_cache")},
    "tables with a head": lambda call: {name: call[name][:, None] for name in ("cos_cache", "sin_cache")},
    "halves of one table": lambda call: dict(
        zip(("cos_cache", "sin_cache"), torch.cat((call["cos_cache"], call["sin_cache"]), -1).chunk(2, -1), strict=True)
    ),
    "fp32 tables": lambda call: {name: call[name].float() for name in ("cos_cache", "sin_cache")},
    "scales of any shape": lambda call: {"k_scale": call["k_scale"].reshape(1, 1, 1), "q_scale": call["q_scale"].reshape(())},
    "transposed query": lambda call: {"q_nope": call["q_nope"].transpose(0, 1).contiguous().transpose(0, 1)},
    "sliced query": lambda call: dict(
        zip(("q_nope", "q_pe"), torch.cat((call["q_nope"], call["q_pe"]), -1).split([LATENT, ROTARY], -1), strict=True)
    ),
    "padded blocks": padded_blocks,
    "bytes": lambda call: {"kv_cache": call["kv_cache"].view(torch.uint8)},
    "int32 indices": lambda call: {name: call[name].int() for name in ("slot_mapping", "positions")},
    "int32 slots": lambda call: {"slot_mapping": call["slot_mapping"].int()},
    "int32 positions": lambda call: {"positions": call["positions"].int()},
    "all queries": lambda call: {"compute_all_q_rope": True},
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
def test_another_layout_gives_the_same_bits(change):
    """Twice: the second call finds the plan of the first."""
    plain = make_call()
    for _ in range(2):
        call = make_call()
        call |= change(call)
        assert_same(outputs(plain), outputs(call))


def more_rows(tensor: torch.Tensor, rows: int = 2) -> torch.Tensor:
    """`tensor` and rows of what must not be read or written."""
    filler = torch.nan if tensor.dtype.itemsize > 1 and tensor.is_floating_point() else 0
    extra = torch.full((rows, *tensor.shape[1:]), filler).to(tensor.dtype)
    return torch.cat((tensor.view(torch.uint8), extra.view(torch.uint8))).view(tensor.dtype)


@pytest.mark.parametrize("names", [("q_nope",), ("q_pe",), ("kv_c",), ("k_pe",), ("q_out",), ("positions",), "all"], ids="-".join)
def test_rows_beyond_the_slots_are_left_alone(names):
    """AITER takes the number of tokens from slot_mapping."""
    rows = ("q_nope", "q_pe", "kv_c", "k_pe", "q_out", "positions")
    plain, call = make_call(), make_call()
    call |= {name: more_rows(call[name]) for name in (rows if names == "all" else names)}
    before = call["q_out"].view(torch.uint8)[TOKENS:].clone()
    fused_qk_rope_concat_and_cache_mla(**call)
    assert torch.equal(call["q_out"].view(torch.uint8)[TOKENS:], before)
    call["q_out"] = call["q_out"][:TOKENS]
    assert_same(outputs(plain), [call[name].view(torch.uint8).reshape(-1) for name in ("q_out", "kv_cache")])
    assert not wrong(call, "gfx950")


def test_slots_beyond_the_query_are_not_read():
    plain, call = make_call(), make_call()
    call["slot_mapping"] = torch.cat((call["slot_mapping"], torch.tensor([-1, OUT_OF_RANGE_SLOT])))
    assert_same(outputs(plain), outputs(call))


def test_heads_beyond_the_querys_are_left_alone():
    plain, call = make_call(), make_call()
    call["q_out"] = unwritten(torch.zeros(TOKENS, 2 * HEADS, LATENT + ROTARY, dtype=torch.float8_e4m3fn))
    fused_qk_rope_concat_and_cache_mla(**call)
    assert (call["q_out"].view(torch.uint8)[:, HEADS:] == NONE_WRITTEN).all()
    call["q_out"] = call["q_out"][:, :HEADS]
    assert_same(outputs(plain), outputs(call))


def test_no_tokens():
    call = make_call()
    call |= {name: call[name][:0] for name in ("q_nope", "q_pe", "kv_c", "k_pe", "q_out", "positions", "slot_mapping")}
    fused_qk_rope_concat_and_cache_mla(**call)
    assert (call["kv_cache"].view(torch.uint8) == NONE_WRITTEN).all()


@pytest.mark.parametrize("is_nope_first", [True, False])
def test_no_rotary_columns(is_nope_first):
    call = make_call(q="model", kv="model", is_nope_first=is_nope_first)
    call |= {name: call[name][..., :0] for name in ("q_pe", "k_pe", "cos_cache", "sin_cache")}
    call |= {name: call[name][..., :LATENT].contiguous() for name in ("q_out", "kv_cache")}
    fused_qk_rope_concat_and_cache_mla(**call)
    assert torch.equal(call["q_out"], call["q_nope"])
    kept = call["slot_mapping"] >= 0
    assert torch.equal(call["kv_cache"].flatten(0, 1)[call["slot_mapping"][kept]], call["kv_c"][kept])


def test_scales_that_are_not_read_may_be_anything():
    plain, call = (make_call(q="model", kv="model", dtype=torch.float16) for _ in range(2))
    call |= {"q_scale": torch.ones(3, dtype=torch.bfloat16), "k_scale": torch.tensor(torch.nan)}
    assert_same(outputs(plain), outputs(call))


def several_heads(call: Call, heads: int) -> dict[str, Any]:
    """kv_c, k_pe and a cache of `heads` KV heads, each with values of its own."""
    cache = torch.zeros(BLOCKS, BLOCK_SIZE, heads, LATENT + ROTARY, dtype=call["kv_cache"].dtype)
    factors = torch.arange(1, heads + 1).to(call["kv_c"].dtype)[:, None]
    return {**{name: call[name][:, None] * factors for name in ("kv_c", "k_pe")}, "kv_cache": unwritten(cache)}


@pytest.mark.parametrize(("q", "kv"), [("fp8", "fp8"), ("model", "model"), ("fp8", "bytes")])
@pytest.mark.parametrize("is_nope_first", [True, False])
@pytest.mark.parametrize("is_neox", [True, False])
def test_several_kv_heads_are_each_what_it_is_alone(is_neox, is_nope_first, q, kv):
    """A call with three KV heads, and one for each of them, which the tests above hold to AITER; also more than the query has."""
    for heads in (3, 5):
        plain = make_call(q=q, kv=kv, is_neox=is_neox, is_nope_first=is_nope_first)
        call = {**plain, **several_heads(plain, heads)}
        fused_qk_rope_concat_and_cache_mla(**call)
        for head in range(heads):
            alone = make_call(q=q, kv=kv, is_neox=is_neox, is_nope_first=is_nope_first)
            alone |= {name: call[name][:, head] for name in ("kv_c", "k_pe")}
            fused_qk_rope_concat_and_cache_mla(**alone)
            assert not wrong(alone, "gfx950")
            assert torch.equal(call["kv_cache"][:, :, head].view(torch.uint8), alone["kv_cache"].view(torch.uint8))
            assert torch.equal(call["q_out"].view(torch.uint8), alone["q_out"].view(torch.uint8))


def test_kv_heads_may_lie_anywhere():
    """Where AITER's bounds would cut them off: heads with gaps in kv_c, in k_pe and in the cache."""
    plain = make_call()
    dense, spread = ({**make_call(), **several_heads(plain, 2)} for _ in range(2))
    joined = torch.cat((spread["kv_c"], spread["k_pe"]), -1)
    spread |= {"kv_c": joined[..., :LATENT], "k_pe": joined[..., LATENT:]}
    room = torch.full((BLOCKS, BLOCK_SIZE, 2, 100), NONE_WRITTEN, dtype=torch.uint8)
    spread["kv_cache"] = room[..., : LATENT + ROTARY].view(torch.float8_e4m3fn)
    for call in (dense, spread):
        fused_qk_rope_concat_and_cache_mla(**call)
    assert torch.equal(spread["kv_cache"].view(torch.uint8), dense["kv_cache"].view(torch.uint8))
    assert (room[..., LATENT + ROTARY :] == NONE_WRITTEN).all()


def test_kernels_are_looked_up_once(monkeypatch):
    calls: Iterator[Call] = (make_call(seed, is_neox=1) for seed in range(3))  # AITER's bool takes an int
    fused_qk_rope_concat_and_cache_mla(**next(calls))
    monkeypatch.setattr(rope_concat, "load", pytest.fail)
    monkeypatch.setattr(runtime, "load", pytest.fail)
    for call in calls:
        fused_qk_rope_concat_and_cache_mla(**call)
        assert not wrong({**call, "is_neox": True}, "gfx950")


class Operators(TorchDispatchMode):
    """The names of torch's operators that run meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_is_allocated(monkeypatch):
    """A later call runs no operator of torch's but views, whatever the layout; the host run's look at the slots left out."""
    fused_qk_rope_concat_and_cache_mla(**make_call())
    monkeypatch.setattr(runtime.Kernel, "_check_slots", lambda self, slots, kv_cache: None)
    for change in LAYOUTS.values():
        call = make_call()
        call |= change(call)
        with Operators() as operators:
            fused_qk_rope_concat_and_cache_mla(**call)
        assert operators.names <= {"slice", "select", "view", "_unsafe_view"}


# Where AITER's result is a defect


@pytest.mark.parametrize("compute_all", [False, True])
@pytest.mark.parametrize("block_size", [1, BLOCK_SIZE])
def test_the_query_of_a_padded_token_is_written(compute_all, block_size):
    """Its row is what it is with a slot; its cache entry is left alone."""
    padded, kept = (make_call(compute_all_q_rope=compute_all) for _ in range(2))
    for call in (padded, kept):
        call["kv_cache"] = call["kv_cache"].reshape(-1, block_size, LATENT + ROTARY)
    free = set(range(BLOCKS * BLOCK_SIZE)) - set(kept["slot_mapping"].tolist())
    kept["slot_mapping"][2] = min(free)
    q, cache = zip(outputs(padded), outputs(kept), strict=True)
    assert torch.equal(*q)
    assert (padded["kv_cache"].flatten(0, 1).view(torch.uint8)[min(free)] == NONE_WRITTEN).all()
    assert not torch.equal(*cache)


@pytest.mark.parametrize(("arch", "limit"), [("gfx942", 240.0), ("gfx950", 448.0)])
@pytest.mark.parametrize("is_nope_first", [True, False])
def test_the_rotary_columns_saturate_and_keep_nan(arch, limit, is_nope_first):
    call = make_call(arch=arch, is_nope_first=is_nope_first, q_scale=torch.ones(()), k_scale=torch.ones(()))
    call["positions"][:] = 0  # cos 1, sin 0
    call["slot_mapping"] = torch.arange(TOKENS)
    for name in ("q_nope", "q_pe", "kv_c", "k_pe"):
        call[name].fill_(1e6)[..., 0] = -1e6
        call[name][1, ..., 1] = torch.nan
    call["q_pe"][1, ..., 0] = call["k_pe"][1, ..., 0] = torch.nan  # the other one of the pair
    fused_qk_rope_concat_and_cache_mla(**call)
    for rows in (call["q_out"].float(), call["kv_cache"].flatten(0, 1)[:TOKENS].float()):
        assert rows.isnan().sum() == rows[1].isnan().sum() > 0
        assert set(rows[~rows.isnan()].tolist()) == {-limit, limit}


def test_positions_are_clamped_for_every_shape():
    near, far = make_call(), make_call()
    near["positions"][:3], far["positions"][:3] = (
        torch.tensor([0, POSITIONS - 1, POSITIONS - 1]),
        torch.tensor([-9, POSITIONS, 2**40]),
    )
    assert_same(outputs(near), outputs(far))


# What it refuses


def cut(name: str, *index: Any) -> Any:
    return lambda call: {name: call[name][index]}


def put(name: str, value: Any) -> Any:
    return lambda call: {name: value}


REFUSED = [
    (put("q_nope", None), "q_nope: expected a tensor, got NoneType"),
    (put("k_scale", 1.0), "k_scale: expected a tensor, got float"),
    (lambda call: {"q_nope": call["q_nope"].float()}, "q_nope: dtype float32, expected bfloat16 or float16"),
    (cut("q_nope", 0), "q_nope: shape [3, 64], expected [T, H, L]"),
    (cut("q_nope", ..., slice(0, 40)), "q_nope: shape [7, 3, 40], lora_rank=40: must be"),
    (cut("k_pe", ..., slice(0, 15)), "k_pe: shape [7, 15], rope_dim=15: must be"),
    (put("k_pe", torch.tensor(1.0)), "k_pe: shape [], expected [T, R] or [T, 1, R]"),
    (lambda call: {"kv_c": call["kv_c"].half()}, "kv_c: dtype float16, expected bfloat16"),
    (lambda call: {"q_pe": call["q_pe"].half()}, "q_pe: dtype float16, expected bfloat16"),
    (lambda call: {"kv_cache": call["kv_cache"].half()}, "kv_cache: dtype float16, expected bfloat16 or float8_e4m3fn or"),
    (lambda call: {"q_out": call["q_out"].view(torch.uint8)}, "q_out: dtype uint8, expected bfloat16 or float8_e4m3fn or"),
    (lambda call: {"q_out": call["q_out"].view(torch.float8_e4m3fnuz)}, "kv_cache: dtype float8_e4m3fn, expected float8_e4m3fnuz"),
    (cut("q_pe", slice(0, 5)), "q_pe: shape [5, 3, 16], expected [7, 3, 16]"),
    (cut("q_pe", slice(None), slice(0, 2)), "q_pe: shape [7, 2, 16], expected [7, 3, 16]"),
    (cut("kv_c", slice(0, 5)), "kv_c: shape [5, 64], expected [7, 64]"),
    (cut("k_pe", slice(0, 5)), "k_pe: shape [5, 16], expected [7, 16]"),
    (cut("q_out", slice(0, 5)), "q_out: shape [5, 3, 80], expected [7, >=3, 80]"),
    (cut("q_out", slice(None), slice(0, 2)), "q_out: shape [7, 2, 80], expected [7, >=3, 80]"),
    (cut("positions", slice(0, 5)), "positions: shape [5], expected [7]"),
    (lambda call: {"slot_mapping": torch.tensor(3)}, "slot_mapping: shape [], expected"),
    (lambda call: {"slot_mapping": call["slot_mapping"].float()}, "slot_mapping: dtype float32, expected int64 or int32"),
    (cut("cos_cache", ..., slice(0, 4)), "cos_cache: shape [40, 4], expected [>=1, 8]"),
    (cut("sin_cache", slice(0, 9)), "sin_cache: shape [9, 8], expected [40, 8]"),
    (lambda call: {"cos_cache": call["cos_cache"].repeat(1, 2)}, "cos_cache: shape [40, 16], expected [>=1, 8]"),
    (lambda call: {"q_nope": call["q_nope"].mT.contiguous().mT}, "q_nope: last stride 3, expected 1"),
    (lambda call: {"k_scale": torch.ones(2)}, "k_scale: shape [2], expected [] or [1]"),
    (lambda call: {"q_scale": call["q_scale"].double()}, "q_scale: dtype float64, expected float32"),
    (lambda call: {"kv_cache": call["kv_cache"].flatten(1)}, "kv_cache: shape [5, 320], expected [blocks, block_size, 80] or"),
    (
        lambda call: {"kv_c": call["kv_c"][:, None].repeat(1, 2, 1)},
        "kv_cache: shape [5, 4, 80], expected [any, >=1, 2, 80]",
    ),
    (
        lambda call: {"kv_c": call["kv_c"][:, None].expand(-1, 5000, -1)},
        "kv_c: shape [7, 5000, 64], kv_heads=5000: must be an integer, from 1 to 4096",
    ),
    (
        lambda call: {**several_heads(call, 2), "k_pe": call["k_pe"]},
        "k_pe: shape [7, 16], expected [7, 2, 16]",
    ),
    (
        lambda call: {"k_pe": call["k_pe"][:, None].repeat(1, 2, 1)},
        "k_pe: shape [7, 2, 16], expected [T, 16] or [T, 1, 16]: one KV head",
    ),
    (
        lambda call: {"kv_cache": call["kv_cache"].view(torch.uint8)[:, :, None].repeat(1, 1, 2, 1)},
        "kv_cache: shape [5, 4, 2, 80], expected [blocks, block_size, 80] or [blocks, block_size, 1, 80]: one KV head",
    ),
    (
        lambda call: {"slot_mapping": call["slot_mapping"] + 20},
        "slot_mapping: slot ",
    ),
]


@pytest.mark.parametrize("loaded", [False, True], ids=["first call", "later"])
@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_wrong_argument_is_refused_by_aiters_name(change, message, loaded):
    call = make_call()
    if loaded:
        fused_qk_rope_concat_and_cache_mla(**make_call())
    before = {name: call[name].view(torch.uint8).clone() for name in ("q_out", "kv_cache")}
    with pytest.raises(ArgumentError) as caught:
        fused_qk_rope_concat_and_cache_mla(**{**call, **change(call)})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(call[name].view(torch.uint8), bytes_) for name, bytes_ in before.items())
