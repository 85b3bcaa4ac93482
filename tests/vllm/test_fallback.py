"""Layers that keep vLLM's own path, and what the log says of them."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = [pytest.mark.vllm, pytest.mark.host]

DECODE = ((1, 5), (1, 17))


FACTS = {
    "sparse MLA": lambda wrapper: setattr(wrapper.mla_attn.impl, "is_sparse", True),
    "DCP": lambda wrapper: setattr(wrapper.mla_attn.impl, "dcp_world_size", 2),
    "PCP": lambda wrapper: setattr(wrapper.mla_attn, "use_pcp", True),
    "host memory": lambda wrapper: setattr(wrapper.mla_attn, "hisparse_cache", object()),
    "FLASHMLA": lambda wrapper: setattr(wrapper.mla_attn, "attn_backend", SimpleNamespace(get_name=lambda: "FLASHMLA")),
    "pads heads itself": lambda wrapper: setattr(wrapper.mla_attn, "q_pad_num_heads", 128),
    "sliding window": lambda wrapper: setattr(wrapper.mla_attn, "sliding_window", 64),
    "fp8_e5m2": lambda wrapper: setattr(wrapper.mla_attn, "kv_cache_dtype", "fp8_e5m2"),
    "fp8_ds_mla": lambda wrapper: setattr(wrapper.mla_attn, "kv_cache_dtype", "fp8_ds_mla"),
}


@pytest.mark.parametrize("word", FACTS)
def test_a_layer_that_does_not_fit(build, toy, said, word):
    """It has no kernel, and one line says why, for both layers together."""
    ours = build(toy.Options())
    said.clear()
    for each in ours.module.layers:
        FACTS[word](each)
        each.mla_attn.mlagen.decode = None
        each.mla_attn.process_weights_after_loading(torch.bfloat16)
        assert not each.mla_attn.mlagen.fits
        assert each.mla_attn.mlagen.decode is None
    (line,) = said
    assert word in line
    assert "model.layers.0.self_attn.attn" in line


def test_a_request_that_shall_not_feel_its_batch(build, toy, said, monkeypatch):
    """A prefill beside it would change its bits: vLLM's decode rounds elsewhere than the kernel."""
    monkeypatch.setattr("vllm.envs.VLLM_BATCH_INVARIANT", True)
    model = build(toy.Options())
    assert not any(each.mlagen.fits for each in model.attentions)
    assert ["VLLM_BATCH_INVARIANT" in line for line in said] == [True]


def test_weights_that_are_elsewhere(build, toy, said, monkeypatch):
    """As those that vLLM has offloaded."""
    from vllm.platforms import current_platform

    model = build(toy.Options())
    said.clear()
    monkeypatch.setattr(type(current_platform), "device_type", "cuda")
    for each in model.attentions:
        each.mlagen.decode = None
        each.mlagen.prepare(model.module.layers[0], torch.bfloat16)
        assert not each.mlagen.fits
    (line,) = said
    assert "weights on device cpu, in a model on cuda" in line


def test_another_rotation(build, toy):
    """MRoPE has three positions for a token; whatever overrides vLLM's rotation is not known."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding

    from mlagen.integrations.vllm.choice import Unfit, rope_style

    ours = build(toy.Options())
    with set_current_vllm_config(ours.config):
        mrope = MRotaryEmbedding(64, 64, 256, 10000.0, True, torch.bfloat16, mrope_section=[8, 12, 12])
    with pytest.raises(Unfit, match="MRotaryEmbedding"):
        rope_style(mrope, 64)
    with pytest.raises(Unfit, match="RoPE of 64 of 32 columns"):
        rope_style(ours.module.layers[0].rotary_emb, 32)


@pytest.mark.parametrize("fits", [True, False])
def test_without_a_kernel_a_layer_is_stock(build, toy, said, fits):
    """Whether its graph calls our operator, as one that vLLM kept on disk may, or not."""
    options, batch = toy.Options(), toy.Batch(DECODE, 2)
    stock, ours = build(options, plugin=False), build(options)
    for each in ours.attentions:
        each.mlagen.spec, each.mlagen.decode = each.mlagen.spec if fits else None, None
    assert torch.equal(stock.run(batch), ours.run(batch))
    for one, other in zip(stock.caches, ours.caches, strict=True):
        assert torch.equal(one, other)


def test_a_kernel_that_cannot_be_had(build, toy, said, monkeypatch):
    """Serving goes on, and the second layer does not try again what took the first one minutes."""
    from mlagen.errors import MissingKernelError
    from mlagen.integrations.vllm import prologue

    tried = []

    def load(spec, *arguments, **options):
        tried.append(spec)
        raise MissingKernelError("no kernel, and MLAGEN_JIT=0")

    monkeypatch.setattr(prologue, "load", load)
    options, batch = toy.Options(), toy.Batch(DECODE, 2)
    stock, ours = build(options, plugin=False), build(options)
    assert torch.equal(stock.run(batch), ours.run(batch))
    assert len(tried) == 1
    assert ours.attentions[0].mlagen.fits, "a graph does not depend on what was to be had when it was made"
    assert ["no kernel, and MLAGEN_JIT=0" in line for line in said] == [False, True], "once for both layers"


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("a KV cache [16, 16, 640]", lambda cache: torch.cat((cache, cache), -1)),
        ("torch.int8", lambda cache: cache.view(torch.int8)),
        ("stride 16", lambda cache: cache.mT.contiguous().mT),
    ],
)
def test_a_cache_of_another_layout(build, toy, said, word, change):
    """Found when a batch comes: vLLM's path runs, and one line says why."""
    ours = build(toy.Options())
    said.clear()
    metadata = SimpleNamespace(num_actual_tokens=2, num_decode_tokens=2)
    attn = ours.attentions[0]
    two = torch.zeros(2, dtype=torch.int64)

    def is_decode(cache):
        return attn.mlagen._is_decode(attn.mlagen.decode, attn, metadata, cache, two, two)

    assert is_decode(ours.caches[0])
    for _ in range(2):
        assert not is_decode(change(ours.caches[0]))
    (line,) = said
    assert word in line
    assert not is_decode(ours.caches[0][:0])


def test_arguments_of_another_kind(build, toy, said):
    """Fewer slots than tokens, positions as MRoPE has them, and scales of heads."""
    attn = build(toy.Options()).attentions[0]
    said.clear()
    metadata = SimpleNamespace(num_actual_tokens=2, num_decode_tokens=2)

    def is_decode(slots, positions):
        slots, positions = (torch.zeros(shape, dtype=torch.int64) for shape in (slots, positions))
        return attn.mlagen._is_decode(attn.mlagen.decode, attn, metadata, attn.kv_cache, slots, positions)

    assert is_decode((5,), (5,)), "vLLM's may be longer"
    assert not is_decode((1,), (2,))
    assert not is_decode((2,), (3, 2))
    attn._q_scale = torch.ones(4)
    assert not is_decode((2,), (2,))
    assert "a slot mapping [1] for 2 tokens" in said[0]
    assert "positions [3, 2]" in said[1]
    assert "a scale for each head" in said[2]
