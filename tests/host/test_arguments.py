"""Wrong arguments: each gets one line that begins with its name, before a byte is written; right ones of any form work."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Launch, Workload, check, make_launch, output_bytes, small_spec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mlagen import verify
from mlagen.errors import ArgumentError, MlagenError, TargetError
from mlagen.runtime import Kernel, load
from mlagen.spec import PrologueSpec

pytestmark = pytest.mark.host

TOKENS = 5
WORKLOAD = Workload(tokens=TOKENS, layout="dense", slots="last", table="pair")

Arguments = dict[str, Any]
Change = Callable[[Any], Any]


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return load(small_spec(), "cpu", arch="gfx942")


def on(part: int, change: Change) -> Change:
    """`change` on one tensor of a pair."""
    return lambda pair: tuple(change(each) if at == part else each for at, each in enumerate(pair))


def to(dtype: torch.dtype) -> Change:
    return lambda tensor: tensor.to(dtype)


def every_second(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with a last stride of 2."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def fewer(dim: int) -> Change:
    return lambda tensor: tensor.narrow(dim, 0, tensor.shape[dim] - 1)


def more(dim: int) -> Change:
    return lambda tensor: torch.cat((tensor, tensor.narrow(dim, 0, 1)), dim)


def meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def nothing(_: object) -> None:
    return None


def other_flavour(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.float8_e4m3fn)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1)


def with_slot(slot: int) -> Change:
    return lambda slots: slots.index_fill(0, torch.tensor([2]), slot)


SLOTS = 16 * 2  # of the cache that make_launch gives

# By argument: what is done to it, and a word that the message must have.
WRONG: dict[str, list[tuple[str, Change, str]]] = {
    "q": [
        ("none", nothing, "NoneType"),
        ("array", lambda pair: np.zeros((TOKENS, 3, 80)), "ndarray"),
        ("joined too narrow", lambda pair: pair[0], "shape"),
        ("joined rank", lambda pair: torch.cat(pair, -1)[0], "shape"),
        ("one tensor", lambda pair: pair[:1], "pair"),
        ("three tensors", lambda pair: (*pair, pair[0]), "pair"),
        ("nope none", on(0, nothing), "q_nope"),
        ("nope heads", on(0, fewer(1)), "q_nope"),
        ("nope width", on(0, more(2)), "q_nope"),
        ("nope dtype", on(0, to(torch.float16)), "float16"),
        ("nope stride", on(0, every_second), "stride"),
        ("nope device", on(0, meta), "device"),
        ("pe none", on(1, nothing), "q_pe"),
        ("pe tokens", on(1, more(0)), "q_pe"),
        ("pe heads", on(1, more(1)), "q_pe"),
        ("pe dtype", on(1, to(torch.float32)), "float32"),
        ("pe stride", on(1, every_second), "stride"),
        ("pe device", on(1, meta), "device"),
    ],
    "kv_c": [
        ("none", nothing, "NoneType"),
        ("tokens", fewer(0), "shape"),
        ("width", fewer(1), "shape"),
        ("rank", lambda tensor: tensor.unsqueeze(1), "shape"),
        ("dtype", to(torch.float16), "float16"),
        ("stride", every_second, "stride"),
        ("device", meta, "device"),
    ],
    "k_pe": [
        ("none", nothing, "NoneType"),
        ("tokens", more(0), "shape"),
        ("width", more(1), "shape"),
        ("two heads", lambda tensor: torch.stack((tensor, tensor), 1), "shape"),
        ("rank", flat, "shape"),
        ("dtype", to(torch.float32), "float32"),
        ("stride", every_second, "stride"),
        ("device", meta, "device"),
    ],
    "packed": [
        ("none", nothing, "NoneType"),
        ("not packed", lambda packed: torch.zeros(3, 48, 96, dtype=torch.bfloat16), "shape"),
        ("heads", fewer(0), "shape"),
        ("dtype", to(torch.float16), "float16"),
        ("stride", every_second, "stride"),
        ("not contiguous", lambda packed: torch.cat((packed, packed), 1)[:, : packed.shape[1]], "strides"),
        ("device", meta, "device"),
    ],
    "kv_cache": [
        ("none", nothing, "NoneType"),
        ("rank", lambda cache: cache[0], "shape"),
        ("width", lambda cache: cache[..., 1:], "shape"),
        ("no slots", lambda cache: cache[:, :0], "shape"),
        ("other flavour", other_flavour, "flavour"),
        ("dtype", lambda cache: torch.zeros(cache.shape, dtype=torch.bfloat16), "bfloat16"),
        ("signed bytes", lambda cache: cache.view(torch.int8), "int8"),
        ("stride", lambda cache: cache.view(torch.uint8).repeat_interleave(2, -1)[..., ::2], "stride"),
        ("device", lambda cache: torch.empty(cache.shape, dtype=cache.dtype, device="meta"), "device"),
    ],
    "slot_mapping": [
        ("none", nothing, "NoneType"),
        ("too short", lambda slots: slots[: TOKENS - 1], "shape"),
        ("rank", lambda slots: slots.unsqueeze(0), "shape"),
        ("int16", to(torch.int16), "int16"),
        ("float", to(torch.float32), "float32"),
        ("stride", every_second, "stride"),
        ("device", meta, "device"),
        ("one past the last", with_slot(SLOTS), f"slot {SLOTS},"),
        ("far outside", with_slot(2**62), f"slot {2**62},"),
    ],
    "positions": [
        ("none", nothing, "NoneType"),
        ("too short", fewer(0), "shape"),
        ("rank", lambda positions: positions.unsqueeze(0), "shape"),
        ("dtype", to(torch.uint8), "uint8"),
        ("stride", every_second, "stride"),
        ("device", meta, "device"),
    ],
    "cos_sin_cache": [
        ("none", nothing, "NoneType"),
        ("joined too narrow", lambda pair: pair[0], "shape"),
        ("one tensor", lambda pair: pair[:1], "pair"),
        ("three tensors", lambda pair: (*pair, pair[0]), "pair"),
        ("cos none", on(0, nothing), "(cos)"),
        ("cos width", on(0, more(1)), "(cos)"),
        ("sin width", on(1, fewer(1)), "(sin)"),
        ("sin rows", on(1, fewer(0)), "(sin)"),
        ("two types", on(1, to(torch.float32)), "(sin)"),
        ("dtype", on(0, to(torch.float64)), "float64"),
        ("no rows", lambda pair: tuple(each[:0] for each in pair), "shape"),
        ("stride", on(1, every_second), "stride"),
        ("device", on(0, meta), "device"),
    ],
    "out": [
        ("array", lambda out: np.zeros(out.shape), "ndarray"),
        ("too few heads", lambda out: out[:, :2], ">=3"),
        ("tokens", lambda out: out[:-1], "shape"),
        ("width", lambda out: out[..., 1:], "shape"),
        ("rank", lambda out: out[0], "shape"),
        ("other flavour", other_flavour, "flavour"),
        ("bytes", lambda out: out.view(torch.uint8), "uint8"),
        ("dtype", lambda out: torch.zeros(out.shape, dtype=torch.bfloat16), "bfloat16"),
        ("stride", lambda out: out.transpose(1, 2).contiguous().transpose(1, 2), "stride"),
        ("device", lambda out: torch.empty(out.shape, dtype=out.dtype, device="meta"), "device"),
    ],
}
WRONG["q_scale"] = WRONG["k_scale"] = [
    ("number", lambda scale: 0.5, "float"),
    ("double", to(torch.float64), "float64"),
    ("integer", to(torch.int32), "int32"),
    ("two elements", lambda scale: torch.ones(2), "shape"),
    ("no element", lambda scale: torch.ones(0), "shape"),
    ("rank", lambda scale: torch.ones(1, 1), "shape"),
    ("device", meta, "device"),
]

CASES = [(argument, change, word) for argument, wrongs in WRONG.items() for _, change, word in wrongs]
NAMES = [f"{argument}-{name.replace(' ', '-')}" for argument, wrongs in WRONG.items() for name, _, _ in wrongs]


def refuse(kernel: Kernel, launch: Launch, changes: Arguments) -> str:
    """The one line with which a call with `changes` is refused, nothing written."""
    before = output_bytes(launch).clone()
    with pytest.raises(ArgumentError) as caught:
        kernel(**{**launch.arguments, **changes})
    assert torch.equal(before, output_bytes(launch))
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_status == 2
    return message


@pytest.mark.parametrize(("argument", "change", "word"), CASES, ids=NAMES)
def test_a_wrong_argument_is_refused_by_name(kernel, argument, change, word):
    launch = make_launch(kernel, WORKLOAD)
    message = refuse(kernel, launch, {argument: change(launch.arguments[argument])})
    assert re.match(rf"{argument}(\[\d\] \(\w+\))?: ", message), message
    assert word in message


def test_packed_weights_for_a_kernel_without_absorb():
    kernel = load(small_spec(weight="none"), "cpu", arch="gfx942")
    assert refuse(kernel, make_launch(kernel, WORKLOAD), {"packed": torch.zeros(1)}).startswith("packed")
    with pytest.raises(ArgumentError, match=r"^w_uk: .*no absorb"):
        kernel.pack_weights(torch.zeros(3, 48, 96, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (nothing, "NoneType"),
        (lambda w: w.mT, "as [H, P, L]"),
        (lambda w: w[:2], "[2, 48, 96]"),
        (to(torch.float16), "float16"),
        (meta, "device"),
    ],
    ids=["none", "transposed", "heads", "dtype", "device"],
)
def test_wrong_weights_are_refused(kernel, change, word):
    with pytest.raises(ArgumentError, match=r"^w_uk: ") as caught:
        kernel.pack_weights(change(torch.zeros(3, 48, 96, dtype=torch.bfloat16)))
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_tokens_than_a_launch_takes(sparse):
    """Lanes are numbered in 32 bits; the batch is refused before any of it is done."""
    spec = small_spec(heads=4096, lora_rank=16, rope_dim=0, rope_style="none", weight="none")
    tokens = 2**31 // spec.heads + 1
    row = torch.zeros(1, 1, 16, dtype=torch.bfloat16)
    out = sparse((tokens, 4096, 16), (4096 * 16, 16, 1), torch.uint8).view(torch.float8_e4m3fnuz)
    cache = torch.zeros(1, 1, 16, dtype=torch.float8_e4m3fnuz)
    with pytest.raises(ArgumentError, match=f"^q: {tokens} tokens"):
        load(spec, "cpu", arch="gfx942")(
            (row.expand(tokens, 4096, 16), None), row[0].expand(tokens, 16), None, None, cache,
            torch.full((tokens,), -1, dtype=torch.int32), out=out,
        )  # fmt: skip


@pytest.mark.parametrize("given", [True, False], ids=["out", "no out"])
@pytest.mark.parametrize("tokens", [0, TOKENS])
def test_what_a_call_returns(kernel, tokens, given):
    launch = make_launch(kernel, Workload(tokens=tokens, out="dense"))
    arguments = launch.arguments if given else {**launch.arguments, "out": None}
    q_out = kernel(**arguments)
    assert (q_out is arguments["out"]) == given
    assert q_out.shape == (tokens, 3, 128)
    assert q_out.dtype is torch.float8_e4m3fnuz
    if not given:
        kernel(**launch.arguments)
        assert torch.equal(q_out.view(torch.uint8), launch.arguments["out"].view(torch.uint8))


def test_no_tokens_touch_nothing(kernel):
    launch = make_launch(kernel, Workload(tokens=0))
    before = output_bytes(launch).clone()
    kernel(**launch.arguments)
    assert torch.equal(before, output_bytes(launch))


def test_what_is_not_read_may_be_missing():
    kernel = load(small_spec(rope_dim=0, rope_style="none", q_dtype="bf16", kv_dtype="bf16"), "cpu", arch="gfx950")
    arguments = make_launch(kernel, WORKLOAD).arguments
    q_nope, _ = arguments.pop("q")
    for name in ("k_pe", "positions", "cos_sin_cache", "q_scale", "k_scale"):
        arguments.pop(name)
    forms = (q_nope, (q_nope, None), [q_nope, q_nope[..., :0]])
    results = [kernel(q=q, k_pe=None, **arguments).clone().view(torch.int16) for q in forms]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"device": "cpu", "arch": "gfx1201"}, "gfx942"),
        ({"device": "cpu"}, "arch"),
        ({"device": "cuda:99", "arch": "gfx942"}, "device"),
        ({"device": "meta"}, "device"),
        ({"device": "nonsense"}, "device"),
    ],
)
def test_load_refuses_what_it_cannot_run(arguments, word):
    with pytest.raises(TargetError) as caught:
        load(small_spec(), **arguments)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def specs() -> st.SearchStrategy[PrologueSpec]:
    """Any valid spec whose kernel runs in a moment."""

    def build(dtype: str, rope: tuple[int, str], absorb: bool, fp8: tuple[bool, bool], **others: Any) -> PrologueSpec:
        q_dtype, kv_dtype = ("fp8" if each else dtype for each in fp8)
        weight = dtype if absorb else "none"
        return PrologueSpec(
            dtype=dtype, rope_dim=rope[0], rope_style=rope[1], weight=weight, q_dtype=q_dtype, kv_dtype=kv_dtype, **others
        )

    width = st.integers(1, 12).map(lambda count: 16 * count)
    rotated = st.tuples(st.integers(1, 50).map(lambda pairs: 2 * pairs), st.sampled_from(["gptj", "neox"]))
    carried = st.tuples(st.integers(0, 50).map(lambda pairs: 2 * pairs), st.just("none"))
    return st.builds(
        build,
        dtype=st.sampled_from(["bf16", "fp16"]),
        rope=rotated | carried,
        absorb=st.booleans(),
        fp8=st.tuples(st.booleans(), st.booleans()),
        heads=st.integers(1, 20),
        nope_dim=width,
        lora_rank=width,
        rounding=st.sampled_from(["fused", "stepwise"]),
    )


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spec=specs(), arch=st.sampled_from(["gfx942", "gfx950"]), tokens=st.integers(0, 40), seed=st.integers(0, 99))
def test_any_spec_gives_a_right_kernel(spec, arch, tokens, seed):
    check(load(spec, "cpu", arch=arch), Workload(tokens=tokens), seed=seed)


def test_a_load_under_a_fake_mode_is_refused():
    """The kernel stays for the whole process, and a tensor without memory with it."""
    with FakeTensorMode(), pytest.raises(MlagenError, match="FakeTensor: load kernels outside of fake modes"):
        load(small_spec(heads=7), "cpu", arch="gfx950")
    assert load(small_spec(heads=7), "cpu", arch="gfx950").unit_scales[0].item() == 1.0


def test_a_load_under_another_default_dtype():
    """vLLM sets the model's while it loads one; a scale of 1 is fp32 all the same."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        kernel = load(small_spec(heads=5), "cpu", arch="gfx950")
    finally:
        torch.set_default_dtype(torch.float32)
    check(kernel, Workload(scales="none"))


def test_packed_weights_off_their_alignment_are_refused():
    """The kernel reads them 16 bytes at a time, whatever the other rows are; a second call looks like the first, and is not."""
    kernel = load(small_spec(), "cpu", arch="gfx942")
    launch = make_launch(kernel, WORKLOAD)
    kernel(**launch.arguments)
    packed = launch.arguments["packed"]
    shifted = torch.empty(packed.numel() + 1, dtype=packed.dtype)[1:].view(packed.shape).copy_(packed)
    with pytest.raises(ArgumentError, match=r"^packed: starts off a multiple of 16 bytes"):
        kernel(**{**launch.arguments, "packed": shifted})


def test_what_is_not_read_may_be_anything():
    """Without rotation nobody looks at positions and tables; without RoPE columns, nobody looks at k_pe."""
    kernel = load(small_spec(rope_dim=0, rope_style="none"), "cpu", arch="gfx942")
    launch = make_launch(kernel, Workload(tokens=3))
    kernel(**{**launch.arguments, "positions": [1, 2, 3], "cos_sin_cache": "none", "k_pe": "none"})
    assert all(part.passed for part in verify.compare_case(kernel.spec, kernel.target, launch.case))
