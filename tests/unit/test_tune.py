"""Tuning without a GPU: what is timed, and what is chosen of it."""

import dataclasses
import itertools
from dataclasses import replace

import pytest

from mlagen.errors import ScheduleError
from mlagen.layout import Layout
from mlagen.lowering import lower
from mlagen.schedule import choose_schedule, lay_out
from mlagen.spec import PrologueSpec
from mlagen.tables import Entry, Range
from mlagen.target import TARGETS, find_target
from mlagen.tune import MOST_LAYOUTS, TOKENS, Timing, candidates, choose, entry_of, merge

SPEC = PrologueSpec(heads=16, nope_dim=128, lora_rank=512, rope_dim=64, rope_style="gptj")
A, B, C, D = (Layout(waves) for waves in (1, 2, 4, 8))


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_candidate_fits_and_none_comes_twice(arch, tokens):
    target = find_target(arch)
    found = candidates(SPEC, target, tokens, dependent=False)
    assert len(found) == len(set(found)) > 0
    lowered = lower(SPEC.program(target))
    for each in found:
        layout = each.layout
        schedule = lay_out(lowered, target, layout)
        launch = schedule.launch(lowered.segments, tokens, SPEC.heads, token_tiles=each.token_tiles)
        assert launch.token_tiles_per_workgroup == each.token_tiles
    assert any(each.layout.block for each in found) == (arch == "sm_90" and tokens >= 8)


def test_what_does_not_fit_is_no_candidate():
    wide = PrologueSpec(heads=16, nope_dim=256, lora_rank=512, rope_dim=64, rope_style="gptj")
    found = candidates(wide, TARGETS["sm_90"], 64, dependent=True)
    assert {each.layout.waves_per_workgroup for each in found} == {1, 2, 4, 8}
    assert all(each.layout.dependent for each in found)
    lowered = lower(wide.program(TARGETS["sm_90"]))
    with pytest.raises(ScheduleError, match="16 waves"):
        choose_schedule(lowered, TARGETS["sm_90"], waves_per_workgroup=16)


@pytest.mark.parametrize("arch", TARGETS)
def test_rows_with_scales_have_one_layout(arch):
    """Their workgroup has whole rows; what is left to choose is how the tokens are split."""
    found = candidates(replace(SPEC, q_scaling="token"), TARGETS[arch], 64, dependent=False)
    assert {each.layout for each in found} == {Layout()}
    assert len(found) > 1


def test_wider_tiles_are_tried_for_weights_in_codes():
    def widths(spec: PrologueSpec, **only: object) -> set[int | None]:
        found = candidates(spec, TARGETS["sm_90"], 64, dependent=False, **only)
        return {each.layout.m_tiles for each in found}

    codes = replace(SPEC, weight="fp8")
    assert widths(SPEC) == widths(replace(codes, compute="a8")) == {None}
    assert widths(codes) == {None, 2}
    assert widths(codes, m_tiles=[2]) == {2}


def timing(tokens: int, **us: float) -> Timing:
    return Timing(tokens, {Range(tokens, {"a": A, "b": B, "c": C, "d": D}[name], tokens): time for name, time in us.items()}, 1.0)


def test_each_number_of_tokens_gets_its_fastest():
    ranges = choose([timing(1, a=1.0, b=2.0), timing(8, a=3.0, b=2.0)])
    assert ranges == (Range(1, A, 1), Range(None, B, 8))


def test_neighbours_that_agree_are_one_range():
    timings = [Timing(tokens, {Range(tokens, A, 1): 1.0, Range(tokens, B, 1): 2.0}, 1.0) for tokens in (1, 8, 64)]
    assert choose(timings) == (Range(None, A, 1),)


def test_no_more_layouts_than_there_may_be():
    """The one to do without is the one that is missed the least."""
    timings = [
        timing(1, a=1.0, b=9.0, c=9.0, d=9.0),
        timing(2, a=9.0, b=1.0, c=9.0, d=9.0),
        timing(4, a=9.0, b=9.0, c=1.0, d=9.0),
        timing(8, a=9.0, b=9.0, c=1.1, d=1.0),
    ]
    ranges = choose(timings)
    assert len({each.layout for each in ranges}) == MOST_LAYOUTS
    assert [each.layout for each in ranges] == [A, B, C, C]


def test_layouts_that_read_other_packed_weights_do_not_go_together():
    """The best for each number of tokens would be A and then wide B."""
    wide = replace(B, m_tiles=2)
    timings = [
        Timing(1, {Range(1, A, 1): 1.0, Range(1, B, 1): 2.0, Range(1, wide, 1): 1.5}, 1.0),
        Timing(8, {Range(8, A, 1): 4.0, Range(8, B, 1): 3.0, Range(8, wide, 1): 1.5}, 1.0),
    ]
    assert choose(timings) == (Range(None, wide, 1),)


def test_ratios_count_not_times():
    """A slow number of tokens weighs no more than a fast one."""
    layouts = itertools.cycle((A, B, C, D))
    timings = [Timing(n, {Range(n, layout, 1): 1.0 for layout, _ in zip(layouts, range(4), strict=False)}, 1.0) for n in (1, 2)]
    timings.append(Timing(4, {Range(4, A, 1): 100.0, Range(4, D, 1): 101.0}, 1.0))
    assert choose(timings)[-1].layout == A


def test_an_entry_tells_what_was_found():
    entry = entry_of(SPEC, find_target("sm_90"), [timing(1, a=1.234, b=2.0), timing(8, a=3.0, b=2.0)], dependent=False)
    assert (entry.nope_dim, entry.lora_rank, entry.heads, entry.dependent) == (128, 512, 16, False)
    assert entry.found == {"1": [1.23, 1.0], "8": [2.0, 1.0]}


@pytest.mark.parametrize(("weight", "bits"), [("bf16", 16), ("fp8", 8), ("mxfp4", 4)])
def test_an_entry_tells_the_bits_of_its_weights(weight, bits):
    entry = entry_of(dataclasses.replace(SPEC, weight=weight), find_target("gfx950"), [timing(1, a=1.0)], dependent=False)
    assert entry.weight_bits == bits


def test_entries_of_other_weights_stand_beside_each_other():
    def entry(bits: int, layout: Layout = A, heads: int = 16) -> Entry:
        return Entry(128, 512, heads, False, (Range(None, layout),), weight_bits=bits)

    old = [entry(16), entry(8), entry(16, heads=8)]
    merged = merge(old, [entry(8, B), entry(4)])
    assert merged == [entry(4), entry(8, B), entry(16, heads=8), entry(16)]


def test_newer_entries_replace_older_ones():
    def entry(heads: int, layout: Layout, dependent: bool = False) -> Entry:
        return Entry(128, 512, heads, dependent, (Range(None, layout),))

    old = [entry(16, A), entry(64, A), entry(64, A, True)]
    assert merge(old, [entry(64, B), entry(8, B)]) == [entry(8, B), entry(16, A), entry(64, B), entry(64, A, True)]
