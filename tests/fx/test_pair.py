"""A layer that calls the two operators itself, as models with an opaque attention do: the pair becomes one operator."""

import logging

import fx_models
import pytest
import torch
from fx_compiled import assert_as_eager, calls, compiled, marked
from fx_models import L, P

pytestmark = pytest.mark.host


class Opaque(fx_models.Spelling):
    """q's rotary columns come back from the update, as a tensor of their own or written into q."""

    in_place = False

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        w_uk = self.kv_b.view(fx_models.H, -1, L)[:, :P]
        q_pe = torch.ops.mlagen.rope_kv_cache_update(
            q[..., P:], kv_c, k_pe, cache, slots, positions, self.table, None, self.k_scale, rope_style="gptj", kv_dtype=self.fp8
        )
        if self.in_place:
            q = q.clone()
            q[..., P:] = q_pe
            return torch.ops.mlagen.mla_decode_q_prep(q, None, w_uk, self.q_scale, q_dtype=self.fp8)
        return torch.ops.mlagen.mla_decode_q_prep(q[..., :P], q_pe, w_uk, self.q_scale, q_dtype=self.fp8)


class InPlace(Opaque):
    in_place = True


class UsedTwice(Opaque):
    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        self.q_pe = torch.ops.mlagen.rope_kv_cache_update(
            q[..., P:], kv_c, k_pe, cache, slots, positions, self.table, None, self.k_scale, rope_style="gptj", kv_dtype=self.fp8
        )
        w_uk = self.kv_b.view(fx_models.H, -1, L)[:, :P]
        return torch.ops.mlagen.mla_decode_q_prep(q[..., :P], self.q_pe, w_uk, self.q_scale, q_dtype=self.fp8)

    def forward(self, *inputs):
        return (*super().forward(*inputs), self.q_pe)


class ScaledByTheCache(Opaque):
    """A scale that is read from the cache after the update: one operator would wait for itself."""

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        q_pe = torch.ops.mlagen.rope_kv_cache_update(
            q[..., P:], kv_c, k_pe, cache, slots, positions, self.table, None, self.k_scale, rope_style="gptj", kv_dtype=self.fp8
        )
        scale = cache.float().amax() / 1000
        w_uk = self.kv_b.view(fx_models.H, -1, L)[:, :P]
        return torch.ops.mlagen.mla_decode_q_prep(q[..., :P], q_pe, w_uk, scale, q_dtype=self.fp8)


@pytest.mark.parametrize("kind", [Opaque, InPlace])
def test_the_pair_is_one_operator(kind):
    layer = kind()
    run, seen, counter = compiled(layer)
    for tokens in (16, 2):
        x, slots, positions = marked(tokens)
        slots[0], positions[1] = -1, 1000  # skipped, and clamped: both mean the same here
        cache = fx_models.new_cache(layer)
        assert_as_eager(layer, (x, slots, positions), run(x, cache, slots, positions), cache)
    assert counter.frame_count == 1
    after = seen.graphs[0][1]
    assert calls(after, "mlagen.decode_prologue_weights") == 1
    assert calls(after, "mlagen.mla_decode_q_prep") == calls(after, "mlagen.rope_kv_cache_update") == 0


def test_a_rotated_query_that_something_else_reads_stays():
    layer = UsedTwice()
    run, seen, _ = compiled(layer)
    x, slots, positions = marked(16)
    run(x, fx_models.new_cache(layer), slots, positions)
    assert seen.graphs[0][0] == seen.graphs[0][1]


def test_a_query_scaled_by_what_the_update_wrote_stays(caplog):
    caplog.set_level(logging.DEBUG, "mlagen.fx")
    layer = ScaledByTheCache()
    run, seen, _ = compiled(layer)
    inputs, cache = marked(16), fx_models.new_cache(layer)
    assert_as_eager(layer, inputs, run(inputs[0], cache, *inputs[1:]), cache)
    assert seen.graphs[0][0] == seen.graphs[0][1]
    assert "is made of what the update returns" in caplog.text
