"""Kimi-K3's own wrapper, a subclass with another forward, in a module that is imported after the plugin."""

import pytest
import torch

pytestmark = [pytest.mark.vllm, pytest.mark.host]


@pytest.fixture
def wrapper(build):
    return pytest.importorskip("vllm.models.kimi_k3.amd.mla").KimiK3MultiHeadLatentAttentionWrapper


@pytest.mark.parametrize("cache", ["fp8", "auto"])
def test_it_decodes_through_mlagen(build, toy, wrapper, cache):
    options = toy.Options(wrapper=wrapper, rope="none", heads=12, cache=cache, gate=True)
    stock, ours = build(options, plugin=False), build(options)
    assert [type(each.module.layers[0]).__name__ for each in (stock, ours)] == [wrapper.__name__, f"Mlagen{wrapper.__name__}"]
    for batch in (toy.Batch(((1, 5), (1, 17)), 2, padding=1), toy.Batch(((3, 6), (3, 18)), 2)):
        expected, found = stock.run(batch)[: batch.tokens], ours.run(batch)[: batch.tokens]
        assert (expected.float() - found.float()).abs().max() <= 8 * 2**-7 * expected.float().abs().max()
        assert torch.equal(stock.caches[0], ours.caches[0]), "without RoPE nothing is rounded in between"
    assert ours.attentions[0].mlagen.decode.kernel.spec.rope_style == "none"


def test_other_batches_are_stock_bit_for_bit(build, toy, wrapper):
    options = toy.Options(wrapper=wrapper, rope="none", heads=12)
    stock, ours = build(options, plugin=False), build(options)
    for batch in (toy.Batch(((5, 0), (3, 4)), 0), toy.Batch(((1, 5), (6, 2)), 1)):
        assert torch.equal(stock.run(batch), ours.run(batch))
        for one, other in zip(stock.caches, ours.caches, strict=True):
            assert torch.equal(one, other)


def test_it_takes_the_place_of_vllms_fused_decode(build, toy, wrapper):
    """Which is AITER's, and looks at the batch in the wrapper's forward: there it would come before our operator."""
    ours = build(toy.Options(wrapper=wrapper, rope="none", heads=12))
    for each in ours.module.layers:
        each._fused_qk_prep = True  # as on a machine with AITER
    ours.run(toy.Batch(((1, 5), (1, 17)), 2))
    assert len(build.decodes) == len(ours.queries) == 2
