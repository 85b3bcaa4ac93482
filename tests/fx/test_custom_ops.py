"""Prologues that are written with the operators of serving libraries."""

import logging

import fx_custom_ops
import fx_models
import pytest
import torch
import torch._inductor.config
from fx_compiled import ARCH, LIMIT, assert_as_eager, assert_in_place, calls, compiled, marked
from fx_models import L, P, R

from mlagen.fx import FusionConfig

pytestmark = pytest.mark.host


@pytest.mark.parametrize("second", [True, False], ids=["auto_functionalized_v2", "auto_functionalized"])
@pytest.mark.parametrize("name", fx_custom_ops.SPELLINGS)
def test_every_spelling_is_fused(name, second):
    layer = fx_custom_ops.SPELLINGS[name]()
    run, seen, counter = compiled(layer)
    with torch._inductor.config.patch(enable_auto_functionalized_v2=second):
        for tokens in (16, 2, LIMIT):
            inputs, cache = marked(tokens), fx_models.new_cache(layer)
            result = run(inputs[0], cache, *inputs[1:])
            assert_as_eager(layer, inputs, result, cache)
    assert counter.frame_count == 1
    ((before, after, _),) = seen.graphs
    assert "auto_functionalized" in before
    assert calls(after, "mlagen.decode_prologue_weights") == 1
    for library in ("_C.", "_C_cache_ops.", "sglang.", "vllm.", "aiter."):
        assert f"args = ({library}" not in after, "its call is gone"


def test_padded_slots_are_skipped_as_the_operator_does():
    layer = fx_custom_ops.VllmOps()
    run, seen, _ = compiled(layer)
    x, slots, positions = marked(16)
    slots[slots == fx_models.SLOTS - 1] = 0
    slots[3] = -1
    cache = fx_models.new_cache(layer)
    assert_as_eager(layer, (x, slots, positions), run(x, cache, slots, positions), cache)
    assert not cache.view(-1, L + R)[-1].any()
    assert calls(seen.graphs[0][1], "aten.where.self") == calls(seen.graphs[0][0], "aten.where.self")


class Grouped(fx_custom_ops.VllmOps):
    def codes(self, query):
        result = torch.empty_like(query, dtype=self.fp8)
        torch.ops._C.static_scaled_fp8_quant(result, query, self.q_scale, [-1, -1])
        return result


class Dynamic(fx_custom_ops.SglangOps):
    """The scale is computed, and written."""

    def prologue(self, q, kv_c, k_pe, cache, slots, positions):
        self.rotated(q, k_pe, positions)
        query = torch.cat((self.absorbed(q[..., :P]), q[..., P:]), -1)
        result = torch.empty_like(query, dtype=self.fp8)
        torch.ops.sglang.per_tensor_quant_fp8(query, result, self.q_scale, False)
        cache.view(-1, L + R)[slots] = self.stored(torch.cat((kv_c, k_pe), -1))
        return result


class SomeColumns(fx_custom_ops.VllmOps):
    """A table that turns half of the columns of a head."""

    def rotated(self, q, k_pe, positions):
        for each in (q[..., P : P + R // 2], k_pe[..., : R // 2]):
            torch.ops._C.rotary_embedding(positions, each, None, R // 2, self.table[:, ::2].contiguous(), self.neox)


class Backwards(fx_custom_ops.VllmOps):
    """The key turned by other positions than the query."""

    def rotated(self, q, k_pe, positions):
        torch.ops._C.rotary_embedding(positions, q[..., P:], None, R, self.table, self.neox)
        torch.ops._C.rotary_embedding(positions.flip(0), k_pe, None, R, self.table, self.neox)


class Returned(fx_custom_ops.VllmOpsFused):
    """The rotated k_pe is returned, too."""

    def inputs(self, x):
        q, kv_c, k_pe = super().inputs(x)
        self.k_pe = k_pe.clone()
        return q, kv_c, self.k_pe

    def forward(self, *inputs):
        return (*super().forward(*inputs), self.k_pe)


class Segmented(fx_custom_ops.VllmOps):
    cache_type = "fp8_ds_mla"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Grouped, "static_scaled_fp8_quant with group_shape=[-1, -1], expected None"),
        (Dynamic, "per_tensor_quant_fp8 with is_static=False, expected True"),
        (Backwards, "its rotary columns are not turned as the query's are"),
        (Returned, "k_pe is used afterwards"),
        (Segmented, "kv_cache_dtype='fp8_ds_mla'"),
    ],
)
def test_other_forms_are_left_alone(kind, words, caplog):
    caplog.set_level(logging.DEBUG, "mlagen.fx")
    layer = kind()
    run, _, _ = compiled(layer)
    inputs, cache = marked(16), fx_models.new_cache(layer)
    scale = layer.q_scale.clone()
    result = run(inputs[0], cache, *inputs[1:])
    layer.q_scale.copy_(scale)
    assert_as_eager(layer, inputs, result, cache)
    assert words in caplog.text


def test_a_rotation_of_some_columns_stays():
    layer = SomeColumns()
    run, seen, _ = compiled(layer)
    inputs, cache = marked(16), fx_models.new_cache(layer)
    assert_as_eager(layer, inputs, run(inputs[0], cache, *inputs[1:]), cache)
    after = seen.graphs[0][1]
    assert calls(after, "mlagen.decode_prologue_weights") == 1
    assert calls(after, "_C.rotary_embedding") == 2


def test_rounding_as_the_operators_say():
    """The cache's operator divides: without a word from the user it stays, and the query with it."""
    layer = fx_custom_ops.VllmOps()
    run, seen, _ = compiled(layer, FusionConfig(enabled=True, arch=ARCH))
    inputs, cache = marked(16), fx_models.new_cache(layer)
    assert_as_eager(layer, inputs, run(inputs[0], cache, *inputs[1:]), cache)
    assert seen.graphs[0][0] == seen.graphs[0][1]


def test_fnuz_saturates_at_two_magnitudes(caplog):
    """vLLM's query at 224, its cache at 240: one kernel has one limit."""
    caplog.set_level(logging.DEBUG, "mlagen.fx")
    layer = fx_custom_ops.VllmOps(fp8=torch.float8_e4m3fnuz)
    run, seen, _ = compiled(layer, FusionConfig(enabled=True, arch="gfx942", division_as_product=True))
    inputs, cache = marked(16), fx_models.new_cache(layer).view(torch.float8_e4m3fnuz)
    run(inputs[0], cache, *inputs[1:])
    assert "saturate at different magnitudes, [224.0, 240.0]" in caplog.text
    assert seen.graphs[0][0] == seen.graphs[0][1]


def test_the_cache_is_written_in_place():
    assert_in_place(fx_custom_ops.VllmOpsFused())
