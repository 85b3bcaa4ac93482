"""Graphs that are almost a prologue: whatever the pass makes of them computes what they compute."""

import copy
import functools
import logging

import fx_custom_ops
import fx_models
import pytest
import torch
import torch._functorch.config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from mlagen.fx import FuseProloguePass, FusionConfig, LiftQPrepPass

pytestmark = pytest.mark.host

TOKENS = 4
CONFIG = FusionConfig(enabled=True, arch="gfx950", division_as_product=True)
aten = torch.ops.aten


@functools.cache
def traced(name):
    """The functional graph of a layer, as Inductor's passes see one, and its inputs."""
    if name in fx_custom_ops.SPELLINGS:
        return compiled_graph(name)
    layer = fx_models.SPELLINGS[name]()
    state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    x, slots, positions = fx_models.batch(TOKENS)

    def run(*values):
        inputs = values[len(state) :]
        result = torch.func.functional_call(layer, dict(zip(state, values, strict=False)), inputs)
        return (*result, inputs[1])

    inputs = (*state.values(), x, fx_models.new_cache(layer), slots, positions)
    with torch.no_grad():
        graph = make_fx(torch.func.functionalize(run, remove="mutations"), select_decomp_table(), "fake")(*inputs)
    for node in graph.graph.nodes:
        if node.target is aten.empty.memory_format:
            node.target = aten.zeros.default  # a changed graph may read it
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, inputs, layer


def compiled_graph(name):
    """The same by torch.compile, which makes operators functional that write to their arguments."""
    layer, found = fx_custom_ops.SPELLINGS[name](), []

    def compiler(module, _):
        def run(values):
            found.append((copy.deepcopy(module), tuple(each.clone() for each in values)))
            return module(*values)

        run._boxed_call = True
        return run

    x, slots, positions = fx_models.batch(TOKENS)
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
        backend = aot_autograd(fw_compiler=compiler, decompositions=select_decomp_table())
        torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)(x, fx_models.new_cache(layer), slots, positions)
    ((module, inputs),) = found
    for node in module.graph.nodes:
        if node.target is aten.empty.memory_format:
            node.target = aten.zeros.default
            node.kwargs = {name: each for name, each in node.kwargs.items() if name != "memory_format"}
    module.recompile()
    return module, inputs, layer


def evaluate(module, inputs):
    with torch.no_grad():
        return torch.fx.Interpreter(module).run(*(each.clone() for each in inputs))


def with_values(module, inputs):
    """A module whose nodes know their values; None where the change made no sense to torch."""
    mode = torch._subclasses.FakeTensorMode()
    try:
        module.graph.lint()
        with torch.no_grad():
            FakeTensorProp(module, mode).propagate(*inputs)
            return evaluate(module, inputs)
    except Exception:
        return None


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype is other.dtype
        if one.dtype is torch.uint8:
            one, other = one.view(torch.float8_e4m3fn), other.view(torch.float8_e4m3fn)
        one, other = one.float().nan_to_num(1e4), other.float().nan_to_num(1e4)
        largest = other.abs().max().item()
        assert torch.allclose(one, other, rtol=2**-3, atol=2**-5 * largest)


SPELLINGS = sorted({**fx_models.SPELLINGS, **fx_custom_ops.SPELLINGS})


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_graph_itself_is_fused(name):
    module, inputs, _ = traced(name)
    module = copy.deepcopy(module)
    expected = with_values(module, inputs)
    assert FuseProloguePass(CONFIG)(module.graph) == 1
    module.recompile()
    assert_close(evaluate(module, inputs), expected)
    sizes = [node for node in module.graph.nodes if node.op == "call_function" and isinstance(node.meta["val"], int)]
    assert not sizes, "torch 2.11's Inductor takes no operator that gives a plain number"


@pytest.mark.parametrize("name", ["Einsum", "VllmOps"])
def test_a_graph_that_is_not_sorted_is_read_all_the_same(name):
    """As pattern matchers leave it: torch sorts after the custom pass, too."""
    module, inputs, _ = traced(name)
    module = copy.deepcopy(module)
    expected = with_values(module, inputs)
    nodes = [node for node in module.graph.nodes if node.op == "call_function" and node.users]
    first = nodes[0]
    for node in nodes[::-1][: len(nodes) // 2]:
        first.prepend(node)
    with pytest.raises(RuntimeError):
        module.graph.lint()
    assert FuseProloguePass(CONFIG)(module.graph) == 1
    module.recompile()
    assert_close(evaluate(module, inputs), expected)


@pytest.mark.parametrize("kind", [FuseProloguePass, LiftQPrepPass])
def test_a_graph_that_writes_in_place_is_left_alone(kind, caplog):
    """What q holds depends on when it is read, which no edge of the graph says: one operator would read it later."""
    caplog.set_level(logging.DEBUG, "mlagen.fx")
    module, inputs, _ = traced("Einsum")
    module = copy.deepcopy(module)
    with_values(module, inputs)
    product = next(node for node in module.graph.nodes if node.target is aten.bmm.default)
    q = product.args[0]
    while q.target is not aten.mm.default:
        q = q.all_input_nodes[0]
    with module.graph.inserting_after(product):
        module.graph.call_function(aten.mul_.Tensor, (q, 2.0))
    before = str(module.graph)
    assert kind(CONFIG)(module.graph) == 0
    assert str(module.graph) == before
    assert "left as it is: aten.mul_.Tensor writes in place" in caplog.text


@pytest.mark.parametrize("kind", [FuseProloguePass, LiftQPrepPass])
def test_what_torch_refuses_is_taken_back(kind, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise RuntimeError("view size is not compatible\nwith more words")

    monkeypatch.setattr("mlagen.fx.fuse.auto_functionalized_v2", refuse)
    monkeypatch.setattr("mlagen.fx.lift.Q_PREP", refuse)
    module, inputs, _ = traced("DeepSeek")
    module = copy.deepcopy(module)
    with_values(module, inputs)
    before = str(module.graph)
    assert kind(CONFIG)(module.graph) == 0
    assert str(module.graph) == before
    assert "RuntimeError: view size is not compatible" in caplog.text


def like(node, other):
    one, two = node.meta.get("val"), other.meta.get("val")
    tensors = isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)
    return tensors and one.shape == two.shape and one.dtype is two.dtype


def prologue(graph):
    """What the query and the cache are made of.

    The attention is left as it is: no pass reads it, and a changed softmax may divide by next to nothing, which makes a large
    difference of a rounding.
    """
    (output,) = (each for each in graph.nodes if each.op == "output")
    attended = (TOKENS, fx_models.HIDDEN)
    left = [each for each in output.all_input_nodes if tuple(each.meta["val"].shape) != attended]
    found = set(left)
    while left:
        new = set(left.pop().all_input_nodes) - found
        found |= new
        left += new
    return [node for node in graph.nodes if node in found and node.op == "call_function" and node.target is not aten.copy_.default]


def change(module, data):
    """One change of a graph; says what it was."""
    nodes = prologue(module.graph)
    node = data.draw(st.sampled_from(nodes))
    kind = data.draw(st.sampled_from(["drop", "duplicate", "swap", "number", "other", "use", "keyword"]))
    if kind == "drop":
        same = [each for each in node.all_input_nodes if like(each, node)]
        if same:
            node.replace_all_uses_with(data.draw(st.sampled_from(same)))
    elif kind == "duplicate" and node.users:
        with module.graph.inserting_after(node):
            twin = module.graph.node_copy(node)
        user = data.draw(st.sampled_from(list(node.users)))
        user.replace_input_with(node, twin)
    elif kind == "swap" and len(node.args) >= 2:
        node.args = (node.args[1], node.args[0], *node.args[2:])
    elif kind == "number":
        places = [place for place, each in enumerate(node.args) if isinstance(each, int | float) and not isinstance(each, bool)]
        if places:
            place = data.draw(st.sampled_from(places))
            args = list(node.args)
            args[place] = args[place] + data.draw(st.sampled_from([-1, 1, 8]))
            node.args = tuple(args)
    elif kind == "keyword" and node.kwargs:
        name = data.draw(st.sampled_from(sorted(node.kwargs)))
        value = node.kwargs[name]
        if isinstance(value, bool):
            node.kwargs = {**node.kwargs, name: not value}
        elif isinstance(value, int):
            node.kwargs = {**node.kwargs, name: value + data.draw(st.sampled_from([-1, 1, 8]))}
    elif kind == "other" and node.all_input_nodes:
        old = data.draw(st.sampled_from(node.all_input_nodes))
        earlier = [each for each in module.graph.nodes if each < node and each is not old and like(each, old)]
        if earlier:
            node.replace_input_with(old, data.draw(st.sampled_from(earlier)))
    elif kind == "use":
        (output,) = (each for each in module.graph.nodes if each.op == "output")
        if isinstance(node.meta.get("val"), torch.Tensor):
            output.args = ((*output.args[0], node),)
    return kind, node.name


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_changed_graph_is_never_miscompiled(data):
    module, inputs, _ = traced(data.draw(st.sampled_from(SPELLINGS), label="spelling"))
    module = copy.deepcopy(module)
    for _ in range(data.draw(st.integers(1, 2), label="changes")):
        change(module, data)
    expected = with_values(module, inputs)
    if expected is None:
        return
    for each in (FuseProloguePass, LiftQPrepPass):
        changed = copy.deepcopy(module)
        with_values(changed, inputs)
        before = str(changed.graph)
        count = each(CONFIG)(changed.graph)
        assert count or str(changed.graph) == before
        changed.recompile()
        assert_close(evaluate(changed, inputs), expected)
