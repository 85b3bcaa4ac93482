"""The plugin against stock vLLM: the same model, weights, caches and batches."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytestmark = [pytest.mark.vllm, pytest.mark.host]

DECODE = {"requests": ((1, 5), (1, 17), (1, 30)), "decodes": 3}
BATCHES = {
    "decode": DECODE,
    "one": {"requests": ((1, 9),), "decodes": 1},
    "padded": {**DECODE, "padding": 2},
    "speculative": {"requests": ((3, 5), (3, 14)), "decodes": 2},
}
OTHERS = {
    "prefill": {"requests": ((7, 0), (3, 4)), "decodes": 0},
    "mixed": {"requests": ((1, 5), (1, 17), (6, 2)), "decodes": 2},
    "mixed, padded": {"requests": ((1, 5), (6, 2)), "decodes": 1, "padding": 3},
    "profiling": {**DECODE, "metadata": False, "slots": False},
    "without slots": {**DECODE, "slots": False},
    "empty": {"requests": (), "decodes": 0, "padding": 2},
}
MODELS = {
    "fp8": {},
    "bf16 query": {"fp8_query": False},
    "bf16 cache": {"cache": "auto", "rope": "neox"},
    "fp16": {"dtype": torch.float16, "cache": "auto"},
    "fp16, fp8": {"dtype": torch.float16, "rope": "neox"},
    "NoPE": {"rope": "none", "q_lora": False},
    "gate": {"gate": True, "rope": "neox", "q_lora": False},
    "AITER, 12 heads": {"heads": 12, "aiter": True},
    "AITER, 12 heads, bf16": {"heads": 12, "aiter": True, "cache": "auto"},
    "AITER, 20 heads, bf16": {"heads": 20, "aiter": True, "cache": "auto"},
}


def run(model, batch):
    """The rows of a batch that mean something."""
    return model.run(batch)[: batch.tokens]


def check_decode(build, options, batch):
    """A decode of the plugin's model against stock: outputs, queries and cache.  Returns the plugin's model."""
    stock, ours, fp32_rope = build(options, plugin=False), build(options), build(replace(options, fp32_rope=True), plugin=False)
    before = ours.caches[0].clone()
    expected, found = run(stock, batch), run(ours, batch)
    assert len(build.decodes) == len(ours.queries) == len(stock.queries) == 2
    # Both layers round their outputs, and what is in between, to the model's dtype.
    few_roundings = 8 * torch.finfo(options.dtype).eps * expected.float().abs().max()
    assert (expected.float() - found.float()).abs().max() <= few_roundings
    # The second layer's entries come from outputs that the first one has rounded.
    assert not torch.equal(ours.caches[0], before), "the batch writes its entries"
    run(fp32_rope, batch)
    stock_differs, explained = (each.caches[0].view(torch.uint8) != ours.caches[0].view(torch.uint8) for each in (stock, fp32_rope))
    assert not explained.any(), "had stock's RoPE not rounded its steps to the model's dtype, its entries would be these"
    assert not stock_differs[..., : stock_differs.shape[-1] * 256 // 320].any(), "nothing rounds the latent columns in between"
    return ours


@pytest.mark.parametrize("name", BATCHES)
def test_decodes(build, toy, name, said):
    check_decode(build, toy.Options(), toy.Batch(**BATCHES[name]))
    assert [line for line in said if "is fused" in line]
    assert not [line for line in said if "keeps" in line]


@pytest.mark.parametrize("name", MODELS)
def test_models(build, toy, name, said):
    options = toy.Options(**MODELS[name])
    model = check_decode(build, options, toy.Batch(**BATCHES["padded"]))
    query = model.queries[0]
    joined = query if isinstance(query, torch.Tensor) else torch.cat(query, -1)
    assert joined.shape == (3, options.heads, 320)
    assert (joined.element_size() == 1) == (options.cache == "fp8" and options.fp8_query)
    assert not [line for line in said if "keeps" in line]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("model", ["fp8", "bf16 cache", "NoPE"])
def test_other_batches_are_stock_bit_for_bit(build, toy, model, name):
    options, batch = toy.Options(**MODELS[model]), toy.Batch(**OTHERS[name])
    stock, ours = build(options, plugin=False), build(options)
    assert torch.equal(run(stock, batch), run(ours, batch))
    for one, other in zip(stock.caches, ours.caches, strict=True):
        assert torch.equal(one, other)
    assert not build.decodes


def test_a_decode_after_a_prefill_reads_what_that_wrote(build, toy):
    """The paths take turns on one cache."""
    options = toy.Options()
    stock, ours = build(options, plugin=False), build(options)
    for batch in (toy.Batch(((7, 0), (3, 4)), 0), toy.Batch(((1, 7), (1, 7)), 2), toy.Batch(((1, 8), (5, 8)), 1)):
        expected, found = run(stock, batch), run(ours, batch)
        assert (expected.float() - found.float()).abs().max() <= 8 * 2**-7 * expected.float().abs().max()


def test_padding_beyond_a_batch_is_neither_read_nor_written(build, toy):
    ours = build(toy.Options())
    ours.run(toy.Batch(**BATCHES["padded"]))
    assert {query.shape[0] for query in ours.queries} == {3}


def test_aiter_gets_room_for_its_padding(build, toy):
    """Its forward_mqa pads by a view where the query's strides show the room, and by a copy elsewhere."""
    from vllm.v1.attention.backends.mla.rocm_aiter_mla import AiterMLAHelper

    ours = build(toy.Options(heads=12, aiter=True))
    ours.run(toy.Batch(**DECODE))
    padded = AiterMLAHelper.get_mla_padded_q(12, ours.queries[0])
    assert padded.shape[1] == 16
    assert padded.data_ptr() == ours.queries[0].data_ptr()
    few = build(toy.Options(heads=4, aiter=True))  # here it repeats each head, room or not
    few.run(toy.Batch(**DECODE))
    assert few.queries[0].is_contiguous()


def test_few_heads_of_aiter_in_16_bits_are_a_pair(build, toy):
    """As stock hands them over: they may go to AITER's Gluon kernels."""
    ours = build(toy.Options(heads=12, aiter=True, cache="auto"))
    ours.run(toy.Batch(**DECODE))
    assert [each.shape[-1] for each in ours.queries[0]] == [256, 64]


def test_a_table_in_fp32(build, toy):
    """vLLM keeps it so for some models; its RoPE then returns fp32."""
    options = toy.Options(fp32_table=True)
    stock, ours = (build(options, plugin=plugin) for plugin in (False, True))
    batch = toy.Batch(**DECODE)
    expected, found = run(stock, batch), run(ours, batch)
    assert ours.attentions[0].mlagen.rotary.cos_sin_cache.dtype is torch.float32
    assert torch.equal(stock.caches[0], ours.caches[0])
    assert (expected.float() - found.float()).abs().max() <= 8 * 2**-7 * expected.float().abs().max()


def test_weights_that_are_loaded_again_are_packed_again(build, toy):
    """Into the same memory, which captured graphs read."""
    ours = build(toy.Options())
    for each in ours.attentions:
        decode = each.mlagen.decode
        before, where = decode.packed.clone(), decode.packed.data_ptr()
        each.kv_b_proj.weight.neg_()
        each.process_weights_after_loading(torch.bfloat16)
        assert each.mlagen.decode is decode
        assert decode.packed.data_ptr() == where
        assert torch.equal(decode.packed, -before)


def test_a_clamp_where_vllm_has_it(build, toy):
    """vLLM's static quantiser ends at 224 on e4m3fnuz, whose limit is 240, and at 448 on e4m3fn."""
    from vllm.platforms import current_platform

    stock, ours = (build(toy.Options(), plugin=plugin) for plugin in (False, True))
    for model in (stock, ours):
        for each in model.attentions:
            each._q_scale.fill_(1e-4)
        model.run(toy.Batch(**DECODE))
    largest = {each.queries[0].float().abs().max().item() for each in (stock, ours)}
    assert largest == {224.0 if current_platform.is_fp8_fnuz() else 448.0}


def test_entries_saturate_where_vllms_do(build, toy):
    """At the format's limit, where no fp8 query beside them ends earlier."""
    stock, ours = (build(toy.Options(fp8_query=False), plugin=plugin) for plugin in (False, True))
    for model in (stock, ours):
        for each in model.attentions:
            each._k_scale.fill_(1e-4)
        model.run(toy.Batch(**DECODE))
    latent = [model.caches[0][..., : toy.L] for model in (stock, ours)]
    assert torch.equal(*latent)


@pytest.mark.parametrize("backend", ["ROCM_AITER_MLA", "TRITON_MLA"])
@pytest.mark.parametrize("cache", ["fp8", "auto", "bfloat16"])
@pytest.mark.parametrize("tp", [8, 16])
@pytest.mark.parametrize("weight", [None, "fp8", "mxfp4"])
def test_a_layer_asks_for_a_kernel_that_was_built_beforehand(build, toy, backend, cache, tp, weight):
    """Or else a deployment without a compiler would not find it.  Where the command names everything, it is the only one."""
    from mlagen.integrations.vllm.choice import choose
    from mlagen.integrations.vllm.deployment import deployment_requests
    from mlagen.integrations.vllm.prologue import _target

    model, target = build(toy.Options()), _target(torch.device("cpu"))
    if weight == "mxfp4" and target.arch == "gfx942":
        pytest.skip("vLLM has AITER's fp4 products on gfx950")
    sizes = {"num_heads": 128 // tp, "qk_nope_head_dim": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    takes_fp8 = SimpleNamespace(supports_quant_query_input=backend == "ROCM_AITER_MLA")
    attn = SimpleNamespace(**sizes, kv_cache_dtype=cache, impl=takes_fp8, attn_backend=SimpleNamespace(get_name=lambda: backend))
    wrapper = SimpleNamespace(mla_attn=attn, rotary_emb=model.module.layers[0].rotary_emb)
    asked = choose(wrapper, torch.bfloat16, weight, target).spec
    switch = {None: "", "fp8": "VLLM_ROCM_USE_AITER_FP8BMM=1 ", "mxfp4": "VLLM_ROCM_USE_AITER_FP4BMM=1 "}[weight]
    command = f"VLLM_ROCM_USE_AITER=1 {switch}vllm serve deepseek-ai/DeepSeek-R1 -tp {tp}"
    assert asked in [each.spec for each in deployment_requests(command, [target])]
    named = deployment_requests(f"{command} --kv-cache-dtype {cache} --attention-backend {backend}", [target])
    of_weight = [each.spec for each in named if each.spec.weight == asked.weight and each.spec.kv_dtype == asked.kv_dtype]
    assert of_weight == [asked]
