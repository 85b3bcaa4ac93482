"""What the machine code executes: instructions by kind, accesses by width, and how often a wave waits for memory.

The shape is the one for which other implementations were counted: 16 heads, 5 tokens, fp8 query and cache, GPT-J RoPE.
"""

import functools
from collections import Counter
from dataclasses import dataclass

import pytest
from helpers import Workload, make_launch
from isa.emulator import Span, WaveTrace
from isa.machine import ARCHS, Pair, build, run_on_device

from mlagen.spec import PrologueSpec

pytestmark = [pytest.mark.isa, pytest.mark.compiler, pytest.mark.host]

HEADS, TOKENS = 16, 5

# AITER's kernel without absorb executes 11,650 for this shape.  gfx942 needs twice gfx950's matrix instructions, 2,048 more.
MOST_INSTRUCTIONS = {
    ("gfx942", "bf16"): 38_000,
    ("gfx950", "bf16"): 36_000,
    ("gfx942", "none"): 11_650,
    ("gfx950", "none"): 11_650,
}

# Loads that a wave waits for one after another, at most.
MOST_ROUND_TRIPS = {"rotate_k_pe": 3, "rotate_q_pe": 3, "copy_kv_c": 3, "copy_q_nope": 3, "absorb_q_nope": 1}

KINDS = ("VALU", "SALU", "MFMA", "VMEM", "SMEM", "LDS", "branch", "wait", "nop")


def kind(name: str) -> str:
    """The kind of an instruction, by its mnemonic."""
    if "mfma" in name:
        return "MFMA"
    if "branch" in name or name == "s_endpgm":
        return "branch"
    if name in ("s_waitcnt", "s_barrier"):
        return "wait"
    if name == "s_nop":
        return "nop"
    prefixes = {
        "global_": "VMEM",
        "flat_": "VMEM",
        "buffer_": "VMEM",
        "scratch_": "VMEM",
        "s_load": "SMEM",
        "ds_": "LDS",
        "v_": "VALU",
    }
    return next((prefixes[prefix] for prefix in prefixes if name.startswith(prefix)), "SALU")


@dataclass(frozen=True)
class Execution:
    pair: Pair
    segments: dict[str, list[WaveTrace]]
    spans: dict[str, list[Span]]

    @property
    def total(self) -> int:
        return sum(trace.counts.total() for traces in self.segments.values() for trace in traces)


@functools.cache
def execute(arch: str, weight: str) -> Execution:
    pair = build(PrologueSpec(HEADS, 128, 512, 64, "gptj", weight=weight), arch)
    launch = make_launch(pair.device, Workload(TOKENS, layout="dense", cache="dense", out="dense", slots="first"))
    traces = run_on_device(pair, launch)
    segments, first = {}, 0
    for segment, workgroups in zip(pair.generated.lowered.segments, pair.plan(TOKENS).workgroups, strict=True):
        segments[segment.name] = [trace for trace in traces if first <= trace.workgroup < first + workgroups]
        first += workgroups
    addresses = {name: launch.arguments[name].untyped_storage() for name in ("out", "kv_cache")}
    spans = {name: [span for span in pair.module.memory if span.address == memory.data_ptr()] for name, memory in addresses.items()}
    if launch.arguments["packed"] is not None:
        spans["packed"] = [span for span in pair.module.memory if span.address == launch.arguments["packed"].data_ptr()]
    return Execution(pair, segments, spans)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("weight", ["bf16", "none"])
def test_instructions(arch: str, weight: str) -> None:
    execution = execute(arch, weight)
    print(f"\n{arch}, weight={weight}, {HEADS} heads, {TOKENS} tokens: {execution.total} wave instructions")
    print(f"{'':16}{'waves':>8}{'trips':>8}{'all':>8}" + "".join(f"{name:>8}" for name in KINDS))
    for name, traces in execution.segments.items():
        kinds: Counter[str] = Counter()
        for trace in traces:
            for mnemonic, count in trace.counts.items():
                kinds[kind(mnemonic)] += count
        numbers = [len(traces), max(trace.round_trips for trace in traces), kinds.total(), *(kinds[each] for each in KINDS)]
        print(f"{name:16}" + "".join(f"{number:8}" for number in numbers))
    assert execution.total <= MOST_INSTRUCTIONS[arch, weight]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("weight", ["bf16", "none"])
def test_round_trips(arch: str, weight: str) -> None:
    for name, traces in execute(arch, weight).segments.items():
        assert max(trace.round_trips for trace in traces) <= MOST_ROUND_TRIPS[name], name


@pytest.mark.parametrize("arch", ARCHS)
def test_matrix_instructions_are_the_fewest_possible(arch: str) -> None:
    execution = execute(arch, "bf16")
    schedule = execution.pair.generated.schedule
    tiles = schedule.absorb
    assert tiles is not None
    traces = execution.segments["absorb_q_nope"]
    owners = [schedule.absorb_owner(workgroup, HEADS) for workgroup in range(len(traces) // schedule.waves_per_workgroup)]
    working = schedule.waves_per_workgroup * sum(head < HEADS for head, _, _ in owners)
    token_tiles = -(-TOKENS // tiles.token_tile)
    least = working * tiles.chunks * tiles.m_tiles * tiles.atoms_per_chunk * token_tiles
    executed = sum(count for trace in traces for name, count in trace.counts.items() if kind(name) == "MFMA")
    assert executed == least
    assert tiles.m_tiles * tiles.atom.m * tiles.chunks * tiles.chunk * working == HEADS * 512 * 128  # nothing is padded


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("weight", ["bf16", "none"])
def test_accesses(arch: str, weight: str) -> None:
    execution = execute(arch, weight)
    executed = {name for traces in execution.segments.values() for trace in traces for name in trace.counts}
    assert not [name for name in executed if name.startswith(("flat_", "scratch_", "buffer_", "ds_"))]
    for spans in execution.spans.values():
        assert [span.widths for span in spans] == [{16}]
