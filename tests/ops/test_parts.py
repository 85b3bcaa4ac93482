"""The operators of kernels with other results than q_out and the cache's entries: at once, without data, and in graphs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import mlagen
from mlagen import ops
from mlagen.errors import ArgumentError, SpecError
from mlagen.runtime import Kernel
from mlagen.spec import PrologueSpec
from mlagen.torch_types import torch_dtype
from mlagen.verify import make_case

pytestmark = pytest.mark.host

SMALL = PrologueSpec(heads=3, nope_dim=32, lora_rank=64, rope_dim=16, rope_style="gptj")
SPECS = {
    "decode_prologue_q": replace(SMALL, write_kv=False),
    "decode_prologue_q, bf16": replace(SMALL, write_kv=False, q_dtype="bf16", rope_style="neox"),
    "decode_prologue_pair": replace(SMALL, q_split=True, q_dtype="bf16"),
    "decode_prologue_pair, no cache": replace(SMALL, q_split=True, write_kv=False),
    "decode_prologue_pair, scales": replace(SMALL, q_scaling="token"),
    "decode_prologue_pair, scales, no cache": replace(SMALL, q_scaling="token", weight="none", write_kv=False),
    "decode_prologue_kv": replace(SMALL, write_q=False),
    "decode_prologue_kv, no rotation": replace(SMALL, write_q=False, rope_style="none", rope_dim=0, kv_dtype="bf16"),
}
FILL = 0x11
HALF = (torch.bfloat16, torch.float16)

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """An operator with the kernel that it calls; `tensors(T)` are its tensors for T rows."""

    operator: Any
    kernel: Kernel

    @property
    def options(self) -> dict[str, str]:
        return {"spec": ops.spec_to_str(self.kernel.spec), "arch": "gfx950"}

    def cache(self) -> torch.Tensor:
        dtype = torch_dtype(self.kernel.spec.output_dtype(self.kernel.spec.kv_dtype, self.kernel.target))
        stored = torch.full((10, 16, self.kernel.spec.entry_dim * dtype.itemsize), FILL, dtype=torch.uint8)
        return stored if dtype.itemsize == 1 else stored.view(dtype)

    def tensors(self, tokens: int) -> Arguments:
        inputs = make_case(self.kernel.spec, self.kernel.target, tokens).inputs
        inputs |= {"q": inputs["q_nope"], "kv_cache": self.cache(), "sin": None}
        inputs["packed"] = self.kernel.pack_weights(inputs["w_uk"]) if "w_uk" in inputs else None
        if not self.kernel.spec.write_kv:
            inputs |= dict.fromkeys(("kv_c", "k_pe", "kv_cache", "slot_mapping", "k_scale"))
        if self.kernel.spec.q_scaling == "token":
            inputs["q_scale"] = None
        return {each.name: inputs[each.name] for each in self.operator._schema.arguments if not each.kwarg_only}

    def expected(self, tensors: Arguments) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """What the kernel itself returns, and the cache that it leaves."""
        given = dict.fromkeys(("kv_c", "k_pe", "packed", "slot_mapping")) | tensors
        q = (given.pop("q"), given.pop("q_pe")) if "q" in tensors else None
        given |= {"kv_cache": self.cache() if self.kernel.spec.write_kv else None}
        given.pop("sin")
        return listed(self.kernel(q, **given)), given["kv_cache"]

    def assert_as_kernel(self, tensors: Arguments, results: Any) -> None:
        expected, cache = self.expected(tensors)
        results = listed(results)
        assert [looks(each) for each in results] == [looks(each) for each in expected]
        pairs = zip(results, expected, strict=True)
        assert all(torch.equal(each.view(torch.uint8), other.view(torch.uint8)) for each, other in pairs)
        if cache is not None:
            assert torch.equal(tensors["kv_cache"].view(torch.uint8), cache.view(torch.uint8))


def listed(results: Any) -> list[torch.Tensor]:
    if results is None:
        return []
    return [results] if isinstance(results, torch.Tensor) else [*results]


def looks(tensor: torch.Tensor) -> tuple[object, ...]:
    return (tuple(tensor.shape), tensor.dtype, tensor.stride(), tensor.device.type)


def fake(operator: Callable[..., Any], tensors: Arguments, options: dict[str, Any]) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        return operator(**{name: each if each is None else mode.from_tensor(each) for name, each in tensors.items()}, **options)


@pytest.fixture(params=SPECS)
def setup(request) -> Setup:
    operator = getattr(torch.ops.mlagen, request.param.partition(",")[0]).default
    return Setup(operator, mlagen.load(SPECS[request.param], "cpu", arch="gfx950"))


@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_the_operator_does_what_the_kernel_does(setup, tokens):
    tensors = setup.tensors(tokens)
    results = setup.operator(**tensors, **setup.options)
    setup.assert_as_kernel(tensors, results)
    made = fake(setup.operator, tensors, setup.options)
    assert [looks(each) for each in listed(made)] == [looks(each) for each in listed(results)]


@pytest.mark.parametrize("tokens", [0, 17])
@pytest.mark.parametrize("setup", [name for name, spec in SPECS.items() if spec.write_q], indirect=True)
def test_head_room_is_zero(setup, tokens):
    tensors, options = setup.tensors(tokens), {**setup.options, "q_heads": 5}
    results = listed(setup.operator(**tensors, **options))
    made = listed(fake(setup.operator, tensors, options))
    assert [looks(each) for each in made] == [looks(each) for each in results]
    expected, _ = setup.expected(tensors)
    for each, other in zip(results, expected, strict=True):
        assert each.shape[1] == 5
        assert torch.equal(each[:, :3].contiguous().view(torch.uint8), other.view(torch.uint8))
        assert not each[:, 3:].contiguous().view(torch.uint8).any()
    with pytest.raises(ArgumentError, match="q_heads: 2, expected None or at least the spec's 3"):
        setup.operator(**tensors, **{**setup.options, "q_heads": 2})


def test_opcheck(setup):
    tensors = setup.tensors(5)
    tensors = {name: each.nan_to_num_() if each is not None and each.dtype in HALF else each for name, each in tensors.items()}
    torch.library.opcheck(setup.operator, tuple(tensors.values()), setup.options)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_dynamic_number_of_rows_compiles_once(setup, backend):
    torch._dynamo.reset()
    names = [each.name for each in setup.operator._schema.arguments if not each.kwarg_only]
    rows = ("q", "q_pe", "kv_c", "k_pe", "slot_mapping", "positions")

    def run(first, *others):
        return setup.operator(first * 1.0, *others, **setup.options)

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for tokens in (5, 2, 17):
        tensors = setup.tensors(tokens)
        for name in rows if tokens == 5 else ():
            if tensors.get(name) is not None:
                torch._dynamo.mark_dynamic(tensors[name], 0)
        setup.assert_as_kernel(tensors, compiled(*(tensors[name] for name in names)))
    assert counter.frame_count == 1


def test_export(setup):
    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return setup.operator(*tensors, **setup.options)

    tensors = setup.tensors(5)
    program = torch.export.export(Layer(), tuple(tensors.values()))
    assert setup.operator in [node.target for node in program.graph.nodes]
    for each in (program, program.run_decompositions()):
        fresh = setup.tensors(5)
        setup.assert_as_kernel(fresh, each.module()(*fresh.values()))


WRONG = {
    "q without heads": ("q", lambda q: q[:, 0], "q[0] (q_nope): shape [5, 32]"),
    "q_pe with too few rows": ("q_pe", lambda q_pe: q_pe[:4], "q[1] (q_pe): shape [4, 3, 16], expected [5, 3, 16]"),
    "packed missing": ("packed", lambda _: None, "packed: expected a tensor"),
    "kv_c too wide": ("kv_c", lambda kv_c: kv_c.repeat(1, 2), "kv_c: shape [5, 128], expected ["),
    "k_pe with too few rows": ("k_pe", lambda k_pe: k_pe[:4], "k_pe: shape [4, 16], expected [5, 16]"),
    "slot_mapping too short": ("slot_mapping", lambda slots: slots[:4], "slot_mapping: shape [4], expected [>=5]"),
    "positions for more rows": ("positions", lambda positions: positions.repeat(2), "positions: shape [10], expected [5]"),
    "q_scale of another type": ("q_scale", lambda scale: scale.double(), "q_scale: dtype float64"),
    "k_scale of another type": ("k_scale", lambda scale: scale.double(), "k_scale: dtype float64"),
}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        (name, wrong)
        for name in ("decode_prologue_q", "decode_prologue_pair", "decode_prologue_kv")
        for wrong, (argument, *_) in WRONG.items()
        if argument in {each.name for each in getattr(torch.ops.mlagen, name).default._schema.arguments}
    ],
)
def test_a_wrong_argument_is_named_with_and_without_data(name, wrong):
    setup = Setup(getattr(torch.ops.mlagen, name).default, mlagen.load(SPECS[name], "cpu", arch="gfx950"))
    argument, change, message = WRONG[wrong]
    tensors = setup.tensors(5)
    tensors[argument] = change(tensors[argument])
    for call in (lambda: setup.operator(**tensors, **setup.options), lambda: fake(setup.operator, tensors, setup.options)):
        with pytest.raises(ArgumentError) as caught:
            call()
        assert str(caught.value).startswith(message)


def test_a_spec_for_another_operator_is_refused_with_and_without_data(setup):
    tensors = setup.tensors(5)
    for spec in (SMALL, *SPECS.values()):
        if ops.operator_of(spec) == setup.operator._schema.name.partition("::")[2]:
            continue
        options = {**setup.options, "spec": ops.spec_to_str(spec)}
        for call in (lambda: setup.operator(**tensors, **options), lambda: fake(setup.operator, tensors, options)):  # noqa: B023
            with pytest.raises(SpecError, match=f"is called by torch.ops.mlagen.{ops.operator_of(spec)}, not by "):
                call()


def test_gradients_are_refused(setup):
    tensors = setup.tensors(5)
    name = next(iter(tensors))
    tensors[name].requires_grad_()
    for call in (lambda: setup.operator(**tensors, **setup.options), lambda: fake(setup.operator, tensors, setup.options)):
        with pytest.raises(ArgumentError, match=f"^{name}: requires grad"):
            call()
