"""mlagen.verify itself: what it accepts, what it says, and that its own inputs reach what the kernels do."""

import dataclasses
import re
import time

import pytest
import torch
from helpers import build_kernel, small_spec

from mlagen import verify
from mlagen.errors import VerificationError
from mlagen.runtime import Kernel, load
from mlagen.spec import PrologueSpec

pytestmark = pytest.mark.host

TOKENS = (1, 5, 16, 64)


def mutated(old: str, new: str) -> Kernel:
    spec = small_spec()
    return build_kernel(spec, "gfx942", load(spec, "cpu", arch="gfx942").generated, (old, new))


@pytest.mark.parametrize(
    ("exact", "elements", "words"),
    [(0, 0, "100.000 %"), (5, 5, "100.000 %"), (0, 5, "0.000 %"), (2, 3, "66.666 %"), (10**9 - 1, 10**9, "99.999 %")],
)
def test_only_all_of_them_is_100_percent(exact, elements, words):
    part = verify.Comparison("q_out", elements, exact, 0, 16.0, 0, must_be_exact=False)
    assert part.exact_percent == words
    assert verify.describe(part) == f"q_out: {words} of {elements} exact, max error 16"


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_deepseek_r1_is_verified_in_time(arch):
    """TP 8 and up to 64 tokens, compilation included."""
    begin = time.monotonic()
    kernel = load(PrologueSpec.from_model("deepseek-r1", tp=8), "cpu", arch=arch)
    results = dict(verify.verify(kernel, TOKENS))
    assert time.monotonic() - begin < 20
    assert tuple(results) == TOKENS
    for parts in results.values():
        assert [part.name for part in parts] == ["q_out nope", "q_out pe", "kv_cache nope", "kv_cache pe"]
        assert all(part.passed for part in parts)
    assert [part.elements for part in results[1]] == [16 * 512, 16 * 64, 512, 64]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("a * cos - b * sin", "a * cos + b * sin", r"q_out pe: .* elements that rounding does not explain"),
        ("+ 96 + column", "+ 97 + column", r"kv_cache|q_out.* bytes written outside the output"),
        ("if (slot < 0) return;", "return;", r"kv_cache nope: 0\.000 % of \d+ exact"),
    ],
    ids=["wrong values", "stray bytes", "nothing written"],
)
def test_require_names_the_output(old, new, message):
    kernel = mutated(old, new)
    with pytest.raises(VerificationError) as caught:
        verify.require(kernel, [16])
    assert str(caught.value).startswith(f"{kernel.generated.name}, 16 tokens: ")
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("saturate(x[i] * inverse_scale, limit)", "x[i] * inverse_scale"),
        ("inverse_scale, 240.0f)", "inverse_scale, 224.0f)"),
        ("x < -limit ? -limit : x > limit ? limit : x", "std::max(-limit, std::min(limit, x))"),
        ("if (slot < 0) return;", "if (slot <= 0) return;"),
        ("position < 0 ? 0 : ", "position < 0 ? 1 : "),
        (": args.max_position - 1", ": args.max_position - 2"),
    ],
    ids=["saturation", "limit", "NaN", "slot 0", "negative position", "late position"],
)
def test_its_own_inputs_reach_the_edges(old, new):
    """A user runs `mlagen verify` alone: its inputs saturate, hold NaN, fill slot 0 and leave the table."""
    with pytest.raises(VerificationError):
        verify.require(mutated(old, new), TOKENS)


SOUND = verify.Comparison("part", 1000, 995, 0, 0.5, 0, must_be_exact=False)


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"exact": 990}, True),
        ({"exact": 989}, False),
        ({"elements": 999, "exact": 500}, True),  # a handful
        ({"elements": 0, "exact": 0}, True),
        ({"outside": 1}, False),
        ({"stray": 1}, False),
        ({"must_be_exact": True}, False),
        ({"must_be_exact": True, "exact": 1000}, True),
        ({"must_be_exact": True, "elements": 10, "exact": 9}, False),
    ],
    ids=str,
)
def test_what_passes(changes, passed):
    assert dataclasses.replace(SOUND, **changes).passed == passed


def test_a_description_has_share_and_error():
    assert verify.describe(SOUND) == "part: 99.500 % of 1000 exact, max error 0.5"
    wrong = verify.describe(dataclasses.replace(SOUND, outside=3, stray=7))
    assert "3 elements that rounding does not explain" in wrong
    assert "7 bytes written outside the output" in wrong


def test_cases_are_the_same_for_the_same_seed():
    spec, target = small_spec(), load(small_spec(), "cpu", arch="gfx942").target
    one, same, other = (verify.make_case(spec, target, 9, seed=seed).inputs["kv_c"].view(torch.int16) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
