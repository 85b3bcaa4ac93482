"""The operators in graphs: torch.compile and torch.export."""

import io
import os
import shutil

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend

from mlagen.verify import make_case

pytestmark = pytest.mark.host

OP = torch.ops.mlagen.decode_prologue.default
PACK = torch.ops.mlagen.pack_weights.default
CACHE, SLOTS = 5, 6  # the places of kv_cache and slot_mapping among the tensors
ROWS = (0, 1, 2, 3, 6, 7)  # the places of those that have a row for each token

has_compiler = any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name)
INDUCTOR = pytest.param("inductor", marks=pytest.mark.skipif(not has_compiler, reason="Inductor's C++ compiler"))
BACKENDS = ("eager", "aot_eager", INDUCTOR)


@pytest.fixture(autouse=True)
def _start_over():
    """No graph of an earlier test or run: torch's cache does not see that an operator's fake has changed."""
    torch._dynamo.reset()
    graphs_only = torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False)
    with graphs_only[0], graphs_only[1]:
        yield


def compiled(function, backend, **options):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def step(setup, **more):
    """A step around the operator: q is made in the graph, and q_out used in it."""

    def run(q, *others):
        q_out = OP(q * 1.0, *others, **setup.options, **more)
        return q_out, q_out.view(torch.uint8) ^ 1

    return run


def assert_step(setup, tensors, result, **more):
    q_out, flipped = result
    setup.assert_as_kernel(tensors, q_out, **more)
    assert torch.equal(flipped, q_out.view(torch.uint8) ^ 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dynamic_number_of_rows_compiles_once(setup_of, backend):
    setup = setup_of("bf16-neox" if backend == "aot_eager" else "fp8")
    heads = setup.spec.heads + 1
    run, counter = compiled(step(setup, q_heads=heads), backend)
    for tokens in (5, 2, 7, 16, 17, 65):
        tensors = setup.tensors(tokens, pair=True)
        if tokens == 5:
            for place in ROWS:
                torch._dynamo.mark_dynamic(tensors[place], 0)
        assert_step(setup, tensors, run(*tensors), heads=heads)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_no_row_and_one_row(setup_of, backend):
    setup = setup_of("fp8")
    for tokens in (0, 1):
        tensors = setup.tensors(tokens)
        run, _ = compiled(step(setup), backend)
        assert_step(setup, tensors, run(*tensors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_of_rows_that_nothing_is_known_of(setup_of, backend):
    setup = setup_of("fp8")
    run, counter = compiled(step(setup), backend)
    for tokens in (5, 1, 0, 17):
        tensors = setup.tensors(tokens, pair=True)
        if tokens == 5:
            for place in ROWS:
                torch._dynamo.decorators.mark_unbacked(tensors[place], 0)
        assert_step(setup, tensors, run(*tensors))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_specs_in_one_graph(setup_of, backend):
    setups = [setup_of("fp8"), setup_of("absorbed")]
    calls = [setup.tensors(7) for setup in setups]

    def run(first, second):
        return [OP(*tensors, **setup.options) for tensors, setup in zip((first, second), setups, strict=True)]

    results = compiled(run, backend)[0](*calls)
    for setup, tensors, q_out in zip(setups, calls, results, strict=True):
        setup.assert_as_kernel(tensors, q_out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dynamic", "view"), [(False, False), (True, False), (True, True)], ids=["static", "dynamic", "view"])
def test_a_layer_of_a_larger_cache_is_written_in_its_place(setup_of, backend, dynamic, view):
    """Under Inductor with dynamic extents the writes would go to the first layer, but for what the fake does about it."""
    setup = setup_of("fp8")

    def run(*tensors):
        layer = tensors[CACHE][1]
        return OP(*tensors[:CACHE], layer.view(torch.float8_e4m3fn) if view else layer, *tensors[CACHE + 1 :], **setup.options)

    run, _ = compiled(run, backend, dynamic=dynamic)
    for tokens in (7, 17):
        tensors = setup.tensors(tokens)
        layers = torch.stack([setup.cache(as_uint8=True)] * 3)
        q_out = run(*tensors[:CACHE], layers, *tensors[CACHE + 1 :])
        untouched = setup.cache(as_uint8=True)
        assert torch.equal(layers[0], untouched)
        assert torch.equal(layers[2], untouched)
        tensors = (*tensors[:CACHE], layers[1], *tensors[CACHE + 1 :])
        setup.assert_as_kernel(tensors, q_out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_cache_is_written_where_q_out_is_not_used(setup_of, backend):
    setup = setup_of("fp8")

    def run(kv_cache, *others):
        OP(*others[:CACHE], kv_cache, *others[CACHE:], **setup.options)
        return kv_cache.sum()

    tensors = setup.tensors(7, as_uint8=True)
    total = compiled(run, backend)[0](tensors[CACHE], *tensors[:CACHE], *tensors[CACHE + 1 :])
    setup.assert_as_kernel(tensors, OP(*setup.tensors(7), **setup.options))
    assert total == tensors[CACHE].sum()


def test_a_wrong_argument_is_named_by_the_compiler(setup_of):
    setup = setup_of("fp8")
    tensors = list(setup.tensors(5))
    tensors[2] = tensors[2][:4]
    with pytest.raises(Exception, match=r"kv_c: shape \[4, 64\], expected \[5, 64\]"):
        compiled(step(setup), "eager")[0](*tensors)
    with pytest.raises(Exception, match=r"kv_c: .* rows, expected .*, one for each token"):
        compiled(step(setup), "eager", dynamic=True)[0](*tensors)


def test_gradients_in_a_graph(setup_of):
    setup = setup_of("fp8")
    tensors = list(setup.tensors(5))
    tensors[0].requires_grad_()

    def run(*tensors):
        return OP(*tensors, **setup.options)

    with pytest.raises(Exception, match="q: requires grad, and mlagen's operators have no derivative"):
        compiled(run, "aot_eager")[0](*tensors)
    for mode, function in ((torch.enable_grad, torch.no_grad()(run)), (torch.no_grad, run), (torch.inference_mode, run)):
        torch._dynamo.reset()
        tensors[CACHE] = setup.cache()
        with mode():
            setup.assert_as_kernel(tensors, compiled(function, "aot_eager")[0](*tensors))


class Layer(torch.nn.Module):
    def __init__(self, setup):
        super().__init__()
        self.options = setup.options

    def forward(self, *tensors):
        return OP(*tensors, **self.options)


@pytest.mark.parametrize("stored", [False, True], ids=["in place", "stored"])
def test_export(setup_of, stored):
    setup = setup_of("bf16-neox" if stored else "fp8")  # torch 2.6 cannot store fp8
    rows = torch.export.Dim("tokens", min=2, max=1024)
    tensors = setup.tensors(5, pair=True, as_uint8=True)
    shapes = [{0: rows} if place in ROWS else None for place in range(len(tensors))]
    shapes[SLOTS] = {0: torch.export.Dim("slots", min=2, max=2048)}
    program = torch.export.export(Layer(setup), tensors, dynamic_shapes=(tuple(shapes),))
    if stored:
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        program = torch.export.load(file)
    assert OP in [node.target for node in program.graph.nodes]
    for each in (program, program.run_decompositions()):
        for tokens in (2, 5, 17, 65):
            tensors = setup.tensors(tokens, pair=True, as_uint8=True)
            setup.assert_as_kernel(tensors, each.module()(*tensors))


class Packing(torch.nn.Module):
    """A load step: as it was written before operators took scales, or with them."""

    def __init__(self, setup):
        super().__init__()
        self.options = setup.options

    def forward(self, *weights):
        return PACK(*weights, **self.options)


@pytest.mark.parametrize("name", ["bf16-neox", "mxfp4 weights"])
def test_export_of_packing(setup_of, name):
    """Without and with scales, stored and read again: codes of e2m1 are bytes, which torch 2.6 can store."""
    setup = setup_of(name)
    inputs = make_case(setup.spec, setup.kernel.target, 0).inputs
    weights = (inputs["w_uk"], inputs["w_scale"]) if "w_scale" in inputs else (inputs["w_uk"],)
    program = torch.export.export(Packing(setup), weights)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    read = torch.export.load(file)
    (call,) = (node for node in read.graph.nodes if node.target is PACK)
    assert len(call.args) == len(weights)
    assert torch.equal(read.module()(*weights), setup.packed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["fp8 weights", "fp8-block weights", "mxfp4 weights", "a8"])
def test_weights_in_codes_compile(setup_of, name, backend):
    setup = setup_of(name)
    run, counter = compiled(step(setup), backend)
    for tokens in (5, 7, 17):
        tensors = setup.tensors(tokens, pair=True)
        if tokens == 5:
            for place in ROWS:
                torch._dynamo.mark_dynamic(tensors[place], 0)
        assert_step(setup, tensors, run(*tensors))
    assert counter.frame_count == 1
