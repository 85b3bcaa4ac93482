"""The drop-in for AITER's fused_fp8_bmm_rope_cat_and_cache_mla on a GPU: its arithmetic, and W_K in and around graphs."""

from typing import Any

import pytest
import torch
from aiter_triton_model import Call, differences, gpu, model
from fp8_bmm_calls import call_of, named

from mlagen.errors import ArgumentError
from mlagen.integrations.aiter import fused_fp8_bmm_rope_cat_and_cache_mla
from mlagen.runtime import device_arch

pytestmark = pytest.mark.gpu

LARGE = {"heads": (16, 1), "nope": 128, "latent": 512, "rotary": 64, "zeros": 1}


def call_here(seed: int = 0, **row: Any) -> Call:
    """A call of a model's sizes on the GPU."""
    call = call_of(seed, arch=device_arch(0), **{**LARGE, **row})
    return {name: each.cuda() if isinstance(each, torch.Tensor) else each for name, each in call.items()}


def wrong(call: Call, returned: tuple[torch.Tensor, ...]) -> dict[str, int]:
    """What AITER's arithmetic does not explain."""
    torch.cuda.synchronize()
    on_cpu = {name: each.cpu() if isinstance(each, torch.Tensor) else each for name, each in call.items()}
    results = named(on_cpu, tuple(each.cpu() for each in returned))
    return differences(on_cpu, results, model(on_cpu, gpu(device_arch(0))))


@pytest.mark.parametrize("tokens", [1, 5, 20])
@pytest.mark.parametrize(
    "row",
    [
        {},
        {"neox": False, "query": "fp8", "table": "full"},
        {"cache": "model", "scale": False, "table": "fp32", "slots": torch.int32},
        {"nope": 192, "prefill": 2},
        {"heads": (4, 2), "prefill": 2, "dtype": torch.float16},
    ],
    ids=["plain", "fp8 query", "model cache", "192 columns", "two KV heads"],
)
def test_aiters_arithmetic_explains_every_element(row, tokens):
    call = call_here(tokens=tokens, **row)
    assert not wrong(call, fused_fp8_bmm_rope_cat_and_cache_mla(**call))


def test_a_captured_call_reads_what_its_inputs_hold_at_replay():
    """Weights changed in place too, once a call has packed them again."""
    captured, fresh = call_here(1), call_here(2)
    fused_fp8_bmm_rope_cat_and_cache_mla(**captured)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = fused_fp8_bmm_rope_cat_and_cache_mla(**captured)
    for name, each in captured.items():
        if isinstance(each, torch.Tensor) and name != "kv_cache":
            each.copy_(fresh[name])
    fused_fp8_bmm_rope_cat_and_cache_mla(**captured)
    captured["kv_cache"].zero_()
    graph.replay()
    assert not wrong(captured, returned)


def test_new_weights_in_a_capture_are_refused():
    call = call_here(3)
    fused_fp8_bmm_rope_cat_and_cache_mla(**call)
    other = {**call, "w_k": call["w_k"].clone()}
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        call["w_k_scale"].clone()  # so that something is captured
        with pytest.raises(ArgumentError, match=r"^w_k: new or changed"):
            fused_fp8_bmm_rope_cat_and_cache_mla(**other)
