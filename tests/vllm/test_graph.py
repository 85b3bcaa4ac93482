"""MLAGEN_VLLM=graph: vLLM's graphs, compiled by its real backend and passes, with mlagen's operator in them where a decode may be."""

import functools
from types import SimpleNamespace

import pytest
import torch

pytestmark = [pytest.mark.vllm, pytest.mark.host, pytest.mark.slow]

STOCK = "vllm.unified_mla_attention_with_output"
UPDATE = "vllm.unified_mla_kv_cache_update"
OURS = "vllm.mlagen_mla_attention"
MAX_SEQS = 16
WHOLE, PARTITION = {"splitting_ops": []}, {"use_inductor_graph_partition": True}
MODELS = {
    "whole, gptj": ("gptj", WHOLE),
    "partition, neox": ("neox", PARTITION),
    "whole, NoPE": ("none", WHOLE),
    "partition, RoPE as an operator": ("neox", {**PARTITION, "custom_ops": ["none", "+rotary_embedding"]}),
}
PREFILLS = ((((7, 0), (3, 4)), 0), (((1, 20), (1, 6), (4, 2)), 2))
DECODES = ((((1, 7), (1, 7), (1, 30)), 3), (((3, 5), (3, 14)), 2))


@pytest.fixture
def compiled(toy, build, monkeypatch):
    """compiled(rope, config, plugin=...): a model of the graph route, or stock's, with MAX_SEQS requests at most.

    compiled.graphs: after all of vLLM's passes, by the end of the range, what each of the models compiled last.
    """
    from vllm.compilation.backends import VllmBackend
    from vllm.compilation.passes.inductor_pass import get_pass_context
    from vllm.compilation.passes.pass_manager import PostGradPassManager
    from vllm.config import CompilationConfig, SchedulerConfig, VllmConfig
    from vllm.config.compilation import CompilationMode, PassConfig
    from vllm.model_executor import custom_op
    from vllm.model_executor.layers.mla import MultiHeadLatentAttentionWrapper

    from mlagen.integrations.vllm import graph_route

    for owner, name in (
        (VllmBackend, "configure_post_pass"), (VllmConfig, "_set_compile_ranges"), (CompilationConfig, "compute_hash"),
        (MultiHeadLatentAttentionWrapper, "__init_subclass__"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, owner.__dict__[name])  # and back again at the end
    monkeypatch.setattr(custom_op, "op_registry_oot", {})
    graph_route.add_pass.cache_clear()
    assert graph_route.install()
    replaced = custom_op.op_registry_oot
    scheduler = SchedulerConfig.default_factory(max_num_seqs=MAX_SEQS)
    monkeypatch.setattr(toy, "VllmConfig", functools.partial(VllmConfig, scheduler_config=scheduler))
    run_passes, graphs = PostGradPassManager.__call__, {}

    def recorded(self, graph):
        run_passes(self, graph)
        graphs[get_pass_context().compile_range.end] = graph.python_code("self").src

    monkeypatch.setattr(PostGradPassManager, "__call__", recorded)

    def model(rope="gptj", config=WHOLE, *, plugin=True, fuse=False, mode=CompilationMode.VLLM_COMPILE, **options):
        monkeypatch.setattr(custom_op, "op_registry_oot", replaced if plugin else {})
        passes = PassConfig(fuse_rope_kvcache_cat_mla=fuse)
        return toy.Model(toy.Options(rope=rope, mode=mode, config={"pass_config": passes, **config}, **options))

    model.graphs = graphs
    return model


def passes_of(monkeypatch, before=None):
    """The passes that run, and the graphs given to them, as copies; `before` is called with each graph first."""
    from mlagen.integrations.vllm.graph import DecodePass

    found, call = [], DecodePass.__call__

    def recorded(self, graph):
        found.append((self, copy_of(graph)))
        call(self, graph)

    monkeypatch.setattr(DecodePass, "__call__", recorded)
    return found


def copy_of(graph):
    copied = torch.fx.Graph()
    values = {}
    copied.output(copied.graph_copy(graph, values))
    return copied


def count(graph, name):
    text = graph if isinstance(graph, str) else graph.python_code("self").src
    return text.count(f"ops.{name}.default")


@pytest.mark.parametrize("name", MODELS)
def test_batches_of_each_kind(compiled, build, toy, name):
    """The graph looks at a batch when it runs: what is no decode is stock's bit for bit, in the range of a decode, too."""
    stock, ours = (compiled(*MODELS[name], plugin=plugin) for plugin in (False, True))
    large = ((20, 0),), 0
    batches = [toy.Batch(*PREFILLS[0], metadata=False, slots=False), *(toy.Batch(*each) for each in (*PREFILLS, large))]
    for batch in (*batches, toy.Batch(*PREFILLS[1], padding=3)):
        assert torch.equal(stock.run(batch)[: batch.tokens], ours.run(batch)[: batch.tokens])
        for one, other in zip(stock.caches, ours.caches, strict=True):
            assert torch.equal(one, other)
    assert not build.decodes
    for number, batch in enumerate((toy.Batch(*DECODES[0]), toy.Batch(*DECODES[0], padding=2), toy.Batch(*DECODES[1])), 1):
        expected, found = stock.run(batch)[: batch.tokens], ours.run(batch)[: batch.tokens]
        assert (expected.float() - found.float()).abs().max() <= 8 * 2**-7 * expected.float().abs().max()
        assert len(build.decodes) == 2 * number
    differ = (stock.caches[0] != ours.caches[0]).sum(-1)
    assert differ.max() <= 1, "Inductor's RoPE keeps fp32 to its end, and rounds once more than ours"


@pytest.mark.parametrize("name", MODELS)
def test_what_a_graph_has_and_has_not(compiled, toy, monkeypatch, name):
    found = passes_of(monkeypatch)
    compiled(*MODELS[name]).run(toy.Batch(*DECODES[0]))
    ((_, before),) = found
    assert (count(before, UPDATE), count(before, OURS)) == (2, 0)
    inside, outside = compiled.graphs[MAX_SEQS], compiled.graphs[max(compiled.graphs)]
    assert "vllm.unified_mla" not in inside
    assert inside.count("vllm.mlagen_mla_attention.default") == 2
    for rotation in ("aten.index.Tensor", "aten.index_select", "_C.rotary_embedding", "slice_scatter", "aten.neg"):
        assert rotation not in inside, "nothing of the rotation is left"
    assert "mlagen" not in outside


def test_a_graph_outside_the_range_is_stocks(compiled, toy):
    """To the byte; the range ends where a decode does, with or without the layers being ours."""
    texts = []
    for plugin in (False, True):
        config = compiled(plugin=plugin)
        config.run(toy.Batch(*DECODES[0]))
        assert config.config.compilation_config.compile_ranges_endpoints[0] == MAX_SEQS
        texts.append(dict(compiled.graphs))
    stock, ours = texts
    assert sorted(stock) == sorted(ours)
    assert len(stock) == 2
    outside = max(stock)
    assert stock[outside] == ours[outside]
    assert stock[MAX_SEQS] != ours[MAX_SEQS]


def test_a_users_own_pass_keeps_its_slot(compiled, toy):
    """It runs for all ranges, and first: it sees vLLM's operators."""
    from vllm.compilation.passes.inductor_pass import InductorPass, get_pass_context

    seen = {}

    class Own(InductorPass):
        def __call__(self, graph):
            seen[get_pass_context().compile_range.end] = graph.python_code("self").src

    own = Own()
    model = compiled("neox", {**WHOLE, "inductor_compile_config": {"post_grad_custom_post_pass": own}})
    model.run(toy.Batch(*DECODES[0]))
    assert model.config.compilation_config.inductor_compile_config["post_grad_custom_post_pass"] is own
    assert sorted(seen) == sorted(compiled.graphs)
    assert all("unified_mla_attention_with_output" in text and "mlagen" not in text for text in seen.values())
    assert OURS in compiled.graphs[MAX_SEQS]


def test_vllms_own_fusion_of_rope_and_the_cache_write(compiled, build, toy):
    """It comes first, and what it leaves is found; outside of the range it stays."""
    stock, ours = compiled(plugin=False), compiled(fuse=True)
    batch = toy.Batch(*DECODES[0])
    expected, found = stock.run(batch), ours.run(batch)
    assert (expected.float() - found.float()).abs().max() <= 8 * 2**-7 * expected.float().abs().max()
    assert len(build.decodes) == 2
    assert "fused_rope_unified" not in compiled.graphs[MAX_SEQS]
    assert compiled.graphs[max(compiled.graphs)].count("fused_rope_unified_mla_kv_cache_update.default") == 2


def test_a_layer_without_a_kernel_is_left_alone(compiled, build, toy, monkeypatch):
    found, model = passes_of(monkeypatch), compiled("neox")
    model.attentions[1].mlagen = None
    batch = toy.Batch(*DECODES[0])
    model.run(batch)
    assert build.decodes == [model.attentions[0].layer_name]
    inside = compiled.graphs[MAX_SEQS]
    assert (inside.count(f"{OURS}.default"), inside.count(f"{STOCK}.default")) == (1, 1)
    # Where a graph has one layer, vLLM may run it for another one.
    ((decode, before),) = found
    only = copy_of(before)
    second = [node for node in only.nodes if STOCK in str(node.args[:1])][1]
    for user in list(second.users):
        user.replace_all_uses_with(second.kwargs["output"])
        only.erase_node(user)
    only.erase_node(second)
    text = only.python_code("self").src
    decode(only)
    assert only.python_code("self").src == text


def test_what_a_compiled_graph_depends_on(compiled, monkeypatch):
    from mlagen.integrations.vllm import graph

    model = compiled()
    config = model.config

    def names():
        return graph.DecodePass(config).uuid(), config.compilation_config.compute_hash()

    (uuid, named), found = names(), []
    assert names() == (uuid, named)
    kept, model.attentions[1].mlagen = model.attentions[1].mlagen, None
    found.append(names())
    model.attentions[1].mlagen = kept
    assert names() == (uuid, named)
    monkeypatch.setattr(graph, "__version__", "another")
    graph.source_digest.cache_clear()
    found.append((graph.DecodePass(config).uuid(), None))
    monkeypatch.undo()
    graph.source_digest.cache_clear()
    config.scheduler_config.max_num_seqs += 1
    found.append((graph.DecodePass(config).uuid(), None))
    assert len({uuid, *(each for each, _ in found)}) == 4
    assert found[0][1] != named


def test_the_range_of_a_decode():
    from vllm.config.utils import Range

    from mlagen.integrations.vllm.graph import DecodePass

    compilation = SimpleNamespace(static_forward_context={})
    for speculative in (0, 3):
        config = SimpleNamespace(
            compilation_config=compilation, scheduler_config=SimpleNamespace(max_num_seqs=8), num_speculative_tokens=speculative
        )
        decode, end = DecodePass(config), 8 * (1 + speculative)
        assert decode.is_applicable_for_range(Range(1, end))
        assert decode.is_applicable_for_range(Range(end, end))
        assert not decode.is_applicable_for_range(Range(1, end + 1))
        assert not decode.is_applicable_for_range(Range(end + 1, 2048))


@pytest.mark.parametrize("config", [{}, {"mode": 0}], ids=["split at attention", "eager"])
def test_where_no_graph_has_both_the_log_says_so(compiled, build, toy, said, config):
    """And no weights are packed."""
    from vllm.config.compilation import CompilationMode

    model = compiled(config={}, mode=CompilationMode(config.get("mode", 3)))
    assert all(getattr(each, "mlagen", None) is None for each in model.attentions)
    (line,) = [line for line in said if "keeps vLLM's own path" in line]
    assert "MLAGEN_VLLM=graph" in line
    assert "MLAGEN_VLLM=1" in line
    model.run(toy.Batch(*DECODES[0]))
    assert not build.decodes
