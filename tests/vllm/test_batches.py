"""Batches and tensors as vLLM really hands them over: padded by graphs, strided, longer than the batch, of several models."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = [pytest.mark.vllm, pytest.mark.host]

DECODE = ((1, 5), (1, 17), (1, 30))
OTHERS = {
    "prefill": {"requests": ((7, 0), (3, 4)), "decodes": 0},
    "mixed": {"requests": ((1, 5), (1, 17), (6, 2)), "decodes": 2},
    "profiling": {"requests": DECODE, "decodes": 3, "metadata": False, "slots": False},
}


def close(one, other):
    """Within the roundings of two layers to the model's dtype."""
    return (one.float() - other.float()).abs().max() <= 8 * torch.finfo(one.dtype).eps * one.float().abs().max()


@pytest.mark.parametrize("cache", ["fp8", "auto"])
def test_a_full_graphs_padding_counts_as_decodes(build, toy, cache):
    """Its requests have a token each, but no slot: the query's rows are made, and nothing is written to the cache."""
    options = toy.Options(cache=cache)
    stock, ours = build(options, plugin=False), build(options)
    batch = toy.Batch((*DECODE, (1, 0), (1, 3)), 5, idle=2)
    before = ours.caches[0].clone()
    expected, found = stock.run(batch), ours.run(batch)
    assert {query.shape[0] for query in ours.queries} == {5}
    assert len(build.decodes) == 2
    assert close(expected, found)
    assert torch.equal(stock.caches[0][..., : toy.L], ours.caches[0][..., : toy.L]), "nothing rounds the latent columns in between"
    assert (ours.caches[0] != before).any(-1).sum() == len(DECODE), "an entry for each request that somebody made"


def test_rows_beyond_the_batch_are_left_alone(build, toy):
    """The operator gets what graphs are padded to; slots may be more than rows, too, and k_pe is a view of a projection."""
    from vllm.forward_context import set_forward_context

    ours = build(toy.Options())
    attn, batch = ours.attentions[0], toy.Batch(DECODE, 3)
    ours.run(batch)
    rows, tokens = 6, 3
    torch.manual_seed(1)
    q = torch.randn(rows, 4, toy.P + toy.R).bfloat16()
    qkv = torch.randn(rows, toy.QL + toy.L + toy.R).bfloat16()
    k_pe, kv_c = qkv[:, None, -toy.R :], torch.randn(rows, toy.L).bfloat16()
    slots = torch.tensor([3, -1, 40, 7, 8, 9, 10, 11])
    metadata, positions = toy._metadata(batch, torch.arange(16)), torch.arange(rows)
    inputs = [each.clone() for each in (q, qkv, kv_c, positions, slots)]
    cache = attn.kv_cache.clone()
    output = torch.full((rows, 4 * toy.V), 7.0).bfloat16()
    names = {attn.layer_name: metadata}, {attn.layer_name: slots}
    with set_forward_context(names[0], ours.config, num_tokens=rows, slot_mapping=names[1]), torch.inference_mode():
        torch.ops.vllm.mlagen_mla_attention(q, kv_c, k_pe, positions, output, attn.layer_name)
    assert all(torch.equal(*each) for each in zip((q, qkv, kv_c, positions, slots), inputs, strict=True))
    assert (output[tokens:] == 7).all()
    assert not (output[:tokens] == 7).any()
    changed = (attn.kv_cache != cache).any(-1).flatten().nonzero().flatten().tolist()
    assert changed == [3, 40]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("q_lora", [True, False])
def test_a_rotation_in_place(build, toy, name, q_lora):
    """As vLLM's kernels do it, on q and on the projection that k_pe is a view of."""
    options, batch = toy.Options(in_place_rope=True, q_lora=q_lora), toy.Batch(**OTHERS[name])
    stock, ours = build(options, plugin=False), build(options)
    assert "+rotary_embedding" in stock.config.compilation_config.custom_ops
    assert torch.equal(stock.run(batch), ours.run(batch))
    for one, other in zip(stock.caches, ours.caches, strict=True):
        assert torch.equal(one, other)
    assert not build.decodes


@pytest.mark.parametrize("heads", [5, 12, 16, 20, 96])
@pytest.mark.parametrize("cache", ["fp8", "auto"])
def test_heads_as_aiter_takes_them(build, toy, heads, cache):
    """What AITER's kernels read is what stock hands them, whichever way the heads are padded."""
    from vllm.v1.attention.backends.mla.rocm_aiter_mla import AiterMLAHelper

    options, batch = toy.Options(heads=heads, aiter=True, cache=cache), toy.Batch(DECODE, 3)
    stock, ours = build(options, plugin=False), build(options)
    assert close(stock.run(batch), ours.run(batch))
    pair = cache == "auto" and heads < 16
    assert isinstance(ours.queries[0], tuple) == pair
    of_stock, of_ours = (torch.cat(each, -1) if isinstance(each, tuple) else each for each in (stock.queries[0], ours.queries[0]))
    wanted, found = (AiterMLAHelper.get_mla_padded_q(heads, each)[:, :heads].float() for each in (of_stock, of_ours))
    assert wanted.shape == found.shape
    step = 2**-3 if cache == "fp8" else 2**-6
    usual = wanted.square().mean().sqrt()  # what comes of two such numbers may be small, and has their rounding
    assert ((wanted - found).abs() <= step * wanted.abs().clamp(min=2 * usual)).all()


def test_a_cache_type_for_each_layer(build, toy):
    """kv_cache_dtype_skip_layers: the second layer's cache is in the model's dtype."""
    options, batch = toy.Options(skipped=("1",)), toy.Batch(DECODE, 3, padding=1)
    stock, ours = build(options, plugin=False), build(options)
    assert [each.dtype for each in ours.caches] == [torch.uint8, torch.bfloat16]
    assert close(stock.run(batch)[:3], ours.run(batch)[:3])
    assert [each.element_size() for each in ours.queries] == [1, 2]
    assert len(build.decodes) == 2


def test_two_models_in_one_process(build, toy):
    """A draft model beside its target: other heads, another rotation, and turns."""
    two = [toy.Options(), toy.Options(heads=12, rope="neox", q_lora=False)]
    stock, ours = ([build(options, plugin=plugin) for options in two] for plugin in (False, True))
    for batch in (toy.Batch(((3, 5), (3, 14)), 2), toy.Batch(DECODE, 3), toy.Batch(((4, 3),), 0)):
        for one, other in zip(stock, ours, strict=True):
            assert close(one.run(batch), other.run(batch))
    assert len(build.decodes) == 2 * 2 * 2


def test_the_table_that_vllm_replaces(build, toy):
    """It moves a table in fp32 to the query's dtype when the rotation first runs: the kernel takes what is there then."""
    options = toy.Options(rope="neox", fp32_table=True)
    stock, ours = build(options, plugin=False), build(options)
    rotary = ours.attentions[0].mlagen.rotary
    batch = toy.Batch(DECODE, 3)
    for dtype in (torch.float32, torch.bfloat16):
        rotary.cos_sin_cache = rotary.cos_sin_cache.to(dtype)
        assert close(stock.run(batch), ours.run(batch))


def test_weights_are_loaded_again_as_vllm_does_it(build, toy):
    """vLLM replaces a layer's tensors by others while it loads, puts the first ones back, and processes them once more."""
    from vllm.model_executor.model_loader.reload import layerwise

    options, batch = toy.Options(), toy.Batch(DECODE, 3)
    stock, ours = build(options, plugin=False), build(options)
    for model in (stock, ours):
        for attn in model.attentions:
            attn.kv_b_proj.weight.mul_(-0.5)
            info = layerwise.get_layerwise_info(attn)
            info.kernel_tensors = layerwise.get_layer_params_buffers(attn)
            layerwise._finalize_attention_layer(attn, info, SimpleNamespace(dtype=torch.bfloat16))
    assert close(stock.run(batch), ours.run(batch))
    assert len(build.decodes) == 2


def test_weights_that_a_trainer_loads(build, toy):
    """A model's load_weights puts them where they are, and nobody processes the layer: stock decodes with a view of kv_b_proj."""
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    options, batch = toy.Options(), toy.Batch(DECODE, 3)
    stock, ours = build(options, plugin=False), build(options)
    where = [each.mlagen.decode.packed.data_ptr() for each in ours.attentions]
    for model in (stock, ours):
        for attn in model.attentions:
            weight = attn.kv_b_proj.weight
            getattr(weight, "weight_loader", default_weight_loader)(weight, -0.5 * weight.data)
    assert close(stock.run(batch), ours.run(batch))
    assert len(build.decodes) == 2
    assert where == [each.mlagen.decode.packed.data_ptr() for each in ours.attentions], "captured graphs read them there"


def test_weights_that_cannot_be_packed_again(build, toy, monkeypatch):
    """Are an error: captured graphs would go on with the old ones."""
    from mlagen.errors import ArgumentError

    def pack_weights(*arguments):
        raise ArgumentError("scale: some scales are not finite")

    ours = build(toy.Options())
    (attn, _) = ours.attentions
    monkeypatch.setattr(attn.mlagen.decode.kernel, "pack_weights", pack_weights)
    with pytest.raises(ArgumentError, match="not finite"):
        attn.process_weights_after_loading(torch.bfloat16)


@pytest.mark.parametrize("rope", [{"rope": "gptj"}, {"rope": "neox", "fp32_table": True}, {"rope": "none"}])
def test_a_query_scaled_by_position(build, toy, rope):
    """Llama 4's scaling, as Mistral-Large-3 has it: of the rotated query in vLLM, of the query before the kernel here."""
    options, batch = toy.Options(scaling=True, **rope), toy.Batch(DECODE, 3, padding=2)
    stock, ours, unscaled = build(options, plugin=False), build(options), build(toy.Options(**rope))
    assert close(stock.run(batch)[:3], ours.run(batch)[:3])
    unscaled.run(batch)
    ratio = ours.queries[0].float().norm(dim=(1, 2)) / unscaled.queries[0].float().norm(dim=(1, 2))
    wanted = 1 + 0.5 * torch.log(1 + torch.tensor([0.0, 2, 3]))
    assert torch.allclose(ratio, wanted, rtol=0.05)
    for name in OTHERS:
        other = toy.Batch(**OTHERS[name])
        assert torch.equal(stock.run(other), ours.run(other))
    assert len(build.decodes) == 2 * 2
