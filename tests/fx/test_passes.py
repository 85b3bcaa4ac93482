"""The passes in torch.compile, on the host run: every spelling fused, right, and nothing else changed."""

import logging
import time

import fx_models
import pytest
import torch
import torch._inductor.config
from fx_compiled import ARCH, CONFIG, LIMIT, Seen, assert_as_eager, assert_close, assert_in_place, calls, compiled, marked, products
from fx_models import L, R

import mlagen.fx.packing
from mlagen.errors import ArgumentError
from mlagen.fx import FusionConfig, ProloguePasses, fused_prologue, repack

pytestmark = pytest.mark.host


@pytest.mark.parametrize("name", fx_models.SPELLINGS)
def test_every_spelling_is_fused(name):
    layer = fx_models.SPELLINGS[name]()
    run, seen, counter = compiled(layer)
    for tokens in (16, 2, LIMIT):
        inputs, cache = marked(tokens), fx_models.new_cache(layer)
        result = run(inputs[0], cache, *inputs[1:])
        assert_as_eager(layer, inputs, result, cache)
    assert counter.frame_count == 1
    ((before, after, _),) = seen.graphs
    assert calls(after, "mlagen.decode_prologue_weights") == 1
    assert calls(before, "aten.index_put.") == 1
    assert calls(after, "aten.index_put.") == 0
    assert len(after.splitlines()) < len(before.splitlines()) - 15
    assert products(after) == products(before) - 1


@pytest.mark.parametrize("tokens", [1, 16, LIMIT])
def test_numbers_of_rows_that_are_known(tokens):
    layer = fx_models.Vllm()
    run, seen, _ = compiled(layer, dynamic=False)
    inputs, cache = fx_models.batch(tokens), fx_models.new_cache(layer)
    assert_as_eager(layer, inputs, run(inputs[0], cache, *inputs[1:]), cache)
    assert calls(seen.graphs[0][1], "mlagen.decode_prologue_weights") == 1


@pytest.mark.parametrize(
    "config",
    [
        FusionConfig(arch=ARCH),
        FusionConfig(enabled=True, arch=ARCH, max_num_seqs=LIMIT - 1),
        FusionConfig(enabled=True, max_tokens=4),
    ],
    ids=["off", "one row more than the limit", "max_tokens"],
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["size", "range"])
def test_outside_of_the_gate_the_graph_is_the_same(config, dynamic):
    layer = fx_models.Vllm()
    run, seen, _ = compiled(layer, config, dynamic=None if dynamic else False)
    inputs, cache = (marked(16) if dynamic else fx_models.batch(LIMIT)), fx_models.new_cache(layer)
    run(inputs[0], cache, *inputs[1:])
    ((before, after, same),) = seen.graphs
    assert before == after
    assert same


def test_a_range_without_end_is_outside_unless_asked_for():
    for limit, fused in ((None, 0), (float("inf"), 1)):
        torch._dynamo.reset()
        layer = fx_models.Einsum()
        run, seen, _ = compiled(layer, FusionConfig(enabled=True, arch=ARCH, max_tokens=limit))
        inputs, cache = fx_models.batch(256), fx_models.new_cache(layer)
        for each in inputs:
            torch._dynamo.mark_dynamic(each, 0)
        assert_as_eager(layer, inputs, run(inputs[0], cache, *inputs[1:]), cache)
        assert calls(seen.graphs[0][1], "mlagen.decode_prologue_weights") == fused


def any_blocks(kind):
    """The layer with an attention over a cache of any number of blocks of any size."""

    class AnyBlocks(kind):
        def attend(self, q_out, cache):
            entries = cache.view(self.fp8).flatten(0, 1)
            scores = torch.einsum("thd,sd->ths", q_out.float() * self.q_scale, entries.float() * self.k_scale)
            values = self.kv_b.view(fx_models.H, -1, L)[:, fx_models.P :].float()
            out = torch.einsum("ths,sl,hvl->thv", torch.softmax(scores / 7, -1), entries[:, :L].float(), values)
            return out.flatten(1).to(self.dtype) @ self.o_proj.t()

    return AnyBlocks()


@pytest.mark.parametrize("name", ["Einsum", "Matmul"])
@pytest.mark.parametrize("negative", [False, True], ids=["from the start", "from the end"])
def test_caches_of_a_symbol_s_extents(name, negative):
    layer = any_blocks(fx_models.SPELLINGS[name])
    config = FusionConfig(enabled=True, arch=ARCH, max_tokens=float("inf"), division_as_product=True)
    run, seen, counter = compiled(layer, config, dynamic=True)
    for blocks, tokens in ((20, 17), (9, 5), (13, 40)):  # no two extents equal, which torch would take for one symbol
        x, _, positions = fx_models.batch(tokens)
        slots = torch.randperm(blocks * fx_models.BLOCK_SIZE - 1, generator=torch.Generator().manual_seed(blocks))[:tokens]
        if negative:
            slots[1] = -1
        cache = torch.zeros_like(fx_models.new_cache(layer)[:blocks])
        result = run(x, cache, slots, positions)
        expected_cache = torch.zeros_like(cache)
        expected = layer(x, expected_cache, slots, positions)
        assert_close(layer, result[1], expected[1])
        assert_close(layer, cache, expected_cache)
        attended = (x + layer.attend(result[1], cache)).float()
        assert torch.allclose(result[0].float(), attended, rtol=2**-6, atol=2**-5), "the attention sees what was written"
    assert counter.frame_count == 1
    assert calls(seen.graphs[0][1], "mlagen.decode_prologue_weights") == 1


def test_the_passes_take_little_time():
    """Of a graph of eight layers; the bound is loose, a machine under load is slow."""

    class Many(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(fx_models.Vllm(seed) for seed in range(8))

        def forward(self, x, caches, slots, positions):
            for layer, cache in zip(self.layers, caches, strict=True):
                x, _ = layer(x, cache, slots, positions)
            return x

    model = Many()
    spent = []

    class Timed(ProloguePasses):
        def __call__(self, graph):
            start = time.perf_counter()
            super().__call__(graph)
            spent.append(time.perf_counter() - start)
            assert calls(str(graph), "mlagen.decode_prologue_weights") == 8

        def uuid(self):
            return None

    inputs = marked(16)
    with torch._inductor.config.patch(post_grad_custom_post_pass=Timed(CONFIG)):
        torch.compile(model, fullgraph=True)(inputs[0], [fx_models.new_cache(model.layers[0]) for _ in range(8)], *inputs[1:])
    (seconds,) = spent
    print(f"{seconds / 8 * 1e3:.0f} ms a layer")
    assert seconds / 8 < 2


class Two(torch.nn.Module):
    """Two layers, one after the other, with caches of their own or with one."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second = kind(0), kind(1)

    def forward(self, x, caches, slots, positions):
        x, one = self.first(x, caches[0], slots, positions)
        x, two = self.second(x, caches[-1], slots, positions)
        return x, one, two


@pytest.mark.parametrize("shared", [False, True], ids=["a cache each", "one cache"])
@pytest.mark.parametrize("name", ["Vllm", "HuggingFace", "DeepSeek"])
def test_each_layer_gets_its_own(name, shared):
    model = Two(fx_models.SPELLINGS[name])
    run, seen, _ = compiled(model)
    inputs = marked(16)
    caches = [fx_models.new_cache(model.first) for _ in range(1 if shared else 2)]
    expected_caches = [each.clone() for each in caches]
    result = run(inputs[0], caches, *inputs[1:])
    expected = model(inputs[0], expected_caches, *inputs[1:])
    assert calls(seen.graphs[0][1], "mlagen.decode_prologue_weights") == 2
    for found, wanted in zip((*caches, *result[1:]), (*expected_caches, *expected[1:]), strict=True):
        # The second layer's input differs by roundings of the first.
        found, wanted = (each.view(torch.float8_e4m3fn).float() for each in (found, wanted))
        assert (found - wanted).abs().max() <= 0.25 * wanted.abs().max()
        assert torch.allclose(found, wanted, rtol=0.3, atol=2.0)


def test_the_cache_is_written_in_place():
    assert_in_place(fx_models.Vllm())


def test_negative_slots_and_positions_count_from_the_end_as_torch_does():
    layer = fx_models.Einsum()
    run, _, _ = compiled(layer)
    x, slots, positions = marked(16)
    slots[3], positions[5] = -1, -2
    cache = fx_models.new_cache(layer)
    assert_as_eager(layer, (x, slots, positions), run(x, cache, slots, positions), cache)
    assert cache.view(-1, L + R)[-1].any()


def test_padded_slots_are_skipped_where_that_is_said():
    layer = fx_models.Einsum()
    run, seen, _ = compiled(
        layer, FusionConfig(enabled=True, arch=ARCH, assume_padded_slots_skip=True, assume_positions_valid=True)
    )
    x, slots, positions = marked(16)
    slots[slots == fx_models.SLOTS - 1] = 0
    slots[3] = -1
    cache = fx_models.new_cache(layer)
    result = run(x, cache, slots, positions)
    assert not cache.view(-1, L + R)[-1].any()
    assert result[1][3].view(torch.uint8).any(), "its row of the query is there"
    assert calls(seen.graphs[0][1], "aten.where.self") == calls(seen.graphs[0][0], "aten.where.self")


class OddTable(fx_models.Einsum):
    """Rows of the table whose columns are not next to each other, which the kernel cannot read."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.table = self.table.t().contiguous().t()


class Integers(fx_models.Einsum):
    """A scale that is no tensor."""

    def quantized(self, x, scale):
        return (x.float() * 4.0).clamp(-448.0, 448.0).to(self.fp8)


@pytest.mark.parametrize("kind", [OddTable, Integers])
def test_what_the_kernel_cannot_be_given_is_prepared_or_left(kind):
    layer = kind()
    run, seen, _ = compiled(layer)
    inputs, cache = marked(16), fx_models.new_cache(layer)
    assert_as_eager(layer, inputs, run(inputs[0], cache, *inputs[1:]), cache)
    assert seen.graphs[0][2] == (calls(seen.graphs[0][1], "mlagen.decode_prologue_weights") == 0)


def test_what_was_emitted_is_taken_back_when_the_operator_refuses(monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise ArgumentError("q: refused")

    monkeypatch.setattr("mlagen.fx.fuse.auto_functionalized_v2", refuse)
    layer = fx_models.DeepSeek()
    run, seen, _ = compiled(layer)
    inputs, cache = marked(16), fx_models.new_cache(layer)
    run(inputs[0], cache, *inputs[1:])
    assert seen.graphs[0][0] == seen.graphs[0][1]
    assert "left as it is: q: refused" in caplog.text


def test_yarn_is_in_the_table():
    layer = fx_models.DeepSeek(yarn=True)
    run, seen, _ = compiled(layer)
    inputs, cache = marked(16), fx_models.new_cache(layer)
    assert_as_eager(layer, inputs, run(inputs[0], cache, *inputs[1:]), cache)
    assert calls(seen.graphs[0][1], "mlagen.decode_prologue_weights") == 1


def test_fp16_and_fnuz():
    layer = fx_models.VllmNeox(dtype=torch.float16, fp8=torch.float8_e4m3fnuz)
    run, seen, _ = compiled(layer, FusionConfig(enabled=True, arch="gfx942"))
    x, slots, positions = marked(16)
    inputs, cache = (x.half(), slots, positions), fx_models.new_cache(layer)
    torch._dynamo.mark_dynamic(inputs[0], 0, min=2, max=LIMIT)
    assert_as_eager(layer, inputs, run(inputs[0], cache, *inputs[1:]), cache)
    assert calls(seen.graphs[0][1], "mlagen.decode_prologue_weights") == 1


@pytest.mark.parametrize(
    ("layer", "config", "words"),
    [
        (lambda: fx_models.Vllm(fp8=torch.float8_e4m3fnuz), CONFIG, "codes of torch.float8_e4m3fnuz, but gfx950"),
        (fx_models.Vllm, FusionConfig(enabled=True), "arch: the host run needs to know"),
        (fx_models.Matmul, FusionConfig(enabled=True, arch=ARCH), "made by division"),
    ],
    ids=["flavour", "no arch", "division"],
)
def test_what_is_not_fused_says_why(layer, config, words, caplog):
    caplog.set_level(logging.DEBUG, "mlagen.fx")
    layer = layer()
    run, seen, _ = compiled(layer, config)
    inputs, cache = marked(16), fx_models.new_cache(layer)
    assert_as_eager(layer, inputs, run(inputs[0], cache, *inputs[1:]), cache)
    assert "mlagen" not in seen.graphs[0][1]
    assert words in caplog.text


class UsedTwice(fx_models.Einsum):
    """The rotated k_pe is returned, too."""

    def rotate(self, x, cos_sin):
        self.also = super().rotate(x, cos_sin)
        return self.also

    def forward(self, *inputs):
        return (*super().forward(*inputs), self.also)


def test_an_intermediate_with_another_user_stays(caplog):
    caplog.set_level(logging.DEBUG, "mlagen.fx")
    layer = UsedTwice()
    run, seen, _ = compiled(layer)
    inputs, cache = marked(16), fx_models.new_cache(layer)
    run(inputs[0], cache, *inputs[1:])
    assert seen.graphs[0][0] == seen.graphs[0][1]
    assert "is used elsewhere, too" in caplog.text


@pytest.mark.parametrize("name", ["DeepSeek", "HuggingFace", "Sglang", "Matmul", "Baddbmm"])
def test_lifted_alone(name):
    layer = fx_models.SPELLINGS[name]()
    config = FusionConfig(enabled=True, arch=ARCH, max_num_seqs=LIMIT, fuse=False, lift=True, division_as_product=True)
    run, seen, _ = compiled(layer, config)
    inputs, cache = marked(16), fx_models.new_cache(layer)
    assert_as_eager(layer, inputs, run(inputs[0], cache, *inputs[1:]), cache)
    ((before, after, _),) = seen.graphs
    assert calls(after, "mlagen.mla_decode_q_prep") == 1
    assert products(after) == products(before) - 1


def test_weights_are_packed_once_and_again_when_they_change(monkeypatch):
    count = []
    monkeypatch.setattr(mlagen.runtime.Kernel, "pack_weights", _counted(mlagen.runtime.Kernel.pack_weights, count))
    layer = fx_models.Einsum()
    run, _, _ = compiled(layer)
    inputs = marked(16)
    for _ in range(3):
        cache = fx_models.new_cache(layer)
        assert_as_eager(layer, inputs, run(inputs[0], cache, *inputs[1:]), cache)
    assert len(count) == 1
    packed = [each.tensor.data_ptr() for each in mlagen.fx.packing._PACKED.values() if not each.storage.expired()]
    layer.w_uk.mul_(-0.5)
    cache = fx_models.new_cache(layer)
    assert_as_eager(layer, inputs, run(inputs[0], cache, *inputs[1:]), cache)
    assert len(count) == 2
    assert packed == [each.tensor.data_ptr() for each in mlagen.fx.packing._PACKED.values() if not each.storage.expired()]


def _counted(pack, count):
    def counted(*args, **kwargs):
        count.append(1)
        return pack(*args, **kwargs)

    return counted


def test_repack_follows_changes_that_torch_does_not_count():
    layer = fx_models.Einsum()
    run, _, _ = compiled(layer)
    inputs, cache = marked(16), fx_models.new_cache(layer)
    run(inputs[0], cache, *inputs[1:])
    with torch.inference_mode():
        layer.w_uk.data.mul_(-0.5)
    assert repack() >= 1
    cache = fx_models.new_cache(layer)
    assert_as_eager(layer, inputs, run(inputs[0], cache, *inputs[1:]), cache)


def test_the_context_restores_what_was_there():
    before = torch._inductor.config.post_grad_custom_post_pass
    with fused_prologue(CONFIG):
        assert isinstance(torch._inductor.config.post_grad_custom_post_pass, ProloguePasses)
    assert torch._inductor.config.post_grad_custom_post_pass is before
    with fused_prologue(FusionConfig()):
        assert torch._inductor.config.post_grad_custom_post_pass is before


def test_the_cache_key_has_the_settings_and_the_earlier_pass():
    keys = {
        ProloguePasses(config, earlier).uuid()
        for config in (CONFIG, FusionConfig(enabled=True))
        for earlier in (None, ProloguePasses(CONFIG))
    }
    assert len(keys) == 4
    assert ProloguePasses(CONFIG).uuid() == ProloguePasses(CONFIG).uuid()
    assert ProloguePasses(CONFIG, Seen(CONFIG)).uuid() is None
