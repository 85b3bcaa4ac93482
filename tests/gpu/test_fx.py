"""The passes on a GPU: fused, right, captured and replayed."""

import fx_models
import pytest
import torch
import torch._inductor.config
from fx_compiled import LIMIT, Seen, assert_as_eager, calls, compiled

from mlagen.fx import FusionConfig, repack

pytestmark = pytest.mark.gpu

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _start_over():
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        yield


def on_gpu(name, tokens):
    torch.set_float32_matmul_precision("highest")
    layer = fx_models.SPELLINGS[name](fp8=None if name == "Baddbmm" else FP8).cuda()
    return layer, [each.cuda() for each in fx_models.batch(tokens)]


CONFIG = FusionConfig(enabled=True, max_num_seqs=LIMIT, division_as_product=True)


@pytest.mark.parametrize("name", fx_models.SPELLINGS)
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_every_spelling(name, mode):
    layer, inputs = on_gpu(name, 16)
    seen, function = Seen(CONFIG), torch.compile(layer, fullgraph=True, mode=mode)

    def run(*inputs):
        with torch._inductor.config.patch(post_grad_custom_post_pass=seen):
            return function(*inputs)

    cache = fx_models.new_cache(layer).cuda()
    torch._dynamo.mark_static_address(cache)  # a graph may then write it
    for _ in range(4):  # warm-up, capture, replay
        cache.zero_()
        result = run(inputs[0], cache, *inputs[1:])
        assert_as_eager(layer, inputs, result, cache, torch.zeros_like(cache))
    assert calls(seen.graphs[0][1], "mlagen.decode_prologue_weights") == 1


def test_a_captured_graph_follows_new_weights():
    layer, inputs = on_gpu("Einsum", 16)
    run, _, _ = compiled(layer, CONFIG)
    cache = fx_models.new_cache(layer).cuda()
    run(inputs[0], cache, *inputs[1:])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(inputs[0], cache, *inputs[1:])
    layer.w_uk.mul_(-0.5)
    repack()
    cache.zero_()
    graph.replay()
    assert_as_eager(layer, inputs, result, cache, torch.zeros_like(cache))
