"""Schedule: how a lowered program is laid over workgroups, waves and lanes, with the proof that it covers every output once.

Two kinds of work.  An absorb workgroup owns one head, `l_tile` latent columns for each of its waves, and a run of token tiles: each
wave holds its weight tile in registers and multiplies it with one token tile after another, which it loads itself or finds staged
in shared memory.  The other segments are cut into pieces of a few consecutive elements, and a lane owns one piece of one row.
"""

import functools
import itertools
import math
from dataclasses import dataclass

from mlagen.errors import ScheduleError
from mlagen.layout import Layout
from mlagen.lowering import Lowered, Segment
from mlagen.staging import Staging
from mlagen.target import MmaAtom, Target
from mlagen.tiles import FRAGMENT_BYTES, AbsorbTiles

PIECE_ELEMENTS = 16
"""Elements of a row that one lane copies: 16 fp8 codes are one 128-bit store."""

WEIGHT_REGISTERS = {"amd": 64, "nvidia": 128}
"""Registers for a weight tile.  AMD: with q, sums and addresses beside it, four waves of 128 registers each still fit on a SIMD."""

M_TILES = {"amd": (4, 2, 1), "nvidia": (2, 1)}
"""Atoms that may make a weight tile, best first.  AMD: with four a lane stores 16 fp8 codes at once.  NVIDIA: two, so that one head
has enough warps, and a lane's fp8 codes still fill a word."""

M_TILES_OF_CODES = {"amd": (4, 2, 1), "nvidia": (1, 2)}
"""The same where the weights are codes that become the model's dtype in registers.  NVIDIA: one, so that a wave, whose
conversion is in the way of its product, has less to convert; with 128 heads two are faster (H200), which its tables say."""

M_TILES_OF_ROWS = (4, 2, 1)
"""The same, on all platforms, where one workgroup has all latent tiles of a head: fewer waves have more registers each."""

MOST_PASSES = 12
"""Latent tiles that a wave makes of one token tile: compilers unroll them, so that their sums stay in registers."""

MAX_THREADS = 1024
"""Lanes of a workgroup, on all targets."""

OTHER_REGISTERS = 32
"""Registers for addresses and the like, beside the weights, q and the sums."""

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
class Launch:
    """The grid of one launch: workgroups of each segment, in the order of the segments, the token tiles that an absorb workgroup
    takes, how many of these there are, and the bytes of shared memory of a workgroup."""

    workgroups: tuple[int, ...]
    token_tiles_per_workgroup: int
    absorb_workgroups: int
    shared_bytes: int

    @property
    def grid(self) -> int:
        return sum(self.workgroups)

    @property
    def values(self) -> dict[str, int]:
        """The kernel arguments that say how the grid is divided."""
        return {
            "token_tiles_per_workgroup": self.token_tiles_per_workgroup,
            "absorb_workgroups": self.absorb_workgroups,
            "row_workgroups": self.grid - self.absorb_workgroups,
        }


@dataclass(frozen=True)
class Schedule:
    """How one kernel runs.  `absorb` is None and `pieces` has None where a segment is not of that kind.

    With `staging`, absorb workgroups find their query in shared memory, and they come first in the grid: they are few and large,
    and the rows of the other segments fill what they leave.  Without it the others come first: their chains of loads are longer.
    `passes` is the number of latent tiles that a wave makes of each token tile: more than one where a workgroup needs whole rows,
    for their scales, and has too few registers for the weights of a head.  It then loads them again for each token tile.
    """

    wave: int
    waves_per_workgroup: int
    xcds: int
    compute_units: int
    simds_per_cu: int
    absorb: AbsorbTiles | None
    pieces: tuple[Pieces | None, ...]
    staging: Staging | None = None
    passes: int = 1

    def __post_init__(self) -> None:
        if self.absorb and self.absorb.l_tiles % (self.waves_per_workgroup * self.passes):
            raise ScheduleError(
                f"waves_per_workgroup={self.waves_per_workgroup} does not divide {self.absorb.l_tiles} latent tiles of a head"
            )
        if self.threads > MAX_THREADS:
            raise ScheduleError(f"{self.waves_per_workgroup} waves are {self.threads} lanes; a workgroup has {MAX_THREADS} at most")
        if self.staging and self.waves_per_workgroup % self.staging.group:
            raise ScheduleError(
                f"waves_per_workgroup={self.waves_per_workgroup}: {self.staging.group} waves multiply together from shared memory"
            )
        if self.staging and not self.staging.whole_blocks(1, self.waves_per_workgroup):
            limit = self.staging.shared_limit
            raise ScheduleError(f"one block of {self.staging.block} tokens takes more than {limit} bytes of shared memory")

    @property
    def threads(self) -> int:
        """Lanes of one workgroup."""
        return self.wave * self.waves_per_workgroup

    @property
    def workgroups_per_head(self) -> int:
        """Absorb workgroups that share a head's weights, for one split of the tokens."""
        assert self.absorb is not None, "only an absorb has workgroups per head"
        return self.absorb.l_tiles // (self.waves_per_workgroup * self.passes)

    def row_lanes(self, segment: Segment, pieces: Pieces) -> int:
        """Lanes that share a row of an elementwise segment: a whole wave where they find its scale together."""
        return self.wave if segment.sink.row_scale else pieces.lanes

    def launch(
        self, segments: tuple[Segment, ...], tokens: int, heads: int, *, token_tiles: int | None = None, kv_heads: int = 1
    ) -> Launch:
        """The grid for `tokens` rows, `heads` heads and `kv_heads` KV heads, with `token_tiles` tiles of tokens for each absorb
        workgroup.

        A pure function: the same counts give the same grid.  Without `token_tiles` the tokens are split over workgroups until every
        SIMD has WAVES_PER_SIMD_GOAL waves; beyond that a workgroup takes more token tiles, because each split reads the weights
        again.
        """
        per_workgroup, absorb_workgroups, shared_bytes = 1, 0, 0
        workgroups = []
        for segment, pieces in zip(segments, self.pieces, strict=True):
            if pieces is not None:
                rows = tokens * {"heads": heads, "kv_heads": kv_heads, None: 1}[segment.heads]
                workgroups.append(-(-rows * self.row_lanes(segment, pieces) // self.threads))
                continue
            assert self.absorb is not None, "a segment without pieces is the absorb"
            tiles = -(-tokens // self.absorb.token_tile)
            rounded_heads = -(-heads // self.xcds) * self.xcds
            waves = tiles * rounded_heads * self.absorb.l_tiles
            wanted = token_tiles or waves // (self.compute_units * self.simds_per_cu * WAVES_PER_SIMD_GOAL)
            per_workgroup = max(1, min(tiles, wanted))
            if self.staging:
                per_workgroup = self.staging.whole_blocks(per_workgroup, self.waves_per_workgroup)
                shared_bytes = self.staging.shared_bytes(per_workgroup, self.waves_per_workgroup)
            splits = -(-tiles // per_workgroup)
            absorb_workgroups = splits * rounded_heads * self.workgroups_per_head
            workgroups.append(absorb_workgroups)
        return Launch(tuple(workgroups), per_workgroup, absorb_workgroups, shared_bytes)

    def absorb_owner(self, workgroup: int, heads: int) -> tuple[int, int, int]:
        """(head, first latent tile, split of the tokens) of an absorb workgroup, counted from the segment's first.

        Workgroups are dealt to the XCDs in turn, so those of one head are `xcds` apart: the head's weights stay in one L2.  A head
        number of `heads` or more owns nothing.
        """
        rest, xcd = divmod(workgroup, self.xcds)
        rest, part = divmod(rest, self.workgroups_per_head)
        split, head_group = divmod(rest, -(-heads // self.xcds))
        return head_group * self.xcds + xcd, part * self.waves_per_workgroup, split


def lay_out(lowered: Lowered, target: Target, layout: Layout) -> Schedule:
    """The schedule with a layout's choices.  Raises as choose_schedule."""
    waves, block, m_tiles = layout.waves_per_workgroup, layout.block, layout.m_tiles
    return choose_schedule(lowered, target, waves_per_workgroup=waves, block=block, m_tiles=m_tiles)


def m_tiles_to_try(lowered: Lowered, target: Target) -> tuple[int | None, ...]:
    """Values of Layout.m_tiles that are worth a measurement, the rule's (None) first; others for weights in codes only."""
    if lowered.absorb is None or not _is_converted(lowered.absorb):
        return (None,)
    return (None, *M_TILES_OF_CODES[target.platform][1:])


def _is_converted(absorb: Segment) -> bool:
    """Whether codes become the model's dtype in registers."""
    return absorb.scale_block is not None and absorb.absorb is not None and absorb.absorb.activation is None


@functools.cache
def choose_schedule(
    lowered: Lowered, target: Target, *, waves_per_workgroup: int = 1, m_tiles: int | None = None, block: int | None = None
) -> Schedule:
    """The schedule of a lowered program on a target.

    One wave for each workgroup spreads a decode step's few waves over the most compute units.  A weight tile is as wide as
    WEIGHT_REGISTERS and M_TILES allow.  With `block` the query is staged in shared memory and multiplied `block` tokens at a time.
    Raises ScheduleError where the given values do not fit the shape, the registers or the target.
    """
    absorb = staging = None
    passes = 1
    scaled = any(sink.row_scale for sink in lowered.queries)
    if scaled and (waves_per_workgroup != 1 or block is not None):
        what = f"waves_per_workgroup={waves_per_workgroup}" if block is None else f"block={block}"
        raise ScheduleError(f"{what}: rows with scales of their own need whole rows in a workgroup, which says how large it is")
    if lowered.absorb and scaled:
        absorb, waves_per_workgroup, passes = _choose_whole_rows(
            lowered.absorb, target, target.atom(lowered.operand_dtype), m_tiles
        )
    elif lowered.absorb:
        absorb = _choose_tiles(lowered.absorb, target, target.atom(lowered.operand_dtype), m_tiles)
        registers = absorb.registers
        if block is not None:
            staging = _choose_staging(lowered, target, absorb, block)
            registers = absorb.weight_registers + block // absorb.token_tile * absorb.m_tiles * absorb.atom.d.registers
        if registers > target.registers_per_wave_lane:
            limit = target.registers_per_wave_lane
            raise ScheduleError(f"{registers} live registers for each lane, a wave of {target.arch} has {limit}")
        if target.waves_per_simd(registers + OTHER_REGISTERS) * target.simds_per_cu < waves_per_workgroup:
            raise ScheduleError(f"{waves_per_workgroup} waves of {registers + OTHER_REGISTERS} registers do not fit a compute unit")
    return Schedule(
        wave=target.wave,
        waves_per_workgroup=waves_per_workgroup,
        xcds=target.xcds,
        compute_units=target.compute_units,
        simds_per_cu=target.simds_per_cu,
        absorb=absorb,
        pieces=tuple(None if segment.absorb else cut(segment) for segment in lowered.segments),
        staging=staging,
        passes=passes,
    )


def _choose_tiles(segment: Segment, target: Target, atom: MmaAtom, m_tiles: int | None) -> AbsorbTiles:
    if m_tiles is not None:
        return AbsorbTiles(atom, segment.source_width, segment.width, m_tiles)
    for candidate in (M_TILES_OF_CODES if _is_converted(segment) else M_TILES)[target.platform]:
        if segment.width % (candidate * atom.m):
            continue
        tiles = AbsorbTiles(atom, segment.source_width, segment.width, candidate)
        if candidate == 1 or tiles.weight_registers <= WEIGHT_REGISTERS[target.platform]:
            return tiles
    raise ScheduleError(f"lora_rank={segment.width} is not a multiple of the atom's {atom.m} rows")


def _choose_whole_rows(segment: Segment, target: Target, atom: MmaAtom, m_tiles: int | None) -> tuple[AbsorbTiles, int, int]:
    """Tiles, waves and passes with which one workgroup has all latent tiles of a head: in as few passes as registers allow."""
    candidates = M_TILES_OF_ROWS if m_tiles is None else (m_tiles,)
    whole = [AbsorbTiles(atom, segment.source_width, segment.width, m) for m in candidates if segment.width % (m * atom.m) == 0]
    rounds = segment.absorb is not None and segment.absorb.activation is not None
    for passes, tiles in itertools.product(range(1, MOST_PASSES + 1), whole):
        if passes > 1 and tiles.m_tiles > 1 and tiles.weight_registers > WEIGHT_REGISTERS[target.platform]:
            continue
        waves, left = divmod(tiles.l_tiles, passes)
        kept = 2 * passes * tiles.m_tiles * atom.d.registers  # sums, and the values made of them
        arriving = 4 * tiles.chunks * FRAGMENT_BYTES // 4 if rounds else 0  # the query before it is codes, and its magnitudes
        # AMD's compiler asks for the weights of a pass before it is done with those of the last.
        next_weights = tiles.weight_registers if passes > 1 and target.platform == "amd" else 0
        registers = tiles.registers + next_weights + kept + arriving + OTHER_REGISTERS
        fits = registers <= target.registers_per_wave_lane and waves * target.wave <= MAX_THREADS
        if not left and fits and target.waves_per_simd(registers) * target.simds_per_cu >= waves:
            return tiles, waves, passes
    raise ScheduleError(
        f"lora_rank={segment.width} with nope_dim={segment.source_width}: a row with a scale of its own is made in one workgroup, "
        f"and no number of waves of {target.arch} has the registers for that; use q_scaling='static'"
    )


def _choose_staging(lowered: Lowered, target: Target, tiles: AbsorbTiles, block: int) -> Staging:
    product = target.shared_product(lowered.model_dtype)
    if product is None:
        raise ScheduleError(f"block={block}: {target.arch} has no product from shared memory")
    if block not in product.blocks:
        raise ScheduleError(f"block={block}: {target.arch} multiplies {', '.join(map(str, product.blocks))} tokens at a time")
    if lowered.operand_dtype is not lowered.model_dtype:
        raise ScheduleError(f"block={block}: the query in shared memory is {lowered.model_dtype}, not {lowered.operand_dtype}")
    assert lowered.absorb is not None, "only its query is staged"
    scale_block = lowered.absorb.scale_block
    if scale_block and scale_block[1] > 1 and scale_block[0] < tiles.nope_dim:
        raise ScheduleError(f"block={block}: a product from shared memory is a whole sum, here {scale_block[0]} rows have a scale")
    return Staging(tiles, block, product.waves, lowered.absorb.sink.quantize.dtype.bytes, target.lds_bytes)


def cut(segment: Segment) -> Pieces:
    """Pieces of an elementwise segment: as wide as the row's width allows, up to PIECE_ELEMENTS for each lane."""
    if segment.rope and segment.rope.style == "neox":
        pairs = math.gcd(segment.width // 2, PIECE_ELEMENTS // 2)
        return Pieces(segment.width // (2 * pairs), pairs, 2, pairs, segment.width // 2)
    run = math.gcd(segment.width, PIECE_ELEMENTS)
    return Pieces(segment.width // run, run, 1, run, 0)
