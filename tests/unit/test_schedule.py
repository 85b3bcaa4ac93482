"""Schedules: the proofs that targets, tiles, pieces and packing carry, and that a launch covers every output exactly once."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlagen.dtypes import DType
from mlagen.errors import ScheduleError, TargetError
from mlagen.lowering import Lowered, lower
from mlagen.packing import PADDING, packed_shape, packing_index
from mlagen.schedule import WEIGHT_REGISTERS, Pieces, Schedule, choose_schedule, cut
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS, Digit, FragmentMap, MmaAtom, find_target
from mlagen.tiles import AbsorbTiles

ARCHS = tuple(TARGETS)
each_arch = pytest.mark.parametrize("arch", ARCHS)
ATOMS = {f"{arch}-{dtype}": atom for arch, target in TARGETS.items() for dtype, atom in target.atoms}
each_atom = pytest.mark.parametrize("atom", ATOMS.values(), ids=ATOMS)


def lowered_of(arch: str, **changes: object) -> Lowered:
    fields = {"heads": 16, "nope_dim": 128, "lora_rank": 512, "rope_dim": 64, "rope_style": "gptj"}
    return lower(PrologueSpec(**{**fields, **changes}).program(find_target(arch)))


# Fragment maps and atoms


def test_the_maps_are_those_of_the_instruction_guide():
    """Spelled out for one lane: in CDNA3's 16x16x16 lane 37 holds A[5][8..11], B[8..11][5] and D[8..11][5]."""
    atom = ATOMS["gfx942-bf16"]
    for fragment, fixed, runs in ((atom.a, "m", "k"), (atom.b, "n", "k"), (atom.d, "n", "m")):
        assert [fragment.coordinate(fixed, 37, register) for register in range(4)] == [5, 5, 5, 5]
        assert [fragment.coordinate(runs, 37, register) for register in range(4)] == [8, 9, 10, 11]
    wide = ATOMS["gfx950-bf16"]
    assert [wide.a.coordinate("k", 37, register) for register in range(8)] == list(range(16, 24))


@each_atom
def test_expressions_say_what_the_map_does(atom):
    """The generated C++ and the Python of the proof are the same function; / on lane numbers is an integer division."""
    for fragment, axis in itertools.product((atom.a, atom.b, atom.d), "mnk"):
        lane_code = fragment.lane_expression(axis).replace("/", "//")
        register_code = fragment.register_expression(axis).replace("/", "//")
        for lane, register in itertools.product(range(fragment.lanes), range(fragment.registers)):
            position = eval(lane_code, {"lane": lane}) + eval(register_code, {"register": register})
            assert position == fragment.coordinate(axis, lane, register)


SHAPE = (("m", 16), ("k", 16))
LANES, REGISTERS = (Digit(16, "m", 1), Digit(4, "k", 4)), (Digit(4, "k", 1),)

WRONG_MAPS = {
    "overlapping strides": (SHAPE, (Digit(16, "m", 1), Digit(4, "k", 3)), REGISTERS),
    "holes": (SHAPE, (Digit(16, "m", 1), Digit(4, "k", 8)), REGISTERS),
    "an axis twice": (SHAPE, (Digit(16, "k", 1), Digit(4, "k", 4)), REGISTERS),
    "too few registers": (SHAPE, LANES, (Digit(2, "k", 1),)),
    "too many registers": (SHAPE, LANES, (Digit(8, "k", 1),)),
    "all elements, but twice": (SHAPE, (*LANES, Digit(2, "k", 0)), REGISTERS),
    "too few lanes": (SHAPE, LANES[:1], REGISTERS),
    "another extent": ((("m", 16), ("k", 32)), LANES, REGISTERS),
}


@pytest.mark.parametrize(("shape", "lane", "register"), WRONG_MAPS.values(), ids=WRONG_MAPS)
def test_a_map_that_is_no_bijection_is_refused(shape, lane, register):
    FragmentMap(SHAPE, LANES, REGISTERS)
    with pytest.raises(TargetError, match="do not cover it once"):
        FragmentMap(shape, lane, register)


@each_atom
def test_an_atom_with_other_shapes_is_refused(atom):
    with pytest.raises(TargetError, match="do not fit"):
        dataclasses.replace(atom, k=2 * atom.k)
    with pytest.raises(TargetError, match="do not fit"):
        dataclasses.replace(atom, a=atom.b)


def test_an_atom_over_other_lanes_is_refused():
    """A of 32 lanes covers its matrix too, but B and D are spread over 64."""
    atom = ATOMS["gfx942-bf16"]
    half = FragmentMap(SHAPE, (Digit(16, "m", 1), Digit(2, "k", 8)), (Digit(8, "k", 1),))
    with pytest.raises(TargetError, match="different numbers of lanes"):
        dataclasses.replace(atom, a=half)


def spread_atom(which: str) -> MmaAtom:
    """An atom whose lanes hold every fourth k of A, of B or of both: no hardware's, but a bijection all the same."""
    atom = ATOMS["gfx942-bf16"]
    a = FragmentMap((("m", 16), ("k", 16)), (Digit(16, "m", 1), Digit(4, "k", 1)), (Digit(4, "k", 4),))
    b = FragmentMap((("k", 16), ("n", 16)), (Digit(16, "n", 1), Digit(4, "k", 1)), (Digit(4, "k", 4),))
    maps = {"a": {"a": a}, "b": {"b": b}, "ab": {"a": a, "b": b}}[which]
    return dataclasses.replace(atom, **maps)


@pytest.mark.parametrize("atom", [*ATOMS.values(), *map(spread_atom, ("a", "b", "ab"))])
def test_the_packing_follows_the_loads_of_q(atom):
    """Whatever the lane maps: where an instruction takes k of B from lane i's load of q, A holds the weight of that k."""
    tiles = AbsorbTiles(atom, 128, 512, 2)
    packed = packing_index(tiles).reshape(packed_shape(tiles))
    for chunk, instruction in itertools.product(range(tiles.chunks), range(tiles.atoms_per_chunk)):
        loaded = {}
        for lane, register in itertools.product(range(atom.lanes), range(atom.b.registers)):
            group = atom.b.holder("k", atom.b.coordinate("k", lane, register))[0]
            p = chunk * tiles.chunk + group * tiles.fragment_k + instruction * atom.b.registers + register
            loaded[atom.b.coordinate("k", lane, register)] = p
        assert len(loaded) == atom.k
        for lane, register in itertools.product(range(atom.lanes), range(atom.a.registers)):
            fragment, place = divmod(instruction * atom.a.registers + register, tiles.fragment_k)
            p = packed[0, chunk, 0, fragment, lane, place] // tiles.lora_rank
            assert p == loaded[atom.a.coordinate("k", lane, register)]


@each_arch
def test_a_target_is_refused_for_a_wrong_wave_or_fp8(arch):
    target = find_target(arch)
    with pytest.raises(TargetError, match="a wave has 16"):
        dataclasses.replace(target, wave=16)
    with pytest.raises(TargetError, match="is not an fp8 type"):
        dataclasses.replace(target, fp8=DType.BF16)


@pytest.mark.parametrize("arch", ["gfx1201", "gfx90a", "", "GFX942", "sm_80", None, 942, ["gfx942"]])
def test_an_unknown_arch_gets_the_list(arch):
    with pytest.raises(TargetError) as caught:
        find_target(arch)
    assert all(name in str(caught.value) for name in ARCHS)
    assert "\n" not in str(caught.value)


def test_feature_suffixes_of_an_arch():
    assert find_target("gfx942:sramecc+:xnack-") is find_target("gfx942")


@pytest.mark.parametrize(("registers", "waves"), [(1, 8), (64, 8), (65, 7), (128, 4), (129, 3), (256, 2), (257, 1), (512, 1)])
def test_waves_per_simd(registers, waves):
    assert find_target("gfx942").waves_per_simd(registers) == waves


# Tiles, pieces and packing

WIDTHS = [(16, 16), (16, 512), (32, 48), (48, 80), (64, 576), (128, 512), (192, 512), (256, 64), (512, 2048)]


@each_atom
@pytest.mark.parametrize(("nope_dim", "lora_rank"), WIDTHS)
def test_packing_takes_every_weight_once_and_pads_with_nothing_else(atom, nope_dim, lora_rank):
    for m_tiles in (1, 2, 4):
        if lora_rank % (m_tiles * atom.m):
            continue
        tiles = AbsorbTiles(atom, nope_dim, lora_rank, m_tiles)
        index = packing_index(tiles)
        assert len(index) == np.prod(packed_shape(tiles))
        assert np.array_equal(np.sort(index[index != PADDING]), np.arange(nope_dim * lora_rank))
        assert tiles.padded == (PADDING in index)
        assert (index == PADDING).sum() == (tiles.chunks * tiles.chunk - nope_dim) * lora_rank


@each_atom
def test_a_packed_fragment_is_what_the_kernel_takes_it_for(atom):
    """Lane, element and tile numbers give the k and the latent column that the generated index arithmetic reads and stores."""
    tiles = AbsorbTiles(atom, 128, 512, 4)
    index = packing_index(tiles).reshape(packed_shape(tiles))
    m_tile = np.arange(4)[None, None, :]
    first_row = np.arange(tiles.chunks)[None, :, None] * tiles.chunk
    first_column = np.arange(tiles.l_tiles)[:, None, None] * tiles.l_tile
    for lane, fragment, element in itertools.product(range(atom.lanes), range(tiles.weight_fragments), range(tiles.fragment_k)):
        rows, columns = np.divmod(index[:, :, :, fragment, lane, element], 512)
        if atom.lanes == 64:
            k = lane // 16 * tiles.fragment_k + element
            m = lane % 16
            column = m // 4 * tiles.l_run + m_tile * 4 + m % 4
        else:  # two instructions of four words, which hold neighbouring k: two rows, then two more words of k
            word = 4 // atom.element_bytes
            k = lane % 4 * tiles.fragment_k + fragment * 2 * word + element % word + element // (2 * word) * word
            column = lane // 4 * tiles.l_run + m_tile * 2 + element // word % 2
        assert (rows == k + first_row).all()
        assert (columns == column + first_column).all()


@each_atom
def test_tiles_that_leave_columns_over_are_refused(atom):
    with pytest.raises(ScheduleError, match="does not divide lora_rank=80"):
        AbsorbTiles(atom, 128, 80, 2)


def test_an_atom_whose_lanes_need_two_digits_is_refused():
    """The generated arithmetic multiplies one digit of the lane number."""
    atom = ATOMS["gfx942-bf16"]
    digits = (Digit(16, "n", 1), Digit(2, "m", 4), Digit(2, "m", 8))
    two = FragmentMap((("m", 16), ("n", 16)), digits, (Digit(4, "m", 1),))
    with pytest.raises(ScheduleError, match="one lane digit along m"):
        AbsorbTiles(dataclasses.replace(atom, d=two), 128, 512, 4)


@pytest.mark.parametrize(
    ("lanes", "run", "runs", "lane_stride", "distance"),
    [(4, 16, 1, 8, 0), (4, 16, 1, 32, 0), (4, 8, 2, 8, 16), (4, 8, 2, 16, 16), (2, 8, 2, 8, 8)],
)
def test_pieces_that_overlap_or_leave_gaps_are_refused(lanes, run, runs, lane_stride, distance):
    with pytest.raises(ScheduleError, match="not covered exactly once"):
        Pieces(lanes, run, runs, lane_stride, distance)


@pytest.mark.parametrize("style", ["none", "gptj", "neox"])
@pytest.mark.parametrize("rope_dim", [2, 6, 16, 30, 32, 64, 96, 128, 512])
def test_pieces_of_any_width(rope_dim, style):
    """A pair never straddles two lanes, and no lane has more than 16 elements."""
    for segment in lowered_of("gfx942", rope_dim=rope_dim, rope_style=style).segments:
        if segment.absorb:
            continue
        pieces = cut(segment)
        assert pieces.lanes * pieces.runs * pieces.run == segment.width
        assert pieces.runs * pieces.run <= 16
        if segment.rope:
            assert (pieces.runs, pieces.run_distance) == ((2, rope_dim // 2) if style == "neox" else (1, 0))
            assert style == "neox" or pieces.run % 2 == 0


# Launches


def claims(schedule: Schedule, lowered: Lowered, tokens: int, heads: int) -> Counter[tuple[int, int, int]]:
    """How often each (head, latent tile, token tile) is taken, by the arithmetic of the kernel."""
    launch = schedule.launch(lowered.segments, tokens, heads)
    per, tiles = launch.token_tiles_per_workgroup, -(-tokens // schedule.absorb.token_tile)
    taken: Counter[tuple[int, int, int]] = Counter()
    for workgroup in range(launch.workgroups[-1]):
        head, first, split = schedule.absorb_owner(workgroup, heads)
        if head < heads:
            token_tiles = range(split * per, min((split + 1) * per, tiles))
            taken.update(itertools.product([head], range(first, first + schedule.waves_per_workgroup), token_tiles))
    return taken


def assert_covers(schedule: Schedule, lowered: Lowered, tokens: int, heads: int) -> None:
    taken = claims(schedule, lowered, tokens, heads)
    tiles = -(-tokens // schedule.absorb.token_tile)
    assert set(taken) == set(itertools.product(range(heads), range(schedule.absorb.l_tiles), range(tiles)))
    assert set(taken.values()) <= {1}


@each_arch
@pytest.mark.parametrize("heads", [1, 3, 8, 12, 40, 128])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 65, 256, 1000])
def test_a_launch_covers_every_tile_once(arch, tokens, heads):
    lowered = lowered_of(arch)
    assert_covers(choose_schedule(lowered, find_target(arch)), lowered, tokens, heads)


@given(
    arch=st.sampled_from(ARCHS),
    tokens=st.integers(0, 600),
    heads=st.integers(1, 70),
    rank=st.sampled_from([16, 48, 64, 80, 256]),
    waves=st.sampled_from([1, 2, 4]),
    m_tiles=st.sampled_from([None, 1, 2, 4]),
)
def test_any_launch_of_any_schedule_covers_every_tile_once(arch, tokens, heads, rank, waves, m_tiles):
    lowered = lowered_of(arch, lora_rank=rank)
    try:
        schedule = choose_schedule(lowered, find_target(arch), waves_per_workgroup=waves, m_tiles=m_tiles)
    except ScheduleError:
        return
    assert_covers(schedule, lowered, tokens, heads)


@each_arch
@pytest.mark.parametrize("waves", [1, 2, 8])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 16), (33, 5), (256, 128), (7, 40)])
def test_the_workgroups_of_a_head_run_on_one_xcd(arch, waves, tokens, heads):
    """Workgroups are dealt to the XCDs in turn, counted from the first of the launch, not of the segment."""
    target = find_target(arch)
    lowered = lowered_of(arch)
    schedule = choose_schedule(lowered, target, waves_per_workgroup=waves)
    launch = schedule.launch(lowered.segments, tokens, heads)
    first = sum(launch.workgroups[:-1])
    homes: dict[int, set[int]] = {}
    for workgroup in range(launch.workgroups[-1]):
        head, _, _ = schedule.absorb_owner(workgroup, heads)
        homes.setdefault(head, set()).add((first + workgroup) % target.xcds)
    assert all(len(xcds) == 1 for xcds in homes.values())
    assert len(set.union(*homes.values())) == target.xcds, "some XCDs have no work"


@each_arch
def test_rows_of_every_segment_have_their_lanes(arch):
    lowered = lowered_of(arch, rope_style="neox", weight="none")
    schedule = choose_schedule(lowered, find_target(arch), waves_per_workgroup=2)
    for tokens, heads in itertools.product((0, 1, 63, 64, 65, 1000), (1, 3, 128)):
        launch = schedule.launch(lowered.segments, tokens, heads)
        assert launch.grid == sum(launch.workgroups)
        for segment, pieces, workgroups in zip(lowered.segments, schedule.pieces, launch.workgroups, strict=True):
            rows = tokens * heads if segment.sink.role == "q" else tokens
            assert (workgroups - 1) * schedule.threads < rows * pieces.lanes <= workgroups * schedule.threads


@each_arch
def test_a_decode_step_spreads_and_a_large_batch_loops(arch):
    lowered, target = lowered_of(arch), find_target(arch)
    schedule = choose_schedule(lowered, target)
    assert schedule.launch(lowered.segments, 64, 16).token_tiles_per_workgroup == 1
    busy = schedule.launch(lowered.segments, 4096, 128)
    assert busy.token_tiles_per_workgroup > 1
    assert busy.workgroups[-1] >= target.compute_units * target.simds_per_cu


def test_no_tokens_need_no_workgroups():
    lowered = lowered_of("gfx942")
    assert choose_schedule(lowered, find_target("gfx942")).launch(lowered.segments, 0, 16).grid == 0


@pytest.mark.parametrize("options", [{"waves_per_workgroup": 3}, {"waves_per_workgroup": 16}, {"m_tiles": 3}, {"m_tiles": 64}])
def test_a_schedule_that_does_not_fit_is_refused(options):
    with pytest.raises(ScheduleError):
        choose_schedule(lowered_of("gfx942"), find_target("gfx942"), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": "fp8", "compute": "a8"}, "block=16: the query in shared memory is bf16, not fp8_e4m3fn"),
        (
            {"weight": "fp8-block", "nope_dim": 192},
            "block=16: a product from shared memory is a whole sum, here 64 rows have a scale",
        ),
        ({"weight": "fp8-block", "nope_dim": 256, "lora_rank": 64}, "here 128 rows have a scale"),
    ],
)
def test_codes_whose_product_is_no_whole_sum_are_not_staged(changes, message):
    with pytest.raises(ScheduleError) as caught:
        choose_schedule(lowered_of("sm_90", **changes), find_target("sm_90"), waves_per_workgroup=4, block=16)
    assert message in str(caught.value)


@pytest.mark.parametrize("changes", [{"weight": "fp8"}, {"weight": "fp8-block"}, {"weight": "mxfp4", "nope_dim": 192}], ids=str)
def test_codes_with_whole_sums_are_staged(changes):
    lowered, target = lowered_of("sm_90", **changes), find_target("sm_90")
    schedule = choose_schedule(lowered, target, waves_per_workgroup=4, block=16)
    assert schedule.staging is not None
    assert schedule.absorb.m_tiles == 1, "a wave converts no more than it must"


def test_a_workgroup_has_so_many_lanes():
    lowered = lowered_of("gfx950", nope_dim=16, lora_rank=2048)
    assert choose_schedule(lowered, find_target("gfx950"), waves_per_workgroup=16).threads == 1024
    with pytest.raises(ScheduleError, match="32 waves"):
        choose_schedule(lowered, find_target("gfx950"), waves_per_workgroup=32)


@each_arch
@pytest.mark.parametrize("nope_dim", [16, 128, 192, 256, 512])
def test_the_chosen_tile_fits_the_registers(arch, nope_dim):
    """Four waves on a SIMD need 128 registers each at most, of which the weights take half on AMD; the widest P may need more."""
    target = find_target(arch)
    tiles = choose_schedule(lowered_of(arch, nope_dim=nope_dim), target).absorb
    assert tiles is not None
    assert tiles.weight_registers <= WEIGHT_REGISTERS[target.platform] or tiles.m_tiles == 1
    assert tiles.registers <= target.registers_per_lane // 4 or tiles.m_tiles == 1 or target.platform == "nvidia"


# Rows with scales of their own


@each_arch
@pytest.mark.parametrize("nope_dim", [16, 64, 128, 192, 256])
@pytest.mark.parametrize("lora_rank", [16, 80, 256, 512, 1024])
@pytest.mark.parametrize("weights", [{}, {"weight": "fp8"}, {"weight": "fp8", "compute": "a8"}], ids=["bf16", "fp8", "a8"])
def test_one_workgroup_makes_whole_rows(arch, nope_dim, lora_rank, weights):
    lowered = lowered_of(arch, nope_dim=nope_dim, lora_rank=lora_rank, q_scaling="token", **weights)
    schedule, target = choose_schedule(lowered, find_target(arch)), find_target(arch)
    assert schedule.workgroups_per_head == 1
    assert schedule.waves_per_workgroup * schedule.passes * schedule.absorb.l_tile == lora_rank
    assert schedule.threads <= 1024
    assert target.waves_per_simd(schedule.absorb.registers) * target.simds_per_cu >= schedule.waves_per_workgroup
    assert {schedule.absorb_owner(workgroup, 3)[0] for workgroup in range(schedule.xcds * 8)} >= {0, 1, 2}


@each_arch
def test_weights_stay_where_they_fit(arch):
    assert choose_schedule(lowered_of(arch, q_scaling="token"), find_target(arch)).passes == 1


@each_arch
def test_rows_without_an_absorb_have_a_wave_each(arch):
    lowered, target = lowered_of(arch, q_scaling="token", weight="none"), find_target(arch)
    schedule = choose_schedule(lowered, target)
    (number,) = (number for number, segment in enumerate(lowered.segments) if segment.sink.row_scale)
    assert schedule.launch(lowered.segments, 5, 3).workgroups[number] == 5 * 3


@each_arch
@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({}, {"waves_per_workgroup": 4}, "waves_per_workgroup=4: rows with scales of their own"),
        ({}, {"block": 16}, "block=16: rows with scales of their own"),
        ({"weight": "none"}, {"waves_per_workgroup": 2}, "waves_per_workgroup=2: rows with scales"),
        ({"nope_dim": 512, "lora_rank": 2048}, {}, "lora_rank=2048 with nope_dim=512: a row with a scale of its own"),
    ],
    ids=str,
)
def test_what_has_no_whole_rows_is_refused(arch, changes, options, reason):
    with pytest.raises(ScheduleError) as caught:
        choose_schedule(lowered_of(arch, q_scaling="token", **changes), find_target(arch), **options)
    assert str(caught.value).startswith(reason)
