"""A model of how long the prologue takes on an AMD GPU: bytes, waves, occupancy and round trips.  Nothing here was measured.

The shipped tables for gfx942 and gfx950 come from it.  It is meant to put layouts in order, not to foretell times: whatever shows
one of its numbers calls it modelled, and a table that `mlagen tune` measures on the GPU is worth more.

A launch, as the model sees it, one part after the other:

    launch        the same for all layouts
    first loads   one round trip to memory: all waves ask for their weights and first tokens at once
    bytes         the longest of HBM, L2 and load path, for all that is read and written
    tiles         the longer of the round trips, one for each further tile of tokens, and the work of all waves of the busiest SIMD:
                  matrix instructions, and the vector instructions that convert the sums

The rows of the other segments run beside the absorb, and count where their chain of round trips is longer.

Assumed:
- The data sheets' HBM bandwidth and clock, and caches without conflicts.  Real rates are lower, for all layouts alike.
- Every round trip goes to memory: all latent tiles of a head ask for a tile of tokens at the same time, so none finds it in L2.
- A head's weights stay in one L2 from one split of the tokens to the next (shipped shapes need 2 MiB of an XCD's 4 at most).
- The waves of a workgroup find in L1 what the first of them fetched of the query.
- Workgroups spread evenly over an XCD's compute units, waves over SIMDs; those that find no room wait for a whole round.
- gfx950 has the latency and the L2 rate of gfx942: none was found for it.

Left out: the time to hand out workgroups, that bytes of one wave come while another works, the Infinity Cache (what it holds counts
as HBM's), address translation, clocks under load, what else runs.
"""

import contextlib
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from mlagen.errors import ScheduleError, TargetError
from mlagen.layout import Layout
from mlagen.lowering import Lowered, lower
from mlagen.models import PRESETS
from mlagen.schedule import Schedule, lay_out
from mlagen.shipped import TP_SIZES
from mlagen.spec import PrologueSpec
from mlagen.tables import Entry, Range, write_table
from mlagen.target import Target

CLOCK: Mapping[str, float] = MappingProxyType({"gfx942": 2.1e9, "gfx950": 2.4e9})
"""Cycles per second: peak engine clocks of MI300X and MI355X.  Source: AMD's data sheets."""

MATRIX_OPERATIONS: Mapping[str, int] = MappingProxyType({"gfx942": 2048, "gfx950": 4096})
"""16-bit operations per cycle of a compute unit.  Source: the data sheets' 1307 and 2517 TFLOPS, over clock and compute units."""

VALU_CYCLES = 4
"""Cycles for which one vector instruction of a wave of 64 keeps a SIMD of 16 lanes.  Source: CDNA3 instruction set guide."""

L2_BYTES = 2048
"""Bytes per cycle from the L2 of one XCD: 16 channels of 128.  Source: CDNA3 white paper."""

LOAD_BYTES = 64
"""Bytes per cycle into one compute unit.  An assumption: documented for MI200, and AMD's profiler takes twice that for MI300."""

MEMORY_LATENCY = 0.6
"""Microseconds from a load to its value, from HBM.  Source: 1212 cycles on MI300X, in a public microbenchmark (on GitHub,
MrRoy09/AMD-CDNA3-CacheBenchmarking)."""

LAUNCH = 2.0
"""Microseconds that a kernel of a graph takes beside what it does.  An assumption, no figure was found: small kernels on MI355X are
published with 4.65 us and more in all (vLLM #57452)."""

ROTATE_TRIPS, COPY_TRIPS = 3, 2
"""Loads that a row of the other segments waits for one after another: arguments, then slots or positions, then cos and sin."""

VALUE_INSTRUCTIONS, TILE_INSTRUCTIONS = 5, 16
"""Vector instructions that convert one value of a lane to fp8, and those of a token tile beside them.  Source: the loop in the
compiled kernels, 92 for 16 values and 54 for 8.  Only conversion to bf16 on gfx950 takes far fewer."""

COMPILER_REGISTERS = 16
"""Registers that the compiler takes beside those that the schedule counts.  Source: the compiled kernels, 12 to 18."""

WAVES, TOKEN_TILES = (1, 2, 4), (1, 2, 4, 8, 16, 32)
"""What is tried: waves of a workgroup, and tiles of tokens for each."""

TOKENS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Where it is tried; each number stands for those between it and the one before."""

WORTH = 0.02
"""What part of the time a second kernel must gain on average, and one more range of tokens somewhere."""

SOURCE = "modelled by mlagen/model.py; nothing was measured"


@dataclass(frozen=True)
class Prediction:
    """Modelled microseconds of one launch, by part; `total` says which parts overlap.

    `round_trips` are the absorb's, the first included, `rows` those of the other segments.  `hbm`, `l2` and `load_path` are for the
    bytes from and to memory, of the busiest XCD's L2 and into the busiest compute unit, `matrix` and `issue` for the matrix
    and the vector instructions of the busiest SIMD.
    """

    launch: float
    round_trips: float
    rows: float
    hbm: float
    l2: float
    load_path: float
    matrix: float
    issue: float

    @property
    def absorb(self) -> float:
        """From the kernel's start to the absorb's end."""
        tiles = max(self.round_trips - MEMORY_LATENCY, self.matrix + self.issue)
        return MEMORY_LATENCY + max(self.hbm, self.l2, self.load_path) + tiles

    @property
    def total(self) -> float:
        return self.launch + max(self.rows, self.absorb)


def predict(spec: PrologueSpec, target: Target, layout: Layout, token_tiles: int, tokens: int) -> Prediction:
    """The model's answer for `tokens` tokens, one or more, with `token_tiles` tiles of them for each absorb workgroup.

    Raises ScheduleError for a layout that does not fit, TargetError for a target of which the model has no numbers.
    """
    if target.arch not in CLOCK:
        raise TargetError(f"{target.arch}: the model has numbers for {', '.join(CLOCK)} only; run `mlagen tune` on the GPU itself")
    lowered, schedule = _scheduled(spec, target, layout)
    tiles = schedule.absorb
    if tiles is None:
        raise ScheduleError("weight='none': without the product there is no layout to choose")
    launch = schedule.launch(lowered.segments, tokens, spec.heads, token_tiles=token_tiles, kv_heads=spec.kv_heads)
    per_workgroup = launch.token_tiles_per_workgroup
    heads_of_xcd = -(-spec.heads // target.xcds)
    workgroups_of_xcd = launch.absorb_workgroups // target.xcds
    splits = workgroups_of_xcd // (heads_of_xcd * schedule.workgroups_per_head)

    waves = layout.waves_per_workgroup
    workgroups_of_unit = -(-workgroups_of_xcd * target.xcds // target.compute_units)
    waves_of_simd = -(-workgroups_of_unit * waves // target.simds_per_cu)
    room = target.waves_per_simd(tiles.registers + COMPILER_REGISTERS) * target.simds_per_cu // waves
    rounds = -(-workgroups_of_unit // room)

    # Bytes; weights, query and latent are those of one head.
    wide, padded = 2, tiles.chunks * tiles.chunk
    q_bytes, kv_bytes = (1 if name == "fp8" else wide for name in (spec.q_dtype, spec.kv_dtype))
    weights = padded * spec.lora_rank * wide
    query, latent = tokens * spec.nope_dim * wide, tokens * spec.lora_rank * q_bytes
    rope = spec.heads * spec.rope_dim * (wide + q_bytes) + (spec.rope_dim * wide if lowered.ropes else 0)
    entry = spec.entry_dim * (wide + kv_bytes) if spec.write_kv else 0
    rows = tokens * (rope + entry)
    hbm = _fetches(schedule, spec.heads) * weights + spec.heads * (query + latent) + rows
    l2 = heads_of_xcd * (splits * weights + schedule.workgroups_per_head * query + latent) + rows / target.xcds
    into_wave = (tiles.l_tile * padded + per_workgroup * tiles.token_tile * spec.nope_dim) * wide

    instructions = tiles.chunks * tiles.atoms_per_chunk * tiles.m_tiles
    operations = 2 * tiles.atom.m * tiles.atom.n * tiles.atom.k
    matrix_cycles = instructions * operations / (MATRIX_OPERATIONS[target.arch] / target.simds_per_cu)
    issue_cycles = (TILE_INSTRUCTIONS + VALUE_INSTRUCTIONS * tiles.l_run * tiles.tokens_per_lane) * VALU_CYCLES
    cycle = 1e6 / CLOCK[target.arch]
    return Prediction(
        launch=LAUNCH,
        round_trips=rounds * per_workgroup * MEMORY_LATENCY,
        rows=(ROTATE_TRIPS if lowered.ropes else COPY_TRIPS) * MEMORY_LATENCY,
        hbm=hbm / target.hbm_bytes_per_second * 1e6,
        l2=l2 / L2_BYTES * cycle,
        load_path=workgroups_of_unit * waves * into_wave / LOAD_BYTES * cycle,
        matrix=waves_of_simd * per_workgroup * matrix_cycles * cycle,
        issue=waves_of_simd * per_workgroup * issue_cycles * cycle,
    )


@functools.cache
def _scheduled(spec: PrologueSpec, target: Target, layout: Layout) -> tuple[Lowered, Schedule]:
    lowered = lower(spec.program(target))
    return lowered, lay_out(lowered, target, layout)


@functools.cache
def _fetches(schedule: Schedule, heads: int) -> int:
    """How often the weights of a head come from memory, over all heads: once for each XCD that has a workgroup of that head."""
    first_split = range(-(-heads // schedule.xcds) * schedule.xcds * schedule.workgroups_per_head)
    owners = ((schedule.absorb_owner(workgroup, heads)[0], workgroup % schedule.xcds) for workgroup in first_split)
    return len({(head, xcd) for head, xcd in owners if head < heads})


def best_ranges(spec: PrologueSpec, target: Target, tokens: Sequence[int] = TOKENS) -> tuple[Range, ...]:
    """The ranges that the model likes best, found at the given rising numbers of tokens.

    One kernel, or two where the second gains more than WORTH; among those that the model finds alike, the one with the smallest
    workgroups.  Only the absorb's time is looked at, also where the rows are modelled to take longer.
    """
    if not spec.absorbs:
        return (Range(None, Layout()),)
    times: dict[tuple[Layout, int], list[float]] = {}
    for layout, tiles in itertools.product(map(Layout, WAVES), TOKEN_TILES):
        with contextlib.suppress(ScheduleError):
            predictions = [predict(spec, target, layout, tiles, count) for count in tokens]
            times[layout, tiles] = [each.launch + each.absorb for each in predictions]
    best = _least(times)

    def loss(kernels: tuple[Layout, ...]) -> float:
        """What these kernels alone lose on average, as a part of the time."""
        found = _least({choice: row for choice, row in times.items() if choice[0] in kernels})
        return sum(ours / least for ours, least in zip(found, best, strict=True)) / len(best) - 1

    layouts = dict.fromkeys(layout for layout, _ in times)
    kernels = [*itertools.combinations(layouts, 1), *itertools.combinations(layouts, 2)]
    chosen = next((each for each in kernels if loss(each) <= WORTH), None) or min(kernels, key=loss)
    return _merge({choice: row for choice, row in times.items() if choice[0] in chosen}, tokens)


def _least(times: Mapping[tuple[Layout, int], Sequence[float]]) -> list[float]:
    return [min(column) for column in zip(*times.values(), strict=True)]


def _merge(times: Mapping[tuple[Layout, int], Sequence[float]], tokens: Sequence[int]) -> tuple[Range, ...]:
    """The fewest ranges in which one choice is within WORTH of the best for each number of tokens."""
    best, ranges, start = _least(times), [], 0
    while start < len(tokens):
        good, end = list(times), start
        while end < len(tokens) and (still := [each for each in good if times[each][end] <= best[end] * (1 + WORTH)]):
            good, end = still, end + 1
        layout, tiles = min(good, key=lambda choice: sum(times[choice][start:end]))
        ranges.append(Range(tokens[end - 1] if end < len(tokens) else None, layout, tiles))
        start = end
    return tuple(ranges)


def modelled_table(target: Target) -> str:
    """The text of the table that is shipped for `target`: the shapes of all shipped models, with each rank's number of heads."""
    specs: dict[tuple[int, int, int], PrologueSpec] = {}
    for name, shape in PRESETS.items():
        for tp in TP_SIZES:
            if shape.heads % tp == 0:
                spec = PrologueSpec.from_model(name, tp=tp)
                specs.setdefault((spec.lora_rank, spec.nope_dim, spec.heads), spec)
    entries = [Entry(nope, rank, heads, False, best_ranges(spec, target)) for (rank, nope, heads), spec in sorted(specs.items())]
    return write_table(target.arch, SOURCE, entries)
