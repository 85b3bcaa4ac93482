"""Scales for rows: what they are, what the codes then mean, and how a call takes and returns them."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Workload, check, failures, make_launch, output_bytes, small_spec
from hypothesis import given
from hypothesis import strategies as st
from sweep import ARCHS

from mlagen import verify
from mlagen.codegen import generate
from mlagen.errors import ArgumentError
from mlagen.ir import LEAST_ROW_SCALE
from mlagen.runtime import Kernel, load

pytestmark = pytest.mark.host

SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "neox": {"rope_style": "neox", "nope_first": False},
    "stepwise": {"rounding": "stepwise", "dtype": "fp16", "rope_dim": 2},
    "absorbed": {"weight": "none"},
    "absorbed, neox, stepwise": {"weight": "none", "rope_style": "neox", "rounding": "stepwise", "nope_first": False},
    "copied": {"weight": "none", "rope_style": "none", "rope_dim": 6},
    "no RoPE columns": {"rope_style": "none", "rope_dim": 0},
    "limit": {"fp8_max": 224.0},
    "query only": {"write_kv": False},
    "KV heads": {"kv_heads": 2, "kv_dtype": "bf16"},
    "segmented": {"kv_layout": "segmented"},
    "fp8_ds_mla": {"kv_layout": "fp8_ds_mla", "lora_rank": 128},
    "fp8 weights": {"weight": "fp8"},
    "blocks": {"weight": "fp8-block", "nope_dim": 160, "lora_rank": 256},
    "mxfp4": {"weight": "mxfp4", "nope_dim": 64},
    "a8": {"weight": "fp8", "compute": "a8", "kv_layout": "fp8_ds_mla", "lora_rank": 128},
    "passes": {"nope_dim": 256, "lora_rank": 1024},
    "passes over blocks": {"weight": "fp8-block", "nope_dim": 256, "lora_rank": 1024, "rounding": "stepwise"},
    "passes of a8": {"weight": "fp8", "compute": "a8", "nope_dim": 256, "lora_rank": 1024},
}
SMALL = [changes for name, changes in SPECS.items() if "passes" not in name]
TOKENS = 5
WORKLOAD = Workload(tokens=TOKENS, layout="dense", slots="last")


def kernel_of(changes: dict[str, Any], arch: str = "gfx950") -> Kernel:
    return load(small_spec(**{"q_scaling": "token", **changes}), "cpu", arch=arch)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
def test_the_oracle_explains_it(arch, changes):
    kernel = kernel_of(changes, arch)
    for seed, workload in enumerate(
        (Workload(special=True), Workload(tokens=9, layout="joined", out="head major"), Workload(tokens=0))
    ):
        check(kernel, workload, seed=seed)


@pytest.mark.parametrize("arch", ARCHS)
def test_these_take_several_passes(arch):
    for name, changes in SPECS.items():
        schedule = generate(small_spec(q_scaling="token", **changes), kernel_of({}, arch).target).schedule
        assert (schedule.passes > 1) == ("passes" in name), name


@given(
    changes=st.sampled_from([each for each in SMALL if "compute" not in each]),
    arch=st.sampled_from(ARCHS),
    tokens=st.integers(1, 20),
    out=st.sampled_from(["dense", "spare heads", "head major"]),
    seed=st.integers(0, 1000),
)
def test_the_codes_are_those_of_a_call_with_that_scale(changes, arch, tokens, out, seed):
    """Bit for bit, row by row, and the cache is the same."""
    static, token = kernel_of({**changes, "q_scaling": "static"}, arch), kernel_of(changes, arch)
    workload = Workload(tokens=tokens, out=out, special=True)
    launch, expected = (make_launch(kernel, workload, seed=seed) for kernel in (token, static))
    assert not failures(token, launch)
    q_out, scales = (each.tensor for each in launch.case.queries)
    for row, head in {(0, 0), (tokens - 1, 2), (tokens // 2, seed % 3)}:
        static(**{**expected.arguments, "q_scale": scales[row, head].clone()})
        mine, theirs = (each[row, head].view(torch.uint8) for each in (q_out, expected.case.q_out.tensor))
        assert torch.equal(mine, theirs)
    if token.spec.write_kv:
        assert torch.equal(*(each.case.kv_cache.tensor.view(torch.uint8) for each in (launch, expected)))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("nope", "pe", "scale", "codes"),
    [
        ([1.0, -2.0], [0.5], 2.0, [0.5, -1.0, 0.25]),
        ([1.0, 0.5], [-4.0], 4.0, [0.25, 0.125, -1.0]),
        ([0.0, -0.0], [0.0], 0.0, [0.0, 0.0, 0.0]),
        ([math.nan, 2.0], [1.0], 2.0, [math.nan, 1.0, 0.5]),
        ([1.0, 1.0], [math.nan], 1.0, [1.0, 1.0, math.nan]),
        ([math.nan, math.nan], [math.nan], 0.0, [math.nan, math.nan, math.nan]),
        ([math.inf, 1.0], [2.0], math.inf, [math.nan, 0.0, 0.0]),
        ([1.0, math.nan], [-math.inf], math.inf, [0.0, math.nan, math.nan]),
        ([2.0**-130, 0.0], [0.0], 0.0, None),
    ],
    ids=str,
)
def test_what_a_scale_is_made_of(arch, nope, pe, scale, codes):
    """The largest magnitude of both parts; `codes` are in units of the largest one."""
    kernel = kernel_of({"weight": "none", "rope_style": "none"}, arch)
    launch = make_launch(kernel, Workload(tokens=1, layout="dense", out="dense"))
    q_nope, q_pe = (torch.zeros_like(part) for part in launch.arguments["q"])
    q_nope[0, 1, 40:42], q_pe[0, 1, 17] = torch.tensor(nope), pe[0]
    q_nope[0, 0], q_nope[0, 2] = 7.0, -9.0  # other heads
    q_out, q_scales = kernel(**{**launch.arguments, "q": (q_nope, q_pe)})
    largest = kernel.target.fp8.largest
    wanted = [torch.tensor(each) / largest for each in (7.0, scale, 9.0)]
    assert q_scales[0].tolist() == [max(each.item(), LEAST_ROW_SCALE) for each in wanted]
    if codes is not None:
        found = q_out[0, 1].float()[[40, 41, 96 + 17]]
        assert torch.allclose(found / largest, torch.tensor(codes), rtol=2**-4, atol=0, equal_nan=True)


@pytest.mark.parametrize("part", ["q_nope", "q_pe"])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_column_counts(arch, part):
    """The absorb's rows, where waves, lanes and passes have a part each; every token holds its largest value elsewhere."""
    kernel = kernel_of({"nope_dim": 256, "lora_rank": 1024, "rope_style": "none", "write_kv": False}, arch)
    spec = kernel.spec
    columns = 1024 if part == "q_nope" else 32
    w_uk = torch.zeros(3, 256, 1024, dtype=torch.bfloat16)
    q_nope, q_pe = (torch.zeros(columns, 3, width, dtype=torch.bfloat16) for width in (256, 32))
    if part == "q_pe":
        q_pe[torch.arange(32), :, torch.arange(32)] = 3.0
        kept = kernel((q_nope, q_pe), None, None, kernel.pack_weights(w_uk), None, None)
    else:
        for block in range(4):  # 256 columns at a time have a row of W_UK each
            w_uk[:, torch.arange(256), 256 * block + torch.arange(256)] = 1.0
        q_nope[torch.arange(1024), :, torch.arange(1024) % 256] = 3.0
        mine = torch.zeros_like(w_uk)
        results = []
        for block in range(4):
            span = slice(256 * block, 256 * block + 256)
            mine.zero_()[:, :, span] = w_uk[:, :, span]
            rows = q_nope[span]
            results.append(kernel((rows, q_pe[span]), None, None, kernel.pack_weights(mine), None, None))
        kept = tuple(torch.cat(each) for each in zip(*results, strict=True))
    q_out, q_scales = kept
    assert torch.equal(q_scales, torch.full((columns, spec.heads), 3.0) / kernel.target.fp8.largest)
    first = 0 if part == "q_nope" else 1024
    assert (q_out.float()[torch.arange(columns), :, first + torch.arange(columns)] == kernel.target.fp8.largest).all()


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return kernel_of({})


@pytest.mark.parametrize("tokens", [0, TOKENS])
@pytest.mark.parametrize("form", [tuple, list, None], ids=["tuple", "list", "no out"])
def test_what_a_call_returns(kernel, tokens, form):
    launch = make_launch(kernel, Workload(tokens=tokens, out="dense"))
    given = launch.arguments["out"]
    made = kernel(**{**launch.arguments, "out": form(given) if form else None})
    assert isinstance(made, tuple)
    assert [(tuple(each.shape), each.dtype) for each in made] == [
        ((tokens, 3, 128), torch.float8_e4m3fn),
        ((tokens, 3), torch.float32),
    ]
    assert [mine is theirs for mine, theirs in zip(made, given, strict=True)] == [form is not None] * 2
    kernel(**launch.arguments)
    assert all(torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)) for mine, theirs in zip(made, given, strict=True))


WRONG = [
    ("q_scale", lambda _: torch.ones(()), "q_scale: this kernel computes and returns the query's scales"),
    ("q_scale", lambda _: 1.0, "q_scale: this kernel computes"),
    ("out", lambda pair: pair[0], "out: Tensor, expected a pair (q_out, q_scales) or None"),
    ("out", lambda pair: pair[:1], "out: 1 tensors, expected a pair"),
    ("out", lambda pair: pair[::-1], "out[0] (q_out): shape [5, 6], expected [5, >=3, 128]"),
    ("out", lambda pair: (pair[0], None), "out[1] (q_scales): expected a tensor [5, >=3], got NoneType"),
    ("out", lambda pair: (pair[0], pair[1][:4]), "out[1] (q_scales): shape [4, 6]"),
    ("out", lambda pair: (pair[0], pair[1][:, :2]), "out[1] (q_scales): shape [5, 2]"),
    ("out", lambda pair: (pair[0], pair[1].half()), "out[1] (q_scales): dtype float16, expected float32"),
    ("out", lambda pair: (pair[0], torch.zeros(6, 5).mT), "out[1] (q_scales): last stride 5, expected 1"),
    ("out", lambda pair: (pair[0], pair[1][:1].expand(5, 6)), "out[1] (q_scales): strides [0, 1]"),
]


@pytest.mark.parametrize(("argument", "change", "message"), WRONG)
def test_a_wrong_argument_is_refused_by_name(kernel, argument, change, message):
    launch = make_launch(kernel, WORKLOAD)
    before = output_bytes(launch).clone()
    for _ in range(2):
        with pytest.raises(ArgumentError) as caught:
            kernel(**{**launch.arguments, argument: change(launch.arguments[argument])})
        assert str(caught.value).startswith(message)
    assert torch.equal(before, output_bytes(launch))
    assert not failures(kernel, launch)
    with pytest.raises(ArgumentError):  # after a good call, too
        kernel(**{**launch.arguments, argument: change(launch.arguments[argument])})


def test_scales_may_lie_anywhere(kernel):
    """In the same call objects as before: others strides, another start, and more heads than q_out has."""
    for gap, more in ((0, 0), (5, 2), (0, 7), (1, 0)):
        launch = make_launch(kernel, WORKLOAD)
        kernel(**launch.arguments)
        expected = [each.tensor[:, :3].clone() for each in launch.case.queries]
        scales = torch.full((TOKENS, 3 + more + gap + 1), -1.0)[:, 1 : 4 + more]
        kernel(**{**launch.arguments, "out": (launch.arguments["out"][0], scales)})
        assert torch.equal(scales[:, :3], expected[1])
        assert (scales[:, 3:] == -1).all()


def test_verify_compares_the_scales(kernel):
    ((_, parts),) = verify.verify(kernel, [400])
    assert [part.name for part in parts] == ["q_out nope", "q_out pe", "q_scales", "kv_cache nope", "kv_cache pe"]
    assert [part.elements for part in parts[:3]] == [400 * 3 * 96, 400 * 3 * 32, 400 * 3]
    assert all(part.passed for part in parts)
    wrong = replace(parts[2], outside=1)
    assert not wrong.passed


@pytest.mark.parametrize("factor", [1 + 2**-10, 1 - 2**-10])
@pytest.mark.parametrize("changes", [{}, {"rounding": "stepwise"}, {"weight": "none"}], ids=["fused", "stepwise", "absorbed"])
def test_a_scale_that_is_a_little_wrong_is_outside(changes, factor):
    """Bounds that hold much more than rounding would explain anything."""
    kernel = kernel_of(changes)
    case = verify.make_case(kernel.spec, kernel.target, 33)
    verify.run_case(kernel, case)
    case.q_second.tensor.mul_(factor)
    wrong = {part.name for part in verify.compare_case(kernel.spec, kernel.target, case) if not part.passed}
    assert wrong == {"q_scales"}
