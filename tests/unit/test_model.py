"""The model that chooses the layouts for AMD GPUs: what follows from its own assumptions, and the tables that come from it."""

import dataclasses
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlagen import model
from mlagen.errors import ScheduleError, TargetError
from mlagen.layout import Layout
from mlagen.lowering import lower
from mlagen.model import LAUNCH, MEMORY_LATENCY, TOKEN_TILES, TOKENS, WAVES, WORTH, Prediction, best_ranges, predict
from mlagen.schedule import Schedule, choose_schedule
from mlagen.shipped import ARCHS, shipped_matrix
from mlagen.spec import PrologueSpec
from mlagen.tables import Range, read_table
from mlagen.target import find_target

TABLES = Path(model.__file__).parent / "tuned"
each_arch = pytest.mark.parametrize("arch", ARCHS)

PARTS = ("round_trips", "hbm", "l2", "load_path", "matrix", "issue", "total")

specs = st.builds(
    PrologueSpec,
    heads=st.integers(1, 130),
    nope_dim=st.sampled_from([16, 64, 128, 192, 256]),
    lora_rank=st.sampled_from([256, 512]),
    rope_dim=st.sampled_from([0, 32, 64]),
    rope_style=st.just("none"),
    q_dtype=st.sampled_from(["fp8", "bf16"]),
    kv_dtype=st.sampled_from(["fp8", "bf16"]),
)
targets = st.sampled_from([find_target(arch) for arch in ARCHS])
layouts = st.sampled_from([Layout(waves) for waves in WAVES])


def spec_of(heads: int = 16, **changes: object) -> PrologueSpec:
    fields = {"nope_dim": 128, "lora_rank": 512, "rope_dim": 64, "rope_style": "gptj"}
    return PrologueSpec(heads=heads, **{**fields, **changes})


def memory_bytes(spec: PrologueSpec, tokens: int, weight_reads: int = 1) -> int:
    """What a prologue must read and write at least, written out; P and L are multiples of what the tiles take."""
    q, kv = (1 if name == "fp8" else 2 for name in (spec.q_dtype, spec.kv_dtype))
    weights = 2 * spec.heads * spec.nope_dim * spec.lora_rank
    read = 2 * tokens * (spec.heads * (spec.nope_dim + spec.rope_dim) + spec.entry_dim)
    tables = 2 * tokens * spec.rope_dim if spec.rope_style != "none" else 0
    return weight_reads * weights + read + tables + tokens * (spec.heads * q + kv) * spec.entry_dim


# What a prediction is made of


def test_one_token_by_hand():
    """16 heads on gfx942: two on each XCD, 8 latent tiles each, so 16 of its 38 compute units have one wave."""
    found = predict(spec_of(), find_target("gfx942"), Layout(), 1, 1)
    cycle = 1 / 2100
    assert found.round_trips == MEMORY_LATENCY
    assert found.rows == pytest.approx(3 * MEMORY_LATENCY)
    assert found.hbm == pytest.approx(memory_bytes(spec_of(), 1) / 5.3e6)
    assert found.load_path == pytest.approx((64 * 128 + 16 * 128) * 2 / 64 * cycle)  # a tile of weights and one of tokens
    assert found.matrix == pytest.approx(32 * 16 * cycle)  # 8 steps of 16 k, 4 instructions side by side, 16 cycles each
    assert found.issue == pytest.approx((16 + 5 * 16) * 4 * cycle)
    head = 128 * 512 * 2 + 8 * 128 * 2 + 512  # weights, q for each of 8 workgroups, the result
    assert found.l2 == pytest.approx((2 * head + (2 * 8 * 64 * 3 + 64 * 2 + 576 * 3) / 8) / 2048 * cycle)
    assert found.total == LAUNCH + found.rows  # the rows' chain of loads is longer


def test_gfx950_multiplies_twice_as_fast_in_a_cycle():
    ours, theirs = (predict(spec_of(), find_target(arch), Layout(), 1, 1) for arch in ("gfx950", "gfx942"))
    assert ours.matrix * 2.4 == pytest.approx(theirs.matrix * 2.1 / 2)
    assert ours.issue * 2.4 == pytest.approx(theirs.issue * 2.1)


def test_parts_that_overlap_count_once():
    """Bytes are the longest of three ways, tiles the longer of waiting and working, and rows run beside the absorb."""
    parts = Prediction(launch=100, round_trips=MEMORY_LATENCY, rows=0, hbm=5, l2=6, load_path=4, matrix=20, issue=10)
    assert parts.total == pytest.approx(100 + MEMORY_LATENCY + 6 + 30)
    assert dataclasses.replace(parts, hbm=7).total == pytest.approx(100 + MEMORY_LATENCY + 7 + 30)
    assert dataclasses.replace(parts, load_path=8).total == pytest.approx(100 + MEMORY_LATENCY + 8 + 30)
    assert dataclasses.replace(parts, round_trips=MEMORY_LATENCY + 40).total == pytest.approx(100 + MEMORY_LATENCY + 6 + 40)
    assert dataclasses.replace(parts, rows=50).total == pytest.approx(150)


@given(
    spec=specs, target=targets, layout=layouts, tiles=st.sampled_from(TOKEN_TILES), counts=st.tuples(*[st.integers(1, 1100)] * 2)
)
def test_more_tokens_never_take_less_time(spec, target, layout, tiles, counts):
    few, many = (predict(spec, target, layout, tiles, count) for count in sorted(counts))
    for part in PARTS:
        assert getattr(few, part) <= getattr(many, part), part


@given(spec=specs, target=targets, layout=layouts, tiles=st.sampled_from(TOKEN_TILES), tokens=st.integers(1, 1100))
def test_nothing_beats_the_bytes_and_one_round_trip(spec, target, layout, tiles, tokens):
    found = predict(spec, target, layout, tiles, tokens)
    bound = memory_bytes(spec, tokens) / target.hbm_bytes_per_second * 1e6
    assert found.total > LAUNCH + MEMORY_LATENCY + bound
    if spec.nope_dim != 16:  # padded to 32
        assert found.hbm == pytest.approx(bound)


@each_arch
@pytest.mark.parametrize("heads", [2, 16, 128])
def test_splitting_the_tokens_takes_fewer_round_trips_and_reads_the_weights_again(arch, heads):
    found = [predict(spec_of(heads), find_target(arch), Layout(), tiles, 64) for tiles in (1, 2, 4)]
    for split, whole in itertools.pairwise(found):
        assert split.round_trips < whole.round_trips
        assert split.l2 > whole.l2
        assert split.hbm == whole.hbm, "the other splits find the weights in L2"
    weights = 128 * 512 * 2
    clock = model.CLOCK[arch]
    assert (found[0].l2 - found[2].l2) * clock * 2048 / 1e6 == pytest.approx(3 * -(-heads // 8) * weights)


def test_waves_of_a_workgroup_read_the_query_once():
    alone, together = (predict(spec_of(), find_target("gfx942"), Layout(waves), 1, 256) for waves in (1, 4))
    query = 256 * 128 * 2
    assert (alone.l2 - together.l2) * 2.1e9 * 2048 / 1e6 == pytest.approx(2 * (8 - 2) * query)


def test_what_finds_no_room_waits_for_another_round():
    """112 registers leave room for 16 waves on each of 38 compute units: four splits of 16 heads are 14 waves, five are 17."""
    target = find_target("gfx942")
    rounds = {
        tokens: predict(spec_of(128), target, Layout(), 1, tokens).round_trips / MEMORY_LATENCY for tokens in (64, 65, 256, 1024)
    }
    assert rounds == pytest.approx({64: 1, 65: 2, 256: 4, 1024: 14})
    four_waves = [predict(spec_of(128), target, Layout(4), 1, tokens).round_trips / MEMORY_LATENCY for tokens in (64, 65)]
    assert four_waves == pytest.approx([1, 2])


@pytest.mark.parametrize(("heads", "waves", "of_simd"), [(16, 1, 1), (16, 4, 1), (128, 1, 1), (128, 4, 1), (128, 8, 2)])
def test_waves_of_a_compute_unit_spread_over_its_simds(heads, waves, of_simd):
    """One split of 128 heads is 128 waves on an XCD's 38 compute units: 4 on the busiest, or 8 if they come by eights."""
    one, found = (
        predict(spec_of(*shape), find_target("gfx942"), Layout(each), 1, 1) for shape, each in (((1,), 1), ((heads,), waves))
    )
    assert found.matrix == pytest.approx(of_simd * one.matrix)
    assert found.issue == pytest.approx(of_simd * one.issue)


def test_padding_is_loaded_with_the_weights_but_not_with_the_query():
    """P = 48 takes the weights of two chunks of 32 k."""
    found = predict(spec_of(nope_dim=48), find_target("gfx942"), Layout(), 1, 1)
    assert found.load_path == pytest.approx((64 * 64 + 16 * 48) * 2 / 64 / 2100)
    assert found.hbm == pytest.approx((memory_bytes(spec_of(nope_dim=48), 1) + 16 * 16 * 512 * 2) / 5.3e6)


# The weights of a head come from memory once


class Scattered(Schedule):
    """Workgroups of one head next to each other: every XCD gets some."""

    def absorb_owner(self, workgroup: int, heads: int) -> tuple[int, int, int]:
        head, part = divmod(workgroup, self.workgroups_per_head)
        return head, part * self.waves_per_workgroup, 0


@each_arch
@pytest.mark.parametrize(("heads", "waves"), [(1, 1), (12, 1), (16, 2), (128, 4)])
def test_weights_are_fetched_by_one_xcd(arch, heads, waves):
    """By all workgroups of a launch with many splits, not only by those of the first, which the model looks at."""
    target = find_target(arch)
    lowered = lower(spec_of(heads).program(target))
    schedule = choose_schedule(lowered, target, waves_per_workgroup=waves)
    launch = schedule.launch(lowered.segments, 256, heads, token_tiles=2)
    owners = [(schedule.absorb_owner(each, heads)[0], each % target.xcds) for each in range(launch.absorb_workgroups)]
    assert model._fetches(schedule, heads) == len({owner for owner in owners if owner[0] < heads}) == heads


@pytest.mark.parametrize(("waves", "fetches"), [(1, 8), (2, 4), (4, 2)])
def test_scattered_workgroups_fetch_weights_again(waves, fetches, monkeypatch):
    target = find_target("gfx942")
    lowered = lower(spec_of().program(target))
    schedule = choose_schedule(lowered, target, waves_per_workgroup=waves)
    scattered = Scattered(**{field.name: getattr(schedule, field.name) for field in dataclasses.fields(schedule)})
    assert model._fetches(scattered, 16) == 16 * fetches
    monkeypatch.setattr(model, "_scheduled", lambda *_: (lowered, scattered))
    found = predict(spec_of(), target, Layout(waves), 1, 64)
    assert found.hbm == pytest.approx(memory_bytes(spec_of(), 64, fetches) / 5.3e6)


# What is refused


def test_a_target_without_numbers_is_refused():
    with pytest.raises(TargetError, match=r"sm_90.*gfx942, gfx950.*mlagen tune"):
        predict(spec_of(), find_target("sm_90"), Layout(), 1, 1)
    with pytest.raises(TargetError, match="sm_90"):
        best_ranges(spec_of(), find_target("sm_90"))


@pytest.mark.parametrize("layout", [Layout(3), Layout(16), Layout(1, block=16)])
def test_a_layout_that_does_not_fit_is_refused(layout):
    with pytest.raises(ScheduleError):
        predict(spec_of(), find_target("gfx942"), layout, 1, 1)


def test_without_a_product_there_is_nothing_to_choose():
    with pytest.raises(ScheduleError, match="weight='none'"):
        predict(spec_of(weight="none"), find_target("gfx942"), Layout(), 1, 1)
    assert best_ranges(spec_of(weight="none"), find_target("gfx942")) == (Range(None, Layout()),)


# The choice


def set_times(monkeypatch, times) -> None:
    """Let a launch take times(waves, token tiles, tokens) microseconds."""

    def fake(spec, target, layout, token_tiles, tokens):
        launch = times(layout.waves_per_workgroup, token_tiles, tokens) - MEMORY_LATENCY
        return Prediction(launch, MEMORY_LATENCY, rows=0, hbm=0, l2=0, load_path=0, matrix=0, issue=0)

    monkeypatch.setattr(model, "predict", fake)


def chosen(tokens=TOKENS) -> list[tuple[int | None, int, int | None]]:
    ranges = best_ranges(spec_of(), find_target("gfx942"), tokens)
    return [(each.tokens, each.layout.waves_per_workgroup, each.token_tiles) for each in ranges]


def test_without_a_difference_there_is_one_range_of_the_smallest_workgroups(monkeypatch):
    set_times(monkeypatch, lambda waves, tiles, tokens: 10)
    assert chosen() == [(None, 1, 1)]


@pytest.mark.parametrize(("gain", "kernels"), [(1.5 * WORTH, [1, 4]), (0.5 * WORTH, [1])])
def test_a_second_kernel_must_be_worth_it(monkeypatch, gain, kernels):
    """Each of the two is the faster one for half of the numbers of tokens, so either alone loses half of `gain` on average."""
    set_times(monkeypatch, lambda waves, tiles, tokens: 10 * (1 + 2 * gain * (waves != (1 if tokens <= 128 else 4))))
    assert sorted({waves for _, waves, _ in chosen()}) == kernels


def test_another_kernel_alone_may_be_the_best(monkeypatch):
    set_times(monkeypatch, lambda waves, tiles, tokens: 10 if waves == 4 else 11)
    assert chosen() == [(None, 4, 1)]


def test_there_are_never_three_kernels(monkeypatch):
    """Each third of the numbers of tokens has a favourite of its own; the one that matters least is given up."""
    favourite = dict(zip(TOKENS, [1] * 4 + [2] * 4 + [4] * 4, strict=True))
    set_times(monkeypatch, lambda waves, tiles, tokens: 10 + (waves != favourite[tokens]) * {1: 5, 2: 2, 4: 5}[favourite[tokens]])
    assert {waves for _, waves, _ in chosen()} == {1, 4}


@pytest.mark.parametrize(
    ("gain", "ranges"), [(2 * WORTH, [(64, 1, 1), (None, 1, 4)]), (0.5 * WORTH, [(None, 1, 4)])], ids=["worth it", "not worth it"]
)
def test_ranges_change_the_token_tiles_where_it_pays(monkeypatch, gain, ranges):
    set_times(monkeypatch, lambda waves, tiles, tokens: 10 * (1 + gain * (tiles != (1 if tokens <= 64 else 4))))
    assert chosen() == ranges


def test_a_range_ends_at_the_last_number_that_its_choice_is_for(monkeypatch):
    set_times(monkeypatch, lambda waves, tiles, tokens: 10 + (tiles != {16: 1, 32: 2, 48: 2, 64: 4}[tokens]))
    assert chosen((16, 32, 48, 64)) == [(16, 1, 1), (48, 1, 2), (None, 1, 4)]


def test_a_choice_is_judged_by_its_own_range(monkeypatch):
    """One tile is the best for few tokens, however bad it is for many."""
    times = {1: (10, 10, 100), 2: (10.1, 10.1, 10), 4: (100, 100, 9)}
    set_times(monkeypatch, lambda waves, tiles, tokens: times.get(tiles, (100,) * 3)[(16, 32, 48).index(tokens)])
    assert chosen((16, 32, 48)) == [(32, 1, 1), (None, 1, 4)]


def test_rows_do_not_hide_what_the_absorb_loses():
    """At 32 tokens one tile or two for each workgroup take as long as the rows' loads, but the absorb is done sooner with one."""
    spec, target = spec_of(2), find_target("gfx950")
    one, two = (predict(spec, target, Layout(), tiles, 32) for tiles in (1, 2))
    assert one.total == two.total
    assert one.absorb < two.absorb
    assert best_ranges(spec, target, (32,)) == (Range(None, Layout(), 1),)


SHIPPED = {(request.spec, request.target): None for request in shipped_matrix()}


@pytest.mark.parametrize(("spec", "target"), SHIPPED)
def test_the_choice_for_a_shipped_model_is_near_the_best_that_was_tried(spec, target):
    ranges = best_ranges(spec, target)
    kernels = {each.layout for each in ranges}
    assert len(kernels) <= 2
    losses = []
    for tokens in TOKENS:
        used = next(each for each in ranges if each.tokens is None or tokens <= each.tokens)
        tried = {
            (layout, tiles): predict(spec, target, layout, tiles, tokens)
            for layout, tiles in itertools.product(map(Layout, WAVES), TOKEN_TILES)
        }
        times = {choice: LAUNCH + found.absorb for choice, found in tried.items()}
        ours = times[used.layout, used.token_tiles]
        assert ours <= min(time for (layout, _), time in times.items() if layout in kernels) * (1 + WORTH)
        losses.append(ours / min(times.values()) - 1)
    assert sum(losses) / len(losses) <= 2 * WORTH  # one for giving up kernels, one for merging ranges


# The shipped tables


@each_arch
def test_the_shipped_table_is_what_the_model_gives(arch):
    text = (TABLES / f"{arch}.json").read_text(encoding="utf-8")
    assert text == model.modelled_table(find_target(arch)), "the model has changed: write the table again"


@each_arch
def test_the_shipped_table_has_every_shipped_shape_once_and_says_that_it_is_modelled(arch):
    text = (TABLES / f"{arch}.json").read_text(encoding="utf-8")
    found, entries = read_table(text, arch)
    assert found == arch
    assert '"source": "modelled by mlagen/model.py; nothing was measured"' in text
    shapes = [(entry.nope_dim, entry.lora_rank, entry.heads) for entry in entries]
    wanted = {(each.spec.nope_dim, each.spec.lora_rank, each.spec.heads) for each in shipped_matrix()}
    assert len(shapes) == len(set(shapes))
    assert set(shapes) == wanted
