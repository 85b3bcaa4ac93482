"""tune: which layout is the fastest for how many tokens, found out by timing all that fit on this GPU.

Every candidate is checked against the oracle before it is timed.  All of one number of tokens take turns, so that whatever drifts
meanwhile drifts for all alike, and each layer has weights of its own, which are cold when its turn comes.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from mlagen.bench.run import measure_methods
from mlagen.errors import ScheduleError, VerificationError
from mlagen.layout import Layout
from mlagen.lowering import lower
from mlagen.runtime import Kernel, variants_of
from mlagen.schedule import lay_out, m_tiles_to_try
from mlagen.spec import PrologueSpec
from mlagen.tables import Entry, Range
from mlagen.target import Target
from mlagen.timing.candidate import Candidate, kernel_candidate, pack
from mlagen.timing.check import Oracle
from mlagen.timing.floor import Floor
from mlagen.timing.graphs import Graph, Recorder
from mlagen.timing.workload import Workload, cold_layers, make_workload

TOKENS = (1, 8, 16, 32, 64, 128, 256)
"""Numbers of tokens at which ranges may end; the choice for the last one serves all that are more."""

WAVES = (1, 2, 4, 8, 16)
BLOCKS = (None, 16, 32)
SPLITS = (1, 2, 4, 8, 16)

MOST_LAYOUTS = 3
"""Kernels of one shape: each more takes time to compile and to load."""

STREAM = "stream"


@dataclass(frozen=True)
class Timing:
    """Microseconds per layer of the candidates for one number of tokens, and of the streaming floor in the same run."""

    tokens: int
    us: Mapping[Range, float]
    stream: float


def candidates(
    spec: PrologueSpec, target: Target, tokens: int, *, dependent: bool, m_tiles: Sequence[int | None] | None = None
) -> list[Range]:
    """Every way to do `tokens` tokens that fits the shape and the target; with `m_tiles` only those that have one of these."""
    lowered = lower(spec.program(target))
    found: list[Range] = []
    for width, waves, block in itertools.product(m_tiles or m_tiles_to_try(lowered, target), WAVES, BLOCKS):
        layout = Layout(waves, block, dependent, width)
        try:
            schedule = lay_out(lowered, target, layout)
        except ScheduleError:
            continue
        assert schedule.absorb is not None, "what does no absorb has nothing to tune"
        if block and block > 2 * tokens:  # more than half of it for nothing
            continue
        tiles = -(-tokens // schedule.absorb.token_tile)
        for splits in SPLITS:
            launch = schedule.launch(lowered.segments, tokens, spec.heads, token_tiles=-(-tiles // splits), kv_heads=spec.kv_heads)
            one = Range(tokens, layout, launch.token_tiles_per_workgroup)
            if one not in found:
                found.append(one)
    return found


def time_candidates(
    spec: PrologueSpec,
    target: Target,
    device: torch.device,
    token_counts: Iterable[int] = TOKENS,
    *,
    dependent: bool,
    m_tiles: Sequence[int | None] | None = None,
    layers: int,
    repeats: int,
    record: Recorder = Graph,
) -> Iterator[Timing]:
    """The times of all candidates, number of tokens by number of tokens; with `m_tiles` only of those that have one of these.

    Raises VerificationError for a candidate whose result the oracle does not explain, and as load does.
    """
    floor = Floor(target, device)
    layers = cold_layers(spec, target, layers, spec.weight_bits(target) / 8)
    for tokens in token_counts:
        workload = make_workload(spec, target, tokens, layers, device=device)
        ranges = {name_of(each): each for each in candidates(spec, target, tokens, dependent=dependent, m_tiles=m_tiles)}
        packed: dict[int | None, list[torch.Tensor]] = {}
        methods: dict[str, Callable[[Workload], Sequence[Candidate]]] = {}
        for name, each in ranges.items():
            kernel, order = _kernel(spec, target, device, each), each.layout.m_tiles
            if order not in packed:
                packed[order] = pack(kernel, workload)
            methods[name] = _method(kernel, packed[order])
        row = measure_methods(Oracle.of(workload, layers - 1), {**methods, STREAM: floor.stream}, repeats, record)
        for name, reason in row.failures.items():
            raise VerificationError(f"{name} with {tokens} tokens: {reason}")
        yield Timing(tokens, {each: row.us[name] for name, each in ranges.items()}, row.us[STREAM])


def name_of(each: Range) -> str:
    return f"{each.layout.suffix or '_w1'} x {each.token_tiles}".removeprefix("_")


def _kernel(spec: PrologueSpec, target: Target, device: torch.device, each: Range) -> Kernel:
    return Kernel(spec, target, device, variants_of(spec, target, device, [Range(None, each.layout, each.token_tiles)]))


def _method(kernel: Kernel, packed: Sequence[torch.Tensor]) -> Callable[[Workload], list[Candidate]]:
    return lambda workload: [kernel_candidate(kernel, workload, packed)]


def choose(timings: Sequence[Timing]) -> tuple[Range, ...]:
    """The ranges of the MOST_LAYOUTS layouts with which all numbers of tokens together take the least, each counted as a ratio.

    Only layouts that read the same packed weights go together.
    """
    by_packing: dict[int | None, list[Layout]] = {}
    for layout in dict.fromkeys(each.layout for timing in timings for each in timing.us):
        by_packing.setdefault(layout.m_tiles, []).append(layout)
    best: tuple[float, list[Range]] = (math.inf, [])
    for some in itertools.chain.from_iterable(
        itertools.combinations(layouts, min(MOST_LAYOUTS, len(layouts))) for layouts in by_packing.values()
    ):
        chosen = []
        for timing in timings:
            of_these = {each: us for each, us in timing.us.items() if each.layout in some}
            if of_these:
                chosen.append(min(of_these, key=of_these.__getitem__))
        if len(chosen) < len(timings):
            continue
        cost = sum(math.log(timing.us[each]) for timing, each in zip(timings, chosen, strict=True))
        best = min(best, (cost, chosen), key=lambda pair: pair[0])
    ranges: list[Range] = []
    for each in best[1]:
        if ranges and (ranges[-1].layout, ranges[-1].token_tiles) == (each.layout, each.token_tiles):
            ranges.pop()
        ranges.append(each)
    last = ranges.pop()
    return (*ranges, Range(None, last.layout, last.token_tiles))


def entry_of(spec: PrologueSpec, target: Target, timings: Sequence[Timing], *, dependent: bool) -> Entry:
    """What a table says of a shape, with the times that were found."""
    ranges = choose(timings)
    found = {}
    for timing in timings:
        taken = next(each for each in ranges if each.tokens is None or timing.tokens <= each.tokens)
        us = {(each.layout, each.token_tiles): us for each, us in timing.us.items()}
        found[str(timing.tokens)] = [round(us[taken.layout, taken.token_tiles], 2), round(timing.stream, 2)]
    return Entry(spec.nope_dim, spec.lora_rank, spec.heads, dependent, ranges, found, spec.weight_bits(target))


def merge(entries: Iterable[Entry], newer: Iterable[Entry]) -> list[Entry]:
    """Both, sorted by shape; of two for the same shape the newer."""
    every = (*entries, *newer)
    by_shape = {(each.lora_rank, each.nope_dim, each.weight_bits, each.heads, each.dependent): each for each in every}
    return [by_shape[shape] for shape in sorted(by_shape)]
