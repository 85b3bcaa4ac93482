"""The operators on a GPU, whose architecture need not be said."""

import pytest
import torch

import mlagen
from mlagen import ops
from mlagen.runtime import device_arch
from mlagen.spec import PrologueSpec

pytestmark = pytest.mark.gpu

OP = torch.ops.mlagen.decode_prologue.default
SPEC = PrologueSpec(heads=3, nope_dim=128, lora_rank=512, rope_dim=64, rope_style="gptj")
HEADS = 5


@pytest.fixture(scope="module")
def text():
    return ops.spec_to_str(SPEC)


def make(tokens, text):
    """The operator's tensors, and what the kernel makes of them: (tensors, q_out, kv_cache)."""
    kernel = mlagen.load(SPEC, "cuda")
    generator = torch.Generator("cuda").manual_seed(tokens)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    packed = torch.ops.mlagen.pack_weights(draw(3, 128, 512), spec=text)
    kv_cache = torch.zeros(10, 16, 576, dtype=torch.uint8, device="cuda")
    slots, positions = torch.randperm(160, device="cuda")[:tokens], torch.arange(tokens, device="cuda")
    scale = torch.full((), 0.03, device="cuda")
    tensors = [
        draw(tokens, 3, 192), None, draw(tokens, 512), draw(tokens, 64), packed, kv_cache, slots, positions, draw(512, 64), None,
        scale, scale,
    ]  # fmt: skip
    expected_cache = kv_cache.clone()
    expected = kernel(
        tensors[0], *tensors[2:5], expected_cache, slots, positions, tensors[8], q_scale=scale, k_scale=scale
    )  # fmt: skip
    return tensors, expected, expected_cache


def assert_same(tensors, q_out, expected, expected_cache):
    room = torch.zeros_like(q_out[:, SPEC.heads :].view(torch.uint8))
    assert torch.equal(q_out[:, : SPEC.heads].contiguous().view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(q_out[:, SPEC.heads :].contiguous().view(torch.uint8), room)
    assert torch.equal(tensors[5], expected_cache)


@pytest.mark.parametrize("tokens", [0, 1, 16, 65])
def test_the_operator_does_what_the_kernel_does(text, tokens):
    tensors, expected, expected_cache = make(tokens, text)
    q_out = OP(*tensors, spec=text, q_heads=HEADS)
    assert_same(tensors, q_out, expected, expected_cache)
    tensors[5].zero_()
    q_out = OP(*tensors, spec=text, arch=device_arch(torch.cuda.current_device()), q_heads=HEADS)
    assert_same(tensors, q_out, expected, expected_cache)


def test_opcheck(text):
    tensors, *_ = make(5, text)
    torch.library.opcheck(OP, tuple(tensors), {"spec": text, "q_heads": HEADS})


def test_capture_and_replay(text):
    tensors, expected, expected_cache = make(16, text)
    OP(*tensors, spec=text, q_heads=HEADS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q_out = OP(*tensors, spec=text, q_heads=HEADS)
    q_out.view(torch.uint8).fill_(0x55)
    tensors[5].zero_()
    graph.replay()
    assert_same(tensors, q_out, expected, expected_cache)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_with_a_dynamic_number_of_rows(text, mode):
    def run(q, *others):
        return OP(q * 1.0, *others, spec=text, q_heads=HEADS)

    run = torch.compile(run, fullgraph=True, dynamic=True, mode=mode)
    for tokens in (16, 65, 16, 2):
        tensors, expected, expected_cache = make(tokens, text)
        assert_same(tensors, run(*tensors), expected, expected_cache)
