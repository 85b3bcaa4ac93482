"""The drop-in for AITER's fused_qk_rope_concat_and_cache_mla_seg: its signature, its pages, its tail of q_out, what it refuses."""

import inspect
from typing import Any

import pytest
import torch
from aiter_calls import BLOCK_SIZE, BLOCKS, HEADS, LATENT, NONE_WRITTEN, ROTARY, TOKENS, Call, make_call, segmented, wrong

from mlagen.errors import ArgumentError
from mlagen.integrations.aiter import fused_qk_rope_concat_and_cache_mla, fused_qk_rope_concat_and_cache_mla_seg

pytestmark = pytest.mark.host

# ROCm/aiter at commit e404860, aiter/ops/cache.py
AITER_SIGNATURE = (
    *("q_nope", "q_pe", "kv_c", "k_pe", "kv_cache", "q_out", "slot_mapping", "k_scale", "q_scale"),
    *("positions", "cos_cache", "sin_cache", "is_neox", ("is_nope_first", True)),
)


def test_the_signature_is_aiters():
    parameters = inspect.signature(fused_qk_rope_concat_and_cache_mla_seg).parameters.values()
    found = tuple(each.name if each.default is each.empty else (each.name, each.default) for each in parameters)
    assert found == AITER_SIGNATURE


def paged(call: Call) -> Call:
    """What the paged drop-in, which is held to AITER's vectors, leaves of a call."""
    fused_qk_rope_concat_and_cache_mla(**call)
    return call


def assert_pages(ours: Call, plain: Call) -> None:
    """The same codes as in the paged cache: of each page the latent columns of all its slots, then the rotary ones."""
    pages = plain["kv_cache"].view(torch.uint8).view(BLOCKS, BLOCK_SIZE, -1)
    size = plain["kv_cache"].dtype.itemsize
    latent, rotary = pages.split([LATENT * size, ROTARY * size], -1)
    assert torch.equal(ours["kv_cache"].view(torch.uint8).view(BLOCKS, -1), torch.cat((latent.flatten(1), rotary.flatten(1)), 1))
    width = (LATENT + ROTARY) * plain["q_out"].dtype.itemsize
    q_out = ours["q_out"].view(torch.uint8)
    assert torch.equal(q_out[:, :HEADS, :width], plain["q_out"].view(torch.uint8))
    assert (q_out[:, :HEADS, width:] == NONE_WRITTEN).all()
    assert (q_out[:, HEADS:] == NONE_WRITTEN).all()


@pytest.mark.parametrize(
    ("arch", "q", "kv"),
    [("gfx942", "fp8", "fp8"), ("gfx950", "fp8", "fp8"), ("gfx950", "fp8", "bytes"), ("gfx950", "model", "model")],
)
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("tail", [0, 3])
def test_the_pages_hold_what_the_paged_cache_does(arch, q, kv, is_neox, tail):
    call = make_call(arch=arch, q=q, kv=kv, is_neox=is_neox)
    ours = segmented(call, tail=tail)
    assert fused_qk_rope_concat_and_cache_mla_seg(**ours) is None
    plain = paged(call)
    assert not wrong(plain, arch)
    assert_pages(ours, plain)


CHANGES = {
    "pages of more dimensions": lambda call: {"kv_cache": call["kv_cache"].view(BLOCKS, BLOCK_SIZE, 1, LATENT + ROTARY)},
    "int32 indices": lambda call: {name: call[name].int() for name in ("slot_mapping", "positions")},
    "k_pe with a head": lambda call: {"k_pe": call["k_pe"].unsqueeze(1)},
    "by position": lambda call: {},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_form_gives_the_same_bits(change):
    plain = paged(make_call())
    for _ in range(2):
        ours = segmented(make_call())
        ours |= change(ours)
        fused_qk_rope_concat_and_cache_mla_seg(*ours.values())
        assert_pages(ours, plain)


def test_more_heads_and_more_rows_are_left_alone():
    ours, plain = segmented(make_call()), paged(make_call())
    wide = torch.full((TOKENS + 2, HEADS + 1, LATENT + ROTARY + 5), NONE_WRITTEN, dtype=torch.uint8).view(torch.float8_e4m3fn)
    ours["q_out"] = wide
    fused_qk_rope_concat_and_cache_mla_seg(**ours)
    assert (wide.view(torch.uint8)[TOKENS:] == NONE_WRITTEN).all()
    assert_pages({**ours, "q_out": wide[:TOKENS]}, plain)


REFUSED: list[tuple[Any, str]] = [
    (lambda call: {"is_nope_first": False}, "is_nope_first: False, expected True: a segmented page has the latent columns first"),
    (lambda call: {"kv_cache": call["kv_cache"][:, :-1]}, "kv_cache: shape [5, 319], expected [blocks, block_size * 80]"),
    (
        lambda call: {"kv_cache": call["kv_cache"].view(BLOCKS, BLOCK_SIZE, -1)[..., :40]},
        "kv_cache: shape [5, 4, 40], strides [320, 80, 1], expected [pages, page_size * (L+R)] without gaps",
    ),
    (lambda call: {"kv_cache": call["kv_cache"].view(torch.uint8)[0, 0]}, "kv_cache: shape [], strides [], expected [pages,"),
    (lambda call: {"q_out": call["q_out"][..., :79]}, "q_out: shape [7, 3, 79], expected [7, >=3, 80]"),
    (lambda call: {"q_out": call["q_out"][0]}, "q_out: shape [3, 83], expected [7, >=3, 80]"),
    (
        lambda call: {"kv_c": call["kv_c"][:, None].repeat(1, 2, 1)},
        "kv_c: shape [7, 2, 64], kv_heads=2 with kv_layout='segmented': its entries are those of one KV head",
    ),
    (lambda call: {"q_nope": None}, "q_nope: expected a tensor, got NoneType"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_wrong_argument_is_refused_by_aiters_name(change, message):
    call = segmented(make_call())
    with pytest.raises(ArgumentError) as caught:
        fused_qk_rope_concat_and_cache_mla_seg(**{**call, **change(call)})
    assert str(caught.value).startswith(message)
    assert all((call[name].view(torch.uint8) == NONE_WRITTEN).all() for name in ("q_out", "kv_cache"))
