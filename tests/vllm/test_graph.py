"""MLAGEN_VLLM=graph: vLLM's graphs, compiled by its real backend, with mlagen's operator in them where a decode may be."""

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
    from vllm.config import SchedulerConfig, VllmConfig
    from vllm.config.compilation import CompilationMode, PassConfig

    from mlagen.integrations.vllm import graph_route

    for owner, name in (
        (VllmBackend, "configure_post_pass"), (VllmConfig, "_set_compile_ranges"), (VllmConfig, "compute_hash"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, owner.__dict__[name])  # and back again at the end
    graph_route.add_pass.cache_clear()
    graph_route.add_pass()
    scheduler = SchedulerConfig.default_factory(max_num_seqs=MAX_SEQS)
    monkeypatch.setattr(toy, "VllmConfig", functools.partial(VllmConfig, scheduler_config=scheduler))
    run_passes, graphs = PostGradPassManager.__call__, {}

    def recorded(self, graph):
        run_passes(self, graph)
        graphs[get_pass_context().compile_range.end] = graph.python_code("self").src

    monkeypatch.setattr(PostGradPassManager, "__call__", recorded)

    def model(rope="gptj", config=WHOLE, *, plugin=True, fuse=False, mode=CompilationMode.VLLM_COMPILE, **options):
        passes = PassConfig(fuse_rope_kvcache_cat_mla=fuse)
        inductor = {"force_disable_caches": True, **config.get("inductor_compile_config", {})}  # or no pass runs
        config = {**config, "pass_config": passes, "inductor_compile_config": inductor}
        return build(toy.Options(rope=rope, mode=mode, config=config, additional={"mlagen": "graph"}, **options), plugin=plugin)

    model.graphs = graphs
    return model


def passes_of(monkeypatch):
    """The passes that run, and the graphs given to them, as copies."""
    from mlagen.integrations.vllm.graph import DecodePass

    found, call = [], DecodePass.__call__

    def recorded(self, graph):
        found.append((self, copy_of(graph)))
        call(self, graph)

    monkeypatch.setattr(DecodePass, "__call__", recorded)
    return found


def copy_of(graph):
    """In order, which a graph is not behind vLLM's pattern matchers."""
    copied, values = torch.fx.Graph(), {}

    def copy(node):
        if node not in values:
            for each in node.all_input_nodes:
                copy(each)
            values[node] = copied.node_copy(node, values.__getitem__)

    for node in graph.nodes:
        copy(node)
    return copied


def count(graph, name):
    text = graph if isinstance(graph, str) else graph.python_code("self").src
    return text.count(f"ops.{name}.default")


def check_graphs(graphs):
    """Of a model of the graph route, for its two ranges."""
    inside, outside = graphs[MAX_SEQS], graphs[max(graphs)]
    assert "vllm.unified_mla" not in inside
    assert inside.count(f"{OURS}.default") == 2
    for rotation in ("aten.index.Tensor", "aten.index_select", "_C.rotary_embedding", "slice_scatter", "aten.neg"):
        assert rotation not in inside, "nothing of the rotation is left"
    assert "mlagen" not in outside
    assert (outside.count(f"{STOCK}.default"), outside.count(f"{UPDATE}.default")) == (2, 2)


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
    check_graphs(compiled.graphs)
    for number, batch in enumerate((toy.Batch(*DECODES[0]), toy.Batch(*DECODES[0], padding=2), toy.Batch(*DECODES[1])), 1):
        expected, found = stock.run(batch)[: batch.tokens], ours.run(batch)[: batch.tokens]
        assert (expected.float() - found.float()).abs().max() <= 8 * 2**-7 * expected.float().abs().max()
        assert len(build.decodes) == 2 * number
    before, after = (each.caches[0].short() for each in (stock, ours))
    assert torch.equal(before[..., :-64], after[..., :-64]), "nothing rounds the latent columns in between"
    if "operator" not in name:
        assert (before - after).abs().max() <= 1, (
            "Inductor's RoPE keeps fp32 to its end, and rounds once more than ours: the next code"
        )


@pytest.mark.usefixtures("once")
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


@pytest.mark.usefixtures("once")
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


@pytest.mark.usefixtures("once")
def test_vllms_own_fusion_of_rope_and_the_cache_write(compiled, build, toy):
    """It comes first, and what it leaves is found; outside of the range it stays."""
    stock, ours = compiled(plugin=False), compiled(fuse=True)
    batch = toy.Batch(*DECODES[0])
    expected, found = stock.run(batch), ours.run(batch)
    assert (expected.float() - found.float()).abs().max() <= 8 * 2**-7 * expected.float().abs().max()
    assert len(build.decodes) == 2
    assert "fused_rope_unified" not in compiled.graphs[MAX_SEQS]
    assert compiled.graphs[max(compiled.graphs)].count("fused_rope_unified_mla_kv_cache_update.default") == 2


@pytest.mark.usefixtures("once")
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


def test_a_table_in_fp32_stays(compiled, build, toy, said):
    """vLLM's RoPE rounds to the model's dtype only where the query is written then, and its k_pe stays in fp32.

    The log, which has said that the kernel is ready, says once that vLLM's path is kept all the same.
    """
    stock, ours = (compiled(plugin=plugin, fp32_table=True) for plugin in (False, True))
    batch = toy.Batch(*DECODES[0])
    assert torch.equal(stock.run(batch), ours.run(batch))
    assert not build.decodes
    (line,) = [line for line in said if "keeps vLLM's own path" in line]
    assert ours.attentions[0].layer_name in line
    assert "torch.float32" in line


def test_what_a_compiled_graph_depends_on(compiled, monkeypatch):
    from mlagen.integrations.vllm import graph

    model = compiled()
    config = model.config

    def names():
        return graph.DecodePass(config).uuid(), config.compute_hash()

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
    for requests, speculative, end in ((8, 0, 8), (8, 3, 32), (1, 0, 2)):  # vLLM has no range of one token
        config = SimpleNamespace(
            compilation_config=compilation,
            scheduler_config=SimpleNamespace(max_num_seqs=requests),
            num_speculative_tokens=speculative,
        )
        decode = DecodePass(config)
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


KINDS = {
    "gptj": ("gptj", WHOLE, False),
    "neox": ("neox", WHOLE, False),
    "an operator": ("neox", {**WHOLE, "custom_ops": ["none", "+rotary_embedding"]}, False),
    "vLLM's fusion": ("gptj", WHOLE, True),
}
CAUGHT = {}


@pytest.fixture(params=KINDS)
def caught(request, once, compiled, toy, monkeypatch):
    """The pass, and a function that copies the graph of two layers that came to it."""
    if request.param not in CAUGHT:
        rope, config, fuse = KINDS[request.param]
        with monkeypatch.context() as patch:
            found = passes_of(patch)
            compiled(rope, config, fuse=fuse).run(toy.Batch(*DECODES[0]))
        (CAUGHT[request.param],) = found
    decode, graph = CAUGHT[request.param]
    return decode, functools.partial(copy_of, graph)


def attention(graph, place=0):
    return [node for node in graph.nodes if STOCK in str(node.args[:1])][place]


def named(graph, name):
    return next(node for node in graph.nodes if node.name == name)


def put_before(graph, node, source, target=torch.ops.aten.neg.default, arguments=()):
    """A new node of the value that `source` has, but for its numbers."""
    with graph.inserting_before(node):
        new = graph.call_function(target, (source, *arguments))
    new.meta["val"] = source.meta["val"]
    return new


def is_written_over(node, number):
    """Whether an operand's numbers are read by nobody: where a key is written back into the projection that it is a part of."""
    if node.target is torch.ops.aten.copy.default:
        return number == 0
    if node.target is torch.ops.aten.slice_scatter.default:
        return number == 0 and node.meta["val"].dim() == 2
    moves = "getitem" in node.name or "split" in node.name
    return moves and bool(node.users) and all(is_written_over(each, each.all_input_nodes.index(node)) for each in node.users)


def replaced_nodes(decode, copied):
    """Names of the nodes that only the first layer needs, and that the pass takes away."""
    from mlagen.fx.query import behind

    before, after = copied(), copied()
    decode(after)
    assert (count(after, OURS), count(after, STOCK)) == (2, 0)
    left = {node.name for node in after.nodes}
    assert all(node.users or node.op != "call_function" for node in after.nodes), "nothing is left over"
    first = attention(before)
    return [node.name for node in before.nodes if node.name not in left and node in behind({first})]


def test_a_change_of_any_number_on_the_way_is_seen(caught):
    """Each operand of each node that goes is negated, one at a time: the layer stays, or the operator gets what is negated."""
    from mlagen.fx.query import behind

    decode, copied = caught
    tried = 0
    for name in replaced_nodes(decode, copied):
        for number, operand in enumerate(named(copied(), name).all_input_nodes):
            value = operand.meta.get("val")
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            graph = copied()
            node = named(graph, name)
            if is_written_over(node, number):
                continue
            source = named(graph, operand.name)
            negated = put_before(graph, node, source)
            node.replace_input_with(source, negated)
            decode(graph)
            tried += 1
            graph.lint()
            assert count(graph, OURS) > 0, "the other layer is fused all the same"
            if count(graph, OURS) == 2:
                ours = next(each for each in graph.nodes if OURS in str(each.args[:1]))
                assert negated in behind({ours}), f"{name} of {operand.name}"
    assert tried > 10


def test_a_value_that_something_else_uses_is_kept(caught):
    decode, copied = caught
    names = replaced_nodes(decode, copied)
    first = attention(copied())
    ends = {first.kwargs["q"].name, first.kwargs["k_pe"].name, first.kwargs["kv_cache_dummy_dep"].name}
    assert ends <= set(names)
    for name in names:
        graph = copied()
        node = named(graph, name)
        if not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        (results,) = graph.output_node().args
        graph.output_node().args = ((*results, put_before(graph, graph.output_node(), node)),)
        decode(graph)
        graph.lint()
        assert named(graph, name).users
        assert count(graph, OURS) == 1 or name not in ends, name


def left_alone(decode, graph, monkeypatch):
    """Why the first layer of a graph stays; the second is fused."""
    from mlagen.integrations.vllm.log import logger

    reasons = []
    with monkeypatch.context() as patch:
        patch.setattr(logger(), "debug", lambda text, *values: reasons.append(text % values))
        decode(graph)
    assert (count(graph, OURS), count(graph, STOCK)) == (1, 1)
    (reason,) = [each for each in reasons if "left as it is" in each]
    return reason


def test_attention_with_more_to_do(caught, monkeypatch):
    """As vLLM's pass for quantised outputs leaves it, or a wrapper with context parallelism."""
    decode, copied = caught
    for name in ("output_scale", "q_dcp_replicated"):
        graph = copied()
        node = attention(graph)
        node.update_kwarg(name, node.kwargs["output"])
        assert f"attention with {name}" in left_alone(decode, graph, monkeypatch)


def test_a_write_of_other_entries(caught, monkeypatch):
    decode, copied = caught
    graph = copied()
    attention(graph).update_kwarg("kv_cache_dummy_dep", None)
    assert "no write of the entries" in left_alone(decode, graph, monkeypatch)
    graph = copied()
    one, other = (attention(graph, place).kwargs["kv_cache_dummy_dep"] for place in (0, 1))
    other.replace_all_uses_with(one)
    decode_of_both = graph.python_code("self").src
    decode(graph)
    assert graph.python_code("self").src == decode_of_both


def test_another_dtype(caught, monkeypatch):
    decode, copied = caught
    graph = copied()
    node = attention(graph)
    wide = put_before(graph, node, node.kwargs["kv_c_normed"], torch.ops.prims.convert_element_type.default, (torch.float32,))
    wide.meta["val"] = torch.empty(1, device="meta").expand(node.kwargs["kv_c_normed"].meta["val"].shape[1:])
    node.update_kwarg("kv_c_normed", wide)
    assert "kv_c" in left_alone(decode, graph, monkeypatch)


@pytest.mark.parametrize("other", ["style", "table", "sizes"])
def test_a_layer_of_another_kind(caught, monkeypatch, other):
    """What the graph computes has to be what the layer's kernel does."""
    from dataclasses import replace

    decode, copied = caught
    name = sorted(decode.layers)[0]
    prologue = decode.layers[name].mlagen
    spec, shape = prologue.spec, prologue.rotary.cos_sin_cache.shape
    if other == "style":
        spec = replace(spec, rope_style="neox" if spec.rope_style == "gptj" else "gptj")
    elif other == "sizes":
        spec = replace(spec, heads=2 * spec.heads)
    else:
        shape = (shape[0] + 1, shape[1])
    table = SimpleNamespace(cos_sin_cache=SimpleNamespace(shape=shape))
    monkeypatch.setattr(decode.layers[name], "mlagen", SimpleNamespace(spec=spec, rotary=table))
    reason = left_alone(decode, copied(), monkeypatch)
    assert {"style": "rotated as", "table": "a table", "sizes": "expected ['T'"}[other] in reason
