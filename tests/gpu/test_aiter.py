"""The drop-in for AITER's fused_qk_rope_concat_and_cache_mla on a GPU, at once and in a graph."""

import pytest
import torch
from aiter_calls import LATENT, NONE_WRITTEN, ROTARY, Call, make_call, segmented, wrong

from mlagen.integrations.aiter import fused_qk_rope_concat_and_cache_mla, fused_qk_rope_concat_and_cache_mla_seg
from mlagen.runtime import device_arch

pytestmark = pytest.mark.gpu


def on(call: Call, device: str) -> Call:
    return {name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in call.items()}


@pytest.mark.parametrize("is_nope_first", [True, False])
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(("q", "kv"), [("fp8", "fp8"), ("model", "fp8"), ("model", "model"), ("fp8", "bytes")])
def test_the_oracle_explains_it(is_nope_first, is_neox, q, kv):
    arch = device_arch(0)
    call = on(make_call(arch=arch, q=q, kv=kv, is_nope_first=is_nope_first, is_neox=is_neox), "cuda")
    assert fused_qk_rope_concat_and_cache_mla(**call) is None
    torch.cuda.synchronize()
    assert not wrong(on(call, "cpu"), arch)


@pytest.mark.parametrize("is_nope_first", [True, False])
def test_a_captured_call_reads_what_its_inputs_hold_at_replay(is_nope_first):
    arch = device_arch(0)
    captured, fresh = (on(make_call(seed, arch=arch, is_nope_first=is_nope_first), "cuda") for seed in (1, 2))
    fused_qk_rope_concat_and_cache_mla(**captured)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_qk_rope_concat_and_cache_mla(**captured)
    for name, each in captured.items():
        if name in ("q_out", "kv_cache"):
            each.view(torch.uint8).fill_(NONE_WRITTEN)
        elif isinstance(each, torch.Tensor):
            each.copy_(fresh[name])
    graph.replay()
    torch.cuda.synchronize()
    assert not wrong(on(captured, "cpu"), arch)


@pytest.mark.parametrize("is_nope_first", [True, False])
def test_several_kv_heads_are_each_what_it_is_alone(is_nope_first):
    arch, heads = device_arch(0), 3
    call = on(make_call(arch=arch, is_nope_first=is_nope_first), "cuda")
    cache, factors = call["kv_cache"], torch.arange(1, heads + 1, device="cuda")[:, None].bfloat16()
    several = {**call, **{name: call[name][:, None] * factors for name in ("kv_c", "k_pe")}, "q_out": call["q_out"].clone()}
    several["kv_cache"] = cache.view(torch.uint8).unsqueeze(2).repeat(1, 1, heads, 1).view(cache.dtype)
    fused_qk_rope_concat_and_cache_mla(**several)
    for head in range(heads):
        alone = {**call, "kv_cache": cache.view(torch.uint8).clone().view(cache.dtype)}
        alone |= {name: several[name][:, head] for name in ("kv_c", "k_pe")}
        fused_qk_rope_concat_and_cache_mla(**alone)
        torch.cuda.synchronize()
        assert not wrong(on(alone, "cpu"), arch)
        assert torch.equal(several["kv_cache"].view(torch.uint8)[:, :, head], alone["kv_cache"].view(torch.uint8))
        assert torch.equal(several["q_out"].view(torch.uint8), alone["q_out"].view(torch.uint8))


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(("q", "kv"), [("fp8", "fp8"), ("model", "model")])
def test_segmented_pages_are_those_of_the_cpu(is_neox, q, kv):
    arch = device_arch(0)
    plain = make_call(arch=arch, q=q, kv=kv, is_neox=is_neox)
    ours, paged = on(segmented(plain), "cuda"), on(plain, "cuda")
    fused_qk_rope_concat_and_cache_mla_seg(**ours)
    fused_qk_rope_concat_and_cache_mla(**paged)
    torch.cuda.synchronize()
    entry = LATENT + ROTARY
    assert torch.equal(ours["q_out"][..., :entry].cpu().view(torch.uint8), paged["q_out"].cpu().view(torch.uint8))
    assert (ours["q_out"].cpu().view(torch.uint8)[..., -3:] == NONE_WRITTEN).all()
    cache = paged["kv_cache"].cpu()
    pages = torch.cat((cache[..., :LATENT].flatten(1).view(torch.uint8), cache[..., LATENT:].flatten(1).view(torch.uint8)), 1)
    assert torch.equal(ours["kv_cache"].cpu().view(torch.uint8), pages)
