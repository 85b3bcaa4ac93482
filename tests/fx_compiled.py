"""Layers compiled with the passes, and what is asked of them."""

import fx_models
import torch
import torch._inductor.config
from fx_models import H, L, R
from torch._dynamo.testing import CompileCounterWithBackend

from mlagen.fx import FusionConfig, ProloguePasses

ARCH = "gfx950"
LIMIT = 64
CONFIG = FusionConfig(enabled=True, arch=ARCH, max_num_seqs=LIMIT // 2, num_speculative_tokens=1, division_as_product=True)


class Seen(ProloguePasses):
    """The passes, and the graphs before and after them."""

    def __init__(self, config, earlier=None):
        super().__init__(config, earlier)
        self.graphs = []

    def __call__(self, graph):
        before = str(graph)
        identity = list(graph.nodes)
        super().__call__(graph)
        self.graphs.append((before, str(graph), identity == list(graph.nodes)))
        for node in graph.nodes:
            assert not node.users or "val" in node.meta, node.format_node()
            is_number = node.op == "call_function" and isinstance(node.meta.get("val"), int)
            assert not is_number, f"{node.format_node()}: torch 2.11 takes no operator that gives a plain number"

    def uuid(self):
        return None


def calls(text, name):
    """How often a printed graph calls an operator, alone or made functional."""
    return text.count(f"target=torch.ops.{name}") + text.count(f"auto_functionalized_v2](args = ({name}.")


def products(text):
    return calls(text, "aten.bmm.") + calls(text, "aten.baddbmm.")


def compiled(layer, config=CONFIG, **options):
    seen, counter = Seen(config), CompileCounterWithBackend("inductor")
    function = torch.compile(layer, backend=counter, fullgraph=True, **options)

    def run(*inputs):
        with torch._inductor.config.patch(post_grad_custom_post_pass=seen):
            return function(*inputs)

    return run, seen, counter


def marked(tokens, *, low=2, high=LIMIT):
    inputs = fx_models.batch(tokens)
    for each in inputs:
        if tokens > 1:
            torch._dynamo.mark_dynamic(each, 0, min=low, max=high)
    return inputs


def assert_in_place(layer):
    """The compiled layer writes its cache where it is, and makes none."""
    run, _, _ = compiled(layer)
    inputs, cache = marked(16), fx_models.new_cache(layer)
    _, (code,) = torch._inductor.utils.run_and_get_code(run, inputs[0], cache, *inputs[1:])
    assert "torch.ops.mlagen.decode_prologue_weights.default(" in code
    made = [line for line in code.splitlines() if "empty_strided" in line]
    assert made
    assert not any(f"(({fx_models.BLOCKS}, {fx_models.BLOCK_SIZE}, {L + R})" in line for line in made), "a copy of the cache"


def assert_as_eager(layer, inputs, result, cache, before=None):
    """Codes may be one step of the format apart, where roundings of the model's dtype in between went the other way."""
    expected_cache = fx_models.new_cache(layer) if before is None else before.clone()
    expected = layer(inputs[0], expected_cache, *inputs[1:])
    assert result[1].shape == (len(inputs[0]), H, L + R)
    assert_close(layer, result[1], expected[1])
    assert_close(layer, cache, expected_cache)
    assert torch.allclose(result[0].float(), expected[0].float(), rtol=2**-6, atol=2**-5)


def assert_close(layer, found, expected):
    found, expected = (each.view(layer.fp8) if layer.fp8 and each.dtype is torch.uint8 else each for each in (found, expected))
    found, expected = found.float(), expected.float()
    step = 2**-3 if layer.fp8 else 2**-6
    assert torch.allclose(found, expected, rtol=step, atol=2**-7 * expected.abs().max().item())
    differing = (found != expected).float().mean()
    assert differing < (0.05 if layer.fp8 else 0.5), "rounding moves few codes"
