"""Layers that come close to a prologue and mean something else: whatever is done to them, they compute what they say."""

import logging

import fx_models
import pytest
import torch
from fx_compiled import ARCH, assert_as_eager, assert_close, calls, compiled, marked
from fx_models import BLOCK_SIZE, SLOTS, H, L, P, R

from mlagen.fx import FusionConfig

pytestmark = pytest.mark.host

ANY_ROWS = FusionConfig(enabled=True, arch=ARCH, max_tokens=float("inf"))


class Angles(fx_models.Einsum):
    """The tokens are turned by rows that are looked up by other positions than their own."""

    def looked_up(self, positions):
        raise NotImplementedError

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        cos_sin = self.looked_up(positions)
        ql_nope = torch.einsum("thp,lhp->thl", q[..., :P], self.w_uk)
        entry = torch.cat((kv_c, self.rotate(k_pe[:, None], cos_sin)[:, 0]), -1)
        cache.view(-1, L + R)[slots] = self.stored(entry)
        return self.quantized(torch.cat((ql_nope, self.rotate(q[..., P:], cos_sin)), -1), self.q_scale)


class OneAngle(Angles):
    def looked_up(self, positions):
        return self.table[positions][:1]


class EverySecond(Angles):
    def looked_up(self, positions):
        return self.table[positions.repeat_interleave(2)][::2]


class Doubled(Angles):
    def looked_up(self, positions):
        return self.table[torch.cat((positions, positions + 1))].view(-1, 2, R)[:, 0]


class Negated(Angles):
    """Numbers and angles negated, cosines and sines next to each other: the signs are taken out of the products."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.table = torch.stack(self.table.chunk(2, -1), -1).flatten(-2)

    def looked_up(self, positions):
        rows = -self.table[positions]
        return torch.cat((rows[:, ::2], rows[:, 1::2]), -1)

    def rotate(self, x, cos_sin):
        return super().rotate(-x, cos_sin)


@pytest.mark.parametrize("dynamic", [False, True], ids=["size", "symbol"])
@pytest.mark.parametrize("kind", [OneAngle, EverySecond, Doubled, Negated])
def test_angles_that_are_not_looked_up_by_the_positions_as_they_are(kind, dynamic):
    layer = kind()
    run, seen, _ = compiled(layer, dynamic=None if dynamic else False)
    inputs, cache = (marked(16) if dynamic else fx_models.batch(16)), fx_models.new_cache(layer)
    assert_as_eager(layer, inputs, run(inputs[0], cache, *inputs[1:]), cache)
    fused = kind in (EverySecond, Doubled)
    assert calls(seen.graphs[0][1], "mlagen.decode_prologue_weights") == fused


class Blocks(fx_models.Vllm):
    """Slots divided by a number that need not be the size of a block."""

    def attend(self, q_out, cache):
        return q_out.float().sum((1, 2))[:, None].to(self.dtype) * self.o_proj[:, 0]


def test_a_size_of_blocks_that_is_a_symbol_is_not_the_number_that_it_was():
    layer = Blocks()
    run, seen, counter = compiled(layer, ANY_ROWS, dynamic=True)
    for size in (BLOCK_SIZE, 2 * BLOCK_SIZE):
        inputs = fx_models.batch(13)
        cache = torch.zeros((SLOTS // BLOCK_SIZE, size, L + R), dtype=torch.uint8)
        expected = torch.zeros_like(cache)
        result = run(inputs[0], cache, *inputs[1:])
        assert_close(layer, result[1], layer(inputs[0], expected, *inputs[1:])[1])
        assert_close(layer, cache, expected)
    assert counter.frame_count == 1
    assert "mlagen" not in seen.graphs[0][1]


class MoreEntries(fx_models.Einsum):
    """A mixed batch: entries for all tokens, queries for some."""

    def forward(self, x, decoding, cache, slots, positions):
        q, _, _ = self.inputs(decoding)
        _, kv_c, k_pe = self.inputs(x)
        cache.view(-1, L + R)[slots] = self.stored(torch.cat((kv_c, k_pe), -1))
        ql_nope = torch.einsum("thp,lhp->thl", q[..., :P], self.w_uk)
        return self.quantized(torch.cat((ql_nope, q[..., P:]), -1), self.q_scale)


def test_entries_for_other_tokens_than_the_queries():
    layer = MoreEntries()
    run, seen, _ = compiled(layer, ANY_ROWS, dynamic=True)
    for tokens, some in ((16, 5), (9, 3), (7, 6)):
        inputs, cache = fx_models.batch(tokens), fx_models.new_cache(layer)
        decoding, _, _ = fx_models.batch(some, seed=1)
        expected = cache.clone()
        found = run(inputs[0], decoding, cache, *inputs[1:])
        assert_close(layer, found, layer(inputs[0], decoding, expected, *inputs[1:]))
        assert_close(layer, cache, expected)
    assert "mlagen" not in seen.graphs[0][1]


class TwoDimensionalSlots(fx_models.Vllm):
    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        return super().prologue(q, kv_c, k_pe, cache, slots[:, None], positions)


def test_slots_in_two_dimensions():
    layer = TwoDimensionalSlots()
    run, _, _ = compiled(layer)
    inputs, cache = fx_models.batch(1), fx_models.new_cache(layer)
    assert_as_eager(layer, inputs, run(inputs[0], cache, *inputs[1:]), cache)


class Written(fx_models.Einsum):
    """Some columns, of a symbol's number, written over."""

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        q = q.clone()
        q[..., : q.shape[0]] = 0
        return super().prologue(q, kv_c, k_pe, cache, slots, positions)


def test_columns_of_a_symbol_s_number():
    layer = Written()
    run, _, counter = compiled(layer)
    for tokens in (16, 5):
        inputs, cache = marked(tokens, high=P - 1), fx_models.new_cache(layer)
        assert_as_eager(layer, inputs, run(inputs[0], cache, *inputs[1:]), cache)
    assert counter.frame_count == 1


class RopeFirst(fx_models.Einsum):
    """[q_pe | q_nope @ W_UK]."""

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        cos_sin = self.table[positions]
        ql_nope = torch.einsum("thp,lhp->thl", q[..., :P], self.w_uk)
        entry = torch.cat((kv_c, self.rotate(k_pe[:, None], cos_sin)[:, 0]), -1)
        cache.view(-1, L + R)[slots] = self.stored(entry)
        return self.quantized(torch.cat((self.rotate(q[..., P:], cos_sin), ql_nope), -1), self.q_scale)


class FourDimensions(fx_models.Einsum):
    """As modeling_deepseek_v3 has queries: [batch, heads, length, width], one token in length."""

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        cos_sin = self.table[positions]
        q_pe = self.rotate(q[..., P:], cos_sin)[:, :, None]
        ql_nope = q[:, :, None, :P] @ self.w_uk.permute(1, 2, 0)
        entry = torch.cat((kv_c, self.rotate(k_pe[:, None], cos_sin)[:, 0]), -1)
        cache.view(-1, L + R)[slots] = self.stored(entry)
        return self.quantized(torch.cat((ql_nope, q_pe), -1), self.q_scale).squeeze(2)


class CachesApart(fx_models.Einsum):
    """Latent and rotary columns written each by itself."""

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        cos_sin = self.table[positions]
        ql_nope = torch.einsum("thp,lhp->thl", q[..., :P], self.w_uk)
        cache.view(-1, L + R)[:, :L][slots] = self.stored(kv_c)
        cache.view(-1, L + R)[:, L:][slots] = self.stored(self.rotate(k_pe[:, None], cos_sin)[:, 0])
        return self.quantized(torch.cat((ql_nope, self.rotate(q[..., P:], cos_sin)), -1), self.q_scale)


class Masked(fx_models.Einsum):
    """Only the entries of some tokens are written."""

    def stored(self, entry):
        return torch.where(entry[:, :1] > 0, super().stored(entry), 0)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (RopeFirst, "other columns before those of the product, expected [q_nope @ W_UK | q_pe]"),
        (FourDimensions, "a query of four dimensions [16, 2, 1, 80], expected [T,H,L+R]"),
        (CachesApart, "writes [16, 64], expected [T, 80] or [T, 1, 80]: latent and rotary columns that go to caches of their own"),
        (Masked, "bytes that are no fp8 codes"),
    ],
)
def test_forms_that_are_left_alone_are_named(kind, words, caplog):
    caplog.set_level(logging.DEBUG, "mlagen.fx")
    layer = kind()
    run, seen, _ = compiled(layer, dynamic=False)
    inputs, cache = fx_models.batch(16), fx_models.new_cache(layer)
    result = run(inputs[0], cache, *inputs[1:])
    expected_cache = fx_models.new_cache(layer)
    assert_close(layer, result[1], layer(inputs[0], expected_cache, *inputs[1:])[1])
    assert_close(layer, cache, expected_cache)
    assert seen.graphs[0][0] == seen.graphs[0][1]
    assert words in caplog.text


class Selected(fx_models.Einsum):
    def forward(self, x, cache, slots, positions):
        chosen = slots >= 0
        return super().forward(x[chosen], cache, slots[chosen], positions[chosen])


@pytest.mark.parametrize("config", [ANY_ROWS, FusionConfig(enabled=True, arch=ARCH)], ids=["any", "limit"])
def test_rows_whose_number_depends_on_data(config):
    layer = Selected()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run, seen, _ = compiled(layer, config)
        for chosen in (16, 5, 1):
            x, slots, positions = fx_models.batch(16)
            slots[chosen:] = -1
            cache, expected_cache = fx_models.new_cache(layer), fx_models.new_cache(layer)
            result = run(x, cache, slots, positions)
            assert_close(layer, result[1], layer(x, expected_cache, slots, positions)[1])
            assert_close(layer, cache, expected_cache)
    assert calls(seen.graphs[0][1], "mlagen.decode_prologue_weights") == 1


def test_no_tokens():
    layer = fx_models.Einsum()
    run, seen, _ = compiled(layer, dynamic=False)
    inputs, cache = fx_models.batch(0), fx_models.new_cache(layer)
    assert run(inputs[0], cache, *inputs[1:])[1].shape == (0, H, L + R)
    assert not cache.any()
    assert "mlagen" in seen.graphs[0][1]
