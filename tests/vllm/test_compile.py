"""The plugin in models that vLLM compiles: whole, split at its attention operators, and split where a user says."""

import inspect

import pytest
import torch

pytestmark = [pytest.mark.vllm, pytest.mark.host, pytest.mark.slow]

STOCK = "vllm::unified_mla_attention_with_output"
OURS = "vllm::mlagen_mla_attention"
SPLITS = {
    "vLLM's own": {},
    "by Inductor": {"use_inductor_graph_partition": True},
    "whole": {"splitting_ops": []},
    "a user's": {"splitting_ops": [STOCK]},
}


@pytest.fixture
def compiled(toy, build):
    from vllm.config.compilation import CompilationMode, PassConfig

    def model(split, *, plugin):
        # Off, since its kernel is one of those that are not here: vLLM's own fusion of RoPE and the cache write, which it has where
        # both are left in one graph.
        config = {"pass_config": PassConfig(fuse_rope_kvcache_cat_mla=False), **split}
        return build(toy.Options(mode=CompilationMode.VLLM_COMPILE, config=config), plugin=plugin)

    return model


@pytest.mark.parametrize("name", SPLITS)
def test_batches_of_each_kind(compiled, build, toy, name):
    """One compiled graph serves them all, and prefills are stock's bit for bit."""
    stock, ours = (compiled(SPLITS[name], plugin=plugin) for plugin in (False, True))
    for batch in (
        toy.Batch(((7, 0), (3, 4)), 0, metadata=False, slots=False),
        toy.Batch(((7, 0), (3, 4)), 0),
        toy.Batch(((1, 20), (1, 6), (4, 2)), 2),
    ):
        expected, found = stock.run(batch)[: batch.tokens], ours.run(batch)[: batch.tokens]
        assert torch.equal(expected, found)
        for one, other in zip(stock.caches, ours.caches, strict=True):
            assert torch.equal(one, other)
    assert not build.decodes
    batch = toy.Batch(((1, 7), (1, 7), (1, 30)), 3, padding=2)
    expected, found = stock.run(batch)[:3], ours.run(batch)[:3]
    assert (expected.float() - found.float()).abs().max() <= 8 * 2**-7 * expected.float().abs().max()
    assert len(build.decodes) == 2
    differ = (stock.caches[0] != ours.caches[0]).sum(-1)
    assert differ.max() <= 1, "Inductor's RoPE keeps fp32 to its end, and rounds once more than ours"


def test_a_graph_is_split_at_our_operator(compiled):
    assert OURS in compiled({}, plugin=True).config.compilation_config.splitting_ops


def test_a_users_list_still_reads_as_one_with_attention(build):
    """vLLM asks for each of its attention operators, ours now among them, and drops piecewise graphs where one is missing."""
    from vllm.config import CompilationConfig, VllmConfig
    from vllm.config.compilation import CompilationMode

    def config(splitting_ops):
        return VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.VLLM_COMPILE, splitting_ops=splitting_ops))

    everything = [each for each in CompilationConfig._attention_ops if each != OURS]
    found = config(everything).compilation_config
    assert found.splitting_ops == [*everything, OURS]
    assert found.splitting_ops_contain_attention()
    without = config(["vllm::mamba_mixer"]).compilation_config
    assert without.splitting_ops == ["vllm::mamba_mixer"]
    assert not without.splitting_ops_contain_attention()


def test_compiled_graphs_have_names_of_their_own(build, monkeypatch):
    """vLLM finds them on disk by a hash.  Those of a stock vLLM, and of another route, call other operators.

    Where one model's configuration has set the variable for its processes, the next model in them is stock's: without the variable
    in the hash it would be given the graph that MLAGEN_VLLM=1 made, whose operator has no kernel in its layers.
    """
    from vllm.config import VllmConfig

    from mlagen.integrations.vllm import graph_route

    monkeypatch.setattr(graph_route, "add_pass", lambda: None)  # which would stay for the tests behind this one

    def named(variable, additional=None):
        monkeypatch.setenv("MLAGEN_VLLM", variable)
        return VllmConfig(additional_config=additional or {}).compute_hash()

    off, layer, graph = (named(each) for each in ("config", "1", "graph"))
    assert named("yes") == off
    assert len({off, layer, graph}) == 3
    asked = [named("config", {"mlagen": each}) for each in (True, "graph", False)]
    assert len({*asked, off, layer, graph}) == 6
    monkeypatch.setattr(VllmConfig, "compute_hash", inspect.unwrap(VllmConfig.compute_hash))
    assert named("1") == named("graph") not in (off, layer, graph)


def test_a_query_scaled_by_position(toy, build):
    """Llama 4's scaling, which comes between the rotation and attention, in a compiled graph."""
    from vllm.config.compilation import CompilationMode, PassConfig

    config = {"pass_config": PassConfig(fuse_rope_kvcache_cat_mla=False)}
    options = toy.Options(mode=CompilationMode.VLLM_COMPILE, config=config, scaling=True)
    stock, ours = build(options, plugin=False), build(options)
    for batch in (toy.Batch(((7, 0), (3, 14)), 0), toy.Batch(((1, 20), (1, 6), (4, 12)), 2)):
        assert torch.equal(stock.run(batch), ours.run(batch))
    batch = toy.Batch(((1, 7), (1, 17), (1, 30)), 3, padding=2)
    expected, found = stock.run(batch)[:3], ours.run(batch)[:3]
    assert (expected.float() - found.float()).abs().max() <= 8 * 2**-7 * expected.float().abs().max()
    assert len(build.decodes) == 2
