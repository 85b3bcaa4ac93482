"""Schedule: how a lowered program is laid over workgroups, waves and lanes, with the proof that it covers every output once.

Two kinds of work.  An absorb workgroup owns one head, `l_tile` latent columns for each of its waves, and a run of token tiles: each
wave holds its weight tile in registers and multiplies it with one token tile after another.  The other segments are cut into
pieces of a few consecutive elements, and a lane owns one piece of one row.
"""

import math
from dataclasses import dataclass

from mlagen.errors import ScheduleError
from mlagen.lowering import Lowered, Segment
from mlagen.target import MmaAtom, Target

FRAGMENT_BYTES = 16
"""What one lane loads at once: 128 bits, the widest global access."""

PIECE_ELEMENTS = 16
"""Elements of a row that one lane copies: 16 fp8 codes are one 128-bit store."""

WEIGHT_REGISTERS = 64
"""Registers for a weight tile: with q, sums and addresses beside it, four waves of 128 registers each still fit on a SIMD."""

WAVES_PER_SIMD_GOAL = 2
"""Waves per SIMD after which more splits over the tokens only read the weights again."""


@dataclass(frozen=True)
class Pieces:
    """How an elementwise segment is cut: `lanes` neighbouring lanes share a row, each with `runs` runs of `run` elements.

    Two runs are `run_distance` elements apart (the halves of a NeoX rotation); lane number i starts at element i * `lane_stride`.
    """

    lanes: int
    run: int
    runs: int
    lane_stride: int
    run_distance: int

    def __post_init__(self) -> None:
        columns = [
            lane * self.lane_stride + part * self.run_distance + element
            for lane in range(self.lanes)
            for part in range(self.runs)
            for element in range(self.run)
        ]
        if sorted(columns) != list(range(self.lanes * self.runs * self.run)):
            raise ScheduleError(f"{self}: a row's elements are not covered exactly once")


@dataclass(frozen=True)
class AbsorbTiles:
    """The tiles of the q-absorb product, with the latent columns on the M side and the tokens on the N side of the atom.

    A chunk is the k range that a wave's 16-byte fragments cover: each lane holds `fragment_k` consecutive k of it, spread over
    `atoms_per_chunk` instructions.  Row m of instruction number i of a tile stands for latent column

        l_tile_first + group(m) * l_run + i * l_held + place(m)

    where group(m) is the group of lanes that holds row m and place(m) its number among the l_held rows that such a lane holds: a
    lane's sums over the `m_tiles` instructions are l_run consecutive latent columns of each of its tokens.
    """

    atom: MmaAtom
    nope_dim: int
    lora_rank: int
    m_tiles: int

    def __post_init__(self) -> None:
        if self.lora_rank % self.l_tile:
            raise ScheduleError(f"l_tile={self.l_tile} does not divide lora_rank={self.lora_rank}: columns would be left over")
        if self.fragment_k % self.atom.b.registers:
            raise ScheduleError(f"{self.atom.builtin}: {self.atom.b.registers} k for each lane do not divide a fragment")
        for fragment, axis in ((self.atom.b, "k"), (self.atom.d, "m")):
            if sum(digit.axis == axis for digit in fragment.lane) != 1:
                raise ScheduleError(f"{self.atom.builtin}: the generated lane arithmetic takes one lane digit along {axis}")
        columns = {self.latent_column(i, m) for i in range(self.m_tiles) for m in range(self.atom.m)}
        if columns != set(range(self.l_tile)):
            raise ScheduleError(f"{self}: the atoms' rows do not cover the latent tile exactly once")

    @property
    def l_tile(self) -> int:
        """Latent columns of one wave."""
        return self.m_tiles * self.atom.m

    @property
    def l_tiles(self) -> int:
        return self.lora_rank // self.l_tile

    @property
    def l_held(self) -> int:
        """Rows of one atom whose sums one lane holds."""
        return self.atom.d.run("m")

    @property
    def l_run(self) -> int:
        """Consecutive latent columns that one lane ends with."""
        return self.m_tiles * self.l_held

    @property
    def fragment_k(self) -> int:
        """k in one fragment of one lane, of a 2-byte type."""
        return FRAGMENT_BYTES // 2

    @property
    def atoms_per_chunk(self) -> int:
        return self.fragment_k // self.atom.b.registers

    @property
    def chunk(self) -> int:
        """k covered by one fragment of every lane."""
        return self.atom.k * self.atoms_per_chunk

    @property
    def chunks(self) -> int:
        """Chunks over P; the last one may reach beyond P, where both operands are zero."""
        return -(-self.nope_dim // self.chunk)

    @property
    def padded(self) -> bool:
        return self.nope_dim % self.chunk != 0

    @property
    def token_tile(self) -> int:
        return self.atom.n

    @property
    def tokens_per_lane(self) -> int:
        """Tokens whose sums one lane holds."""
        return self.atom.d.run("n")

    @property
    def weight_fragments(self) -> int:
        """Fragments of one lane that hold the weights of one chunk and m tile."""
        return self.atoms_per_chunk * self.atom.a.registers // self.fragment_k

    @property
    def weight_registers(self) -> int:
        """Registers that one lane's weight tile takes."""
        return self.chunks * self.m_tiles * self.weight_fragments * FRAGMENT_BYTES // 4

    @property
    def registers(self) -> int:
        """Registers of one lane that must be live at once: the weights, one token tile of q, and the sums."""
        return self.weight_registers + self.chunks * FRAGMENT_BYTES // 4 + self.m_tiles * self.atom.d.registers

    def latent_column(self, m_tile: int, m: int) -> int:
        """Latent column, from the tile's first, of row `m` of instruction `m_tile`."""
        group, place = self.atom.d.holder("m", m)
        return group * self.l_run + m_tile * self.l_held + place


@dataclass(frozen=True)
class Launch:
    """The grid of one launch: workgroups of each segment in order, and the token tiles that an absorb workgroup takes."""

    workgroups: tuple[int, ...]
    token_tiles_per_workgroup: int

    @property
    def grid(self) -> int:
        return sum(self.workgroups)


@dataclass(frozen=True)
class Schedule:
    """How one kernel runs.  `absorb` is None and `pieces` has None where a segment is not of that kind."""

    wave: int
    waves_per_workgroup: int
    xcds: int
    compute_units: int
    simds_per_cu: int
    absorb: AbsorbTiles | None
    pieces: tuple[Pieces | None, ...]

    def __post_init__(self) -> None:
        if self.absorb and self.absorb.l_tiles % self.waves_per_workgroup:
            raise ScheduleError(
                f"waves_per_workgroup={self.waves_per_workgroup} does not divide {self.absorb.l_tiles} latent tiles of a head"
            )

    @property
    def threads(self) -> int:
        """Lanes of one workgroup."""
        return self.wave * self.waves_per_workgroup

    @property
    def workgroups_per_head(self) -> int:
        """Absorb workgroups that share a head's weights, for one split of the tokens."""
        assert self.absorb is not None, "only an absorb has workgroups per head"
        return self.absorb.l_tiles // self.waves_per_workgroup

    def launch(self, segments: tuple[Segment, ...], tokens: int, heads: int) -> Launch:
        """The grid for `tokens` rows and `heads` heads.  A pure function: the same counts give the same grid.

        The tokens are split over workgroups until every SIMD has WAVES_PER_SIMD_GOAL waves; beyond that a workgroup takes
        more token tiles, because each split reads the weights again.
        """
        per_workgroup = 1
        workgroups = []
        for segment, pieces in zip(segments, self.pieces, strict=True):
            if pieces is not None:
                rows = tokens * heads if segment.sink.role == "q" else tokens
                workgroups.append(-(-rows * pieces.lanes // self.threads))
                continue
            assert self.absorb is not None, "a segment without pieces is the absorb"
            tiles = -(-tokens // self.absorb.token_tile)
            rounded_heads = -(-heads // self.xcds) * self.xcds
            waves = tiles * rounded_heads * self.absorb.l_tiles
            per_workgroup = max(1, min(tiles, waves // (self.compute_units * self.simds_per_cu * WAVES_PER_SIMD_GOAL)))
            splits = -(-tiles // per_workgroup)
            workgroups.append(splits * rounded_heads * self.workgroups_per_head)
        return Launch(tuple(workgroups), per_workgroup)

    def absorb_owner(self, workgroup: int, heads: int) -> tuple[int, int, int]:
        """(head, first latent tile, split of the tokens) of an absorb workgroup, counted from the segment's first.

        Workgroups are dealt to the XCDs in turn, so those of one head are `xcds` apart: the head's weights stay in one L2.  A head
        number of `heads` or more owns nothing.
        """
        rest, xcd = divmod(workgroup, self.xcds)
        rest, part = divmod(rest, self.workgroups_per_head)
        split, head_group = divmod(rest, -(-heads // self.xcds))
        return head_group * self.xcds + xcd, part * self.waves_per_workgroup, split


def choose_schedule(lowered: Lowered, target: Target, *, waves_per_workgroup: int = 1, m_tiles: int | None = None) -> Schedule:
    """The schedule of a lowered program on a target.

    One wave for each workgroup spreads a decode step's few waves over the most compute units.  A weight tile is as wide as
    WEIGHT_REGISTERS allow, at most four atoms, with which a lane stores 16 fp8 codes at once.  Raises ScheduleError where the
    given `waves_per_workgroup` or `m_tiles` do not fit the shape or the registers.
    """
    absorb = None
    if lowered.absorb:
        absorb = _choose_tiles(lowered.absorb, target.atom(lowered.model_dtype), m_tiles)
        if absorb.registers > target.registers_per_wave_lane:
            limit = target.registers_per_wave_lane
            raise ScheduleError(f"{absorb.registers} live registers for each lane, a wave of {target.arch} has {limit}")
    return Schedule(
        wave=target.wave,
        waves_per_workgroup=waves_per_workgroup,
        xcds=target.xcds,
        compute_units=target.compute_units,
        simds_per_cu=target.simds_per_cu,
        absorb=absorb,
        pieces=tuple(None if segment.absorb else cut(segment) for segment in lowered.segments),
    )


def _choose_tiles(segment: Segment, atom: MmaAtom, m_tiles: int | None) -> AbsorbTiles:
    if m_tiles is not None:
        return AbsorbTiles(atom, segment.source_width, segment.width, m_tiles)
    for candidate in (4, 2, 1):
        if segment.width % (candidate * atom.m):
            continue
        tiles = AbsorbTiles(atom, segment.source_width, segment.width, candidate)
        if candidate == 1 or tiles.weight_registers <= WEIGHT_REGISTERS:
            return tiles
    raise ScheduleError(f"lora_rank={segment.width} is not a multiple of the atom's {atom.m} rows")


def cut(segment: Segment) -> Pieces:
    """Pieces of an elementwise segment: as wide as the row's width allows, up to PIECE_ELEMENTS for each lane."""
    if segment.rope and segment.rope.style == "neox":
        pairs = math.gcd(segment.width // 2, PIECE_ELEMENTS // 2)
        return Pieces(segment.width // (2 * pairs), pairs, 2, pairs, segment.width // 2)
    run = math.gcd(segment.width, PIECE_ELEMENTS)
    return Pieces(segment.width // run, run, 1, run, 0)
