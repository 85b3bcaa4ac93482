"""Kernels that make only the query or only the cache's entries: the bytes of the kernel that makes both, and nothing else."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Workload, check, failures, make_launch, output_bytes, small_spec
from hypothesis import given
from hypothesis import strategies as st
from sweep import ARCHS

from mlagen import verify
from mlagen.errors import ArgumentError
from mlagen.runtime import Kernel, load

pytestmark = pytest.mark.host

SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "neox": {"rope_style": "neox", "kv_dtype": "bf16"},
    "absorbed": {"weight": "none", "q_dtype": "bf16", "nope_first": False},
    "copied": {"rope_style": "none", "rope_dim": 6, "q_dtype": "bf16", "kv_dtype": "bf16"},
    "no RoPE columns": {"rope_style": "none", "rope_dim": 0},
    "stepwise": {"rounding": "stepwise", "dtype": "fp16", "rope_dim": 2},
}
PARTS = ("write_q", "write_kv")
OF_THE_QUERY, OF_THE_CACHE = ("q", "q_scale"), ("kv_c", "k_pe", "kv_cache", "slot_mapping", "k_scale")
TOKENS = 5
WORKLOAD = Workload(tokens=TOKENS, layout="dense", slots="last")


def kernels(changes: dict[str, Any], left_out: str, arch: str = "gfx950") -> tuple[Kernel, Kernel]:
    """The kernel that makes both, and the one that leaves a part out."""
    whole, part = (load(small_spec(**changes, **more), "cpu", arch=arch) for more in ({}, {left_out: False}))
    return whole, part


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("left_out", PARTS)
@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS)
def test_the_oracle_explains_it(arch, left_out, changes):
    _, kernel = kernels(changes, left_out, arch)
    for seed, workload in enumerate(
        (Workload(special=True), Workload(tokens=9, layout="joined", scales="none"), Workload(tokens=0))
    ):
        check(kernel, workload, seed=seed)


@given(
    changes=st.sampled_from(list(SPECS.values())),
    left_out=st.sampled_from(PARTS),
    arch=st.sampled_from(ARCHS),
    tokens=st.integers(0, 40),
    out=st.sampled_from(["dense", "spare heads", "head major"]),
    cache=st.sampled_from(["dense", "padded", "interleaved"]),
    seed=st.integers(0, 1000),
)
def test_it_is_a_part_of_what_the_whole_kernel_writes(changes, left_out, arch, tokens, out, cache, seed):
    """Bit for bit, what is left alone included."""
    whole, part = kernels(changes, left_out, arch)
    workload = Workload(tokens=tokens, out=out, cache=cache, special=True)
    expected, launch = (make_launch(kernel, workload, seed=seed) for kernel in (whole, part))
    assert not failures(whole, expected)
    kept = "kv_cache" if left_out == "write_q" else "out"
    leave_out = {"packed": None, "out": None} if left_out == "write_q" else {"kv_cache": None}
    part(**{**expected.arguments, **leave_out, kept: launch.arguments[kept]})
    assert torch.equal(*(output_bytes(replace(each, case=only(each.case, kept))) for each in (expected, launch)))


def only(case: verify.Case, kept: str) -> verify.Case:
    return replace(case, q_out=None) if kept == "kv_cache" else replace(case, kv_cache=None)


@pytest.mark.parametrize("tokens", [0, TOKENS])
def test_what_a_call_without_a_query_returns(tokens):
    _, kernel = kernels({}, "write_q")
    launch = make_launch(kernel, Workload(tokens=tokens))
    assert kernel(**launch.arguments) is None


def test_a_query_without_a_cache_is_allocated():
    _, kernel = kernels({}, "write_kv")
    launch = make_launch(kernel, Workload(tokens=TOKENS, out="dense"))
    made = kernel(**{**launch.arguments, "out": None})
    kernel(**launch.arguments)
    assert torch.equal(made.view(torch.uint8), launch.case.q_out.tensor.view(torch.uint8))


@pytest.mark.parametrize(("left_out", "unread"), [("write_q", OF_THE_QUERY), ("write_kv", OF_THE_CACHE)])
def test_what_is_not_read_may_be_anything(left_out, unread):
    """Slots of a cache that is not there are not looked at either."""
    _, kernel = kernels({}, left_out)
    launch = make_launch(kernel, WORKLOAD)
    for value in (None, "anything", torch.full((1,), 1 << 40)):
        assert kernel(**{**launch.arguments, **dict.fromkeys(unread, value)}) is launch.arguments["out"]
        assert all(part.passed for part in verify.compare_case(kernel.spec, kernel.target, launch.case))


def moved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


WRONG = [
    ("write_q", "out", lambda _: torch.zeros(5, 3, 128), "out: this kernel writes no query (write_q=False), pass None"),
    ("write_q", "packed", lambda _: torch.zeros(1), "packed: this kernel does no absorb"),
    ("write_q", "kv_c", lambda _: None, "kv_c: expected a tensor [any, 96], got NoneType"),
    ("write_q", "kv_c", lambda kv_c: kv_c[0], "kv_c: shape [96]"),
    ("write_q", "kv_c", lambda kv_c: kv_c[:4], "k_pe: shape [5, 32], expected [4, 32]"),
    ("write_q", "k_pe", lambda k_pe: k_pe[:4], "k_pe: shape [4, 32], expected [5, 32]"),
    ("write_q", "k_scale", lambda _: 1.0, "k_scale: expected an fp32 tensor"),
    ("write_q", "kv_cache", moved, "kv_cache: on device meta"),
    ("write_q", "slot_mapping", lambda slots: slots[:4], "slot_mapping: shape [4], expected [>=5]"),
    ("write_q", "slot_mapping", lambda slots: slots.index_fill(0, torch.tensor([4]), 32), "slot_mapping: slot 32,"),
    ("write_q", "positions", lambda positions: positions[:4], "positions: shape [4], expected [5]"),
    ("write_kv", "q", lambda _: None, "q: expected a tensor [any, 3, 80], got NoneType"),
    ("write_kv", "q", lambda pair: (pair[0], pair[1][:4]), "q[1] (q_pe): shape [4, 3, 32]"),
    ("write_kv", "q_scale", moved, "q_scale: on device meta"),
    ("write_kv", "packed", lambda _: None, "packed: expected a tensor"),
    ("write_kv", "positions", lambda positions: positions.repeat(2), "positions: shape [10], expected [5]"),
    ("write_kv", "out", lambda out: out[:4], "out: shape [4, "),
]


@pytest.mark.parametrize(("left_out", "argument", "change", "message"), WRONG)
def test_a_wrong_argument_is_refused_by_name(left_out, argument, change, message):
    _, kernel = kernels({}, left_out)
    launch = make_launch(kernel, WORKLOAD)
    before = output_bytes(launch).clone()
    for _ in range(2):
        with pytest.raises(ArgumentError) as caught:
            kernel(**{**launch.arguments, argument: change(launch.arguments[argument])})
        assert str(caught.value).startswith(message)
    assert torch.equal(before, output_bytes(launch))


def test_too_many_entries_for_one_launch(sparse):
    """Lanes are numbered in 32 bits; without a query it is kv_c that has too many rows."""
    kernel = load(small_spec(lora_rank=2048, rope_dim=0, rope_style="none", write_q=False, kv_dtype="bf16"), "cpu", arch="gfx942")
    tokens = 2**31 // 128 + 1
    row, cache = torch.zeros(1, 2048, dtype=torch.bfloat16), torch.zeros(1, 1, 2048, dtype=torch.bfloat16)
    with pytest.raises(ArgumentError, match=f"^kv_c: {tokens} tokens"):
        kernel(None, row.expand(tokens, 2048), None, None, cache, torch.full((tokens,), -1, dtype=torch.int32))


@pytest.mark.parametrize("left_out", PARTS)
def test_verify_compares_what_is_written(left_out):
    _, kernel = kernels({}, left_out)
    ((_, parts),) = verify.verify(kernel, [17])
    assert [part.name for part in parts] == [
        f"{'kv_cache' if left_out == 'write_q' else 'q_out'} {half}" for half in ("nope", "pe")
    ]
    assert all(part.passed for part in parts)


# A split query


@given(
    changes=st.sampled_from([each for each in SPECS.values() if each.get("rope_dim") != 0]),
    arch=st.sampled_from(ARCHS),
    tokens=st.integers(0, 40),
    out=st.sampled_from(["dense", "spare heads", "head major"]),
    seed=st.integers(0, 1000),
)
def test_a_split_query_has_the_columns_of_the_joined_one(changes, arch, tokens, out, seed):
    """Bit for bit, and the cache is the same."""
    joined, split = (load(small_spec(**changes, q_split=each), "cpu", arch=arch) for each in (False, True))
    launches = [make_launch(kernel, Workload(tokens=tokens, out=out, special=True), seed=seed) for kernel in (joined, split)]
    for kernel, launch in zip((joined, split), launches, strict=True):
        assert not failures(kernel, launch)
    (whole, *pair), caches = (
        [query.tensor for launch in launches for query in launch.case.queries],
        [launch.case.kv_cache.tensor.view(torch.uint8) for launch in launches],
    )
    columns = (joined.spec.nope_columns, joined.spec.rope_columns)
    size = whole.dtype.itemsize
    for part, place in zip(pair, columns, strict=True):
        expected = whole.view(torch.uint8)[:, :3, place.start * size : place.stop * size]
        assert torch.equal(part.view(torch.uint8)[:, :3], expected)
    assert torch.equal(*caches)


@pytest.fixture(scope="module")
def split() -> Kernel:
    return load(small_spec(q_split=True, q_dtype="bf16"), "cpu", arch="gfx950")


@pytest.mark.parametrize("tokens", [0, TOKENS])
@pytest.mark.parametrize("form", [tuple, list, None], ids=["tuple", "list", "no out"])
def test_what_a_call_with_a_split_query_returns(split, tokens, form):
    launch = make_launch(split, Workload(tokens=tokens, out="dense"))
    given = launch.arguments["out"]
    made = split(**{**launch.arguments, "out": form(given) if form else None})
    assert isinstance(made, tuple)
    assert [(tuple(each.shape), each.dtype) for each in made] == [
        ((tokens, 3, 96), torch.bfloat16),
        ((tokens, 3, 32), torch.bfloat16),
    ]
    assert [mine is theirs for mine, theirs in zip(made, given, strict=True)] == [form is not None] * 2
    split(**launch.arguments)
    assert all(torch.equal(mine.view(torch.int16), theirs.view(torch.int16)) for mine, theirs in zip(made, given, strict=True))


WRONG_PAIRS = [
    (lambda pair: pair[0], "out: Tensor, expected a pair (ql_nope_out, q_pe_out) or None"),
    (lambda pair: pair[:1], "out: 1 tensors, expected a pair"),
    (lambda pair: pair[::-1], "out[0] (ql_nope_out): shape [5, 6, 32], expected [5, >=3, 96]"),
    (lambda pair: (pair[0], None), "out[1] (q_pe_out): expected a tensor [5, >=3, 32], got NoneType"),
    (lambda pair: (pair[0], pair[1][:4]), "out[1] (q_pe_out): shape [4, 6, 32]"),
    (lambda pair: (pair[0][:, :2], pair[1]), "out[0] (ql_nope_out): shape [5, 2, 96]"),
    (lambda pair: (pair[0], pair[1].half()), "out[1] (q_pe_out): dtype float16, expected bfloat16"),
    (lambda pair: (pair[0][:1].expand(5, 6, 96), pair[1]), "out[0] (ql_nope_out): strides [0, "),
]


@pytest.mark.parametrize(("change", "message"), WRONG_PAIRS)
def test_a_wrong_pair_is_refused_by_name(split, change, message):
    launch = make_launch(split, WORKLOAD)
    for _ in range(2):
        with pytest.raises(ArgumentError) as caught:
            split(**{**launch.arguments, "out": change(launch.arguments["out"])})
        assert str(caught.value).startswith(message)
    assert not failures(split, launch)


def test_verify_compares_a_split_query_part_by_part(split):
    ((_, parts),) = verify.verify(split, [17])
    assert [part.name for part in parts] == ["ql_nope_out", "q_pe_out", "kv_cache nope", "kv_cache pe"]
    assert [part.elements for part in parts[:2]] == [17 * 3 * 96, 17 * 3 * 32]
    assert all(part.passed for part in parts)
