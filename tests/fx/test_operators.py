"""The two halves of the prologue as operators: what they compute, against the oracle, and what torch asks of an operator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import mlagen.fx.operators  # noqa: F401  registers them
from mlagen.errors import ArgumentError

Q_PREP = torch.ops.mlagen.mla_decode_q_prep.default
UPDATE = torch.ops.mlagen.rope_kv_cache_update.default
H, P, L, R, BLOCKS, BLOCK_SIZE, ROWS = 3, 32, 48, 8, 3, 4, 11
FP8 = torch.float8_e4m3fn


def some(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def query(tokens, pair):
    q = some(tokens, H, P + R)
    return (q[..., :P], q[..., P:]) if pair else (q, None)


@pytest.mark.parametrize("pair", [False, True], ids=["joined", "pair"])
@pytest.mark.parametrize("dtype", [None, FP8, torch.float8_e4m3fnuz], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_q_prep_is_absorb_concat_and_quantisation(tokens, dtype, pair):
    w_uk, scale = some(H, L, P, seed=1).mT, torch.tensor(0.05)
    q, q_pe = query(tokens, pair)
    found = Q_PREP(q, q_pe, w_uk, scale, q_dtype=dtype)
    joined = some(tokens, H, P + R).double()
    absorbed = torch.einsum("thp,hpl->thl", joined[..., :P], w_uk.double()).bfloat16()
    exact = torch.cat((absorbed.double(), joined[..., P:]), -1)
    assert found.shape == (tokens, H, L + R)
    assert found.is_contiguous()
    if dtype is None:
        assert torch.allclose(found.double(), exact, rtol=2**-7, atol=2**-7)
    else:
        value = found.double() * 0.05
        largest = torch.finfo(dtype).max * 0.05
        # Half a step of three mantissa bits, and bf16's own rounding before it.
        assert torch.allclose(value, exact.clamp(-largest, largest), rtol=2**-4 + 2**-7, atol=0.05 * 2**-6)


def test_fp8_max_lowers_the_limit():
    w_uk = some(H, P, L)
    found = Q_PREP(*query(4, False), w_uk, torch.tensor(1e-3), q_dtype=torch.float8_e4m3fnuz, fp8_max=224.0)
    assert found.float().abs().max() == 224


def exact_update(q_pe, kv_c, k_pe, slots, positions, table, style, before):
    """By hand, an element after the other, in fp64."""
    after = before.double().clone().view(-1, L + R)
    half = R // 2

    def rotated(row, position):
        out = row.double().clone()
        cos, sin = table[min(max(position, 0), ROWS - 1)].double().split(half)
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if style == "gptj" else (i, i + half)
            out[..., a] = row[..., a].double() * cos[i] - row[..., b].double() * sin[i]
            out[..., b] = row[..., b].double() * cos[i] + row[..., a].double() * sin[i]
        return out

    for token, (slot, position) in enumerate(zip(slots, positions, strict=False)):
        if slot >= 0:
            after[slot] = torch.cat((kv_c[token].double(), rotated(k_pe[token], position)))
    turned = [rotated(q_pe[token], position) for token, position in enumerate(positions)]
    return torch.stack(turned) if turned else q_pe.double(), after.view_as(before)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_update_rotates_and_writes_where_there_is_a_slot(data):
    tokens = data.draw(st.integers(0, 6), label="tokens")
    style = data.draw(st.sampled_from(["gptj", "neox"]), label="style")
    places = data.draw(st.permutations(range(BLOCKS * BLOCK_SIZE)), label="slots")[:tokens]
    slots = [data.draw(st.sampled_from([place, -1])) for place in places]
    positions = data.draw(st.lists(st.integers(-2, ROWS + 2), min_size=tokens, max_size=tokens), label="positions")
    kind = data.draw(st.sampled_from(["bf16", "fp8", "uint8"]), label="cache")
    as_pair = data.draw(st.booleans(), label="cos and sin apart")
    q_pe, kv_c, k_pe, table = some(tokens, H, R), some(tokens, L, seed=1), some(tokens, R, seed=2), torch.randn(ROWS, R)
    before = some(BLOCKS, BLOCK_SIZE, L + R, seed=3)
    scale = torch.tensor([1.0]) if kind == "bf16" else torch.tensor([0.25])
    cache = before.clone() if kind == "bf16" else (before.float() / scale).to(FP8)
    if kind == "uint8":
        cache = cache.view(torch.uint8)
    held = cache.view(FP8) if kind == "uint8" else cache
    values = held.double() * scale
    rotary = table.split(R // 2, -1) if as_pair else (table, None)
    turned = UPDATE(
        q_pe, kv_c, k_pe, cache, torch.tensor([*slots, 0], dtype=torch.int64), torch.tensor(positions, dtype=torch.int64), *rotary,
        scale, rope_style=style, kv_dtype=None if kind == "bf16" else FP8,
    )  # fmt: skip
    expected_turned, expected = exact_update(q_pe, kv_c, k_pe, slots, positions, table, style, values)
    assert turned.is_contiguous()
    assert torch.allclose(turned.double(), expected_turned, rtol=2**-7, atol=2**-7)
    found = held.double() * scale
    step = 2**-7 if kind == "bf16" else 2**-4 + 2**-7
    assert torch.allclose(found, expected, rtol=step, atol=2**-7)
    untouched = torch.ones(BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    untouched[[slot for slot in slots if slot >= 0]] = False
    assert torch.equal(found.view(-1, L + R)[untouched], values.view(-1, L + R)[untouched])


def update_arguments(tokens=4):
    cache, slots = torch.zeros((BLOCKS, BLOCK_SIZE, L + R), dtype=torch.uint8), torch.arange(tokens) * 2 - 1
    return (
        some(tokens, H, P + R)[..., P:], some(tokens, L), some(tokens, R), cache, slots,
        torch.arange(tokens), torch.randn(ROWS, R), None, torch.tensor(0.5),
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 4])
def test_opcheck(tokens):
    w_uk = some(H, L, P).mT
    for pair in (False, True):
        torch.library.opcheck(Q_PREP, (*query(tokens, pair), w_uk, torch.tensor(0.1)), {"q_dtype": FP8})
        torch.library.opcheck(Q_PREP, (*query(tokens, pair), w_uk), {})
    torch.library.opcheck(UPDATE, update_arguments(tokens), {"rope_style": "neox", "kv_dtype": FP8})


def test_a_dynamic_number_of_rows_is_one_graph():
    w_uk = some(H, P, L)

    def run(q):
        return Q_PREP(q, None, w_uk, None, q_dtype=FP8)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for tokens in (5, 2, 17):
        q = some(tokens, H, P + R)
        if tokens == 5:
            torch._dynamo.mark_dynamic(q, 0)
        assert torch.equal(compiled(q).view(torch.uint8), run(q).view(torch.uint8))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"q": some(4, P + R)}, "2 and 3 dimensions"),
        ({"q": some(4, H + 1, P + R)}, "4 heads, expected the 3"),
        ({"q": some(4, H, P - 1)}, "31 columns, expected the 32"),
        ({"q_dtype": torch.int8}, "q_dtype: torch.int8"),
    ],
)
def test_what_does_not_fit_a_query_is_named(arguments, words):
    given_arguments = {"q": some(4, H, P + R), "q_pe": None, "w_uk": some(H, P, L), **arguments}
    with pytest.raises(ArgumentError, match=words):
        Q_PREP(**given_arguments)


@pytest.mark.parametrize(
    ("place", "value", "options", "words"),
    [
        (3, torch.zeros(BLOCKS, BLOCK_SIZE, L), {}, "kv_cache: shape"),
        (3, torch.zeros(BLOCKS, BLOCK_SIZE, L + R), {"kv_dtype": None}, "kv_cache: torch.float32 with kv_dtype=None"),
        (2, some(4, R + 2), {}, "expected \\[T,H,R\\], \\[T,L\\], \\[T,R\\]"),
        (5, torch.arange(4), {"kv_dtype": None}, "torch.uint8 with kv_dtype=None"),
        (5, torch.arange(4), {"rope_style": "none"}, "rope_style: 'none'"),
    ],
)
def test_what_does_not_fit_an_update_is_named(place, value, options, words):
    arguments = list(update_arguments())
    arguments[place] = value
    with pytest.raises(ArgumentError, match=words):
        UPDATE(*arguments, **{"rope_style": "gptj", "kv_dtype": FP8, **options})
