"""The measurement: for each number of tokens every method is recorded and checked, and those that are right are timed in turn."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from mlagen.errors import MlagenError
from mlagen.peers.peer import Peer
from mlagen.runtime import Kernel
from mlagen.spec import PrologueSpec
from mlagen.target import Target
from mlagen.timing.candidate import Candidate, kernel_candidate
from mlagen.timing.check import Oracle
from mlagen.timing.floor import Floor
from mlagen.timing.graphs import Graph, Recorder, Recording, measure
from mlagen.timing.workload import Workload, cold_layers, make_workload

OWN, EARLY, STREAM, EMPTY = "mlagen", "mlagen pdl", "stream", "empty"

CHOICE_REPEATS = 5
"""Replays that decide which of a method's candidates is the fastest."""

POISON = 0xFF
"""The byte that fills outputs before a check: a NaN in every type but the FNUZ one, and there far from any result."""

MAX_REASON = 200

Methods = Mapping[str, Callable[[Workload], Sequence[Candidate]]]
"""By name, what gives a method's candidates, of which the fastest counts."""


@dataclass(frozen=True)
class Row:
    """What one number of tokens gave: microseconds per layer of each method, or, for one that has no time, what went wrong."""

    tokens: int
    layers: int
    us: Mapping[str, float]
    failures: Mapping[str, str]

    @property
    def ratio(self) -> float | None:
        """mlagen's time over the streaming floor's, where both are there."""
        return self.us[OWN] / self.us[STREAM] if {OWN, STREAM} <= self.us.keys() else None


def methods_of(kernel: Kernel, floor: Floor, peers: Iterable[Peer], early: Kernel | None = None) -> Methods:
    """What there is to measure, in the order of a table's columns; `early` is the same kernel with dependent launch."""
    own: Methods = {EMPTY: floor.empty, STREAM: floor.stream, OWN: lambda workload: [kernel_candidate(kernel, workload)]}
    if early is not None:
        own = {**own, EARLY: lambda workload: [kernel_candidate(early, workload)]}
    return {**own, **{peer.name: peer.candidates for peer in peers}}


def layers_of(spec: PrologueSpec, target: Target, peers: Iterable[Peer], layers: int) -> int:
    """`layers`, or as many more as keep even the smallest of the peers' weights cold."""
    own = spec.weight_bits(target) / 8
    return cold_layers(spec, target, layers, min([own, *(peer.weight_bytes or own for peer in peers)]))


def bench(
    kernel: Kernel, methods: Methods, token_counts: Iterable[int], *, layers: int, repeats: int, record: Recorder = Graph
) -> Iterator[Row]:
    """One row for each number of tokens, as it is done.  Raises MlagenError where the GPU, or its memory, does not bear it."""
    for tokens in token_counts:
        try:
            yield _row(kernel, methods, tokens, layers, repeats, record)
        except torch.OutOfMemoryError:
            raise MlagenError(
                f"{tokens} tokens, {kernel.spec.heads} heads and {layers} layers do not fit into the GPU's memory: "
                "ask for fewer tokens or layers, or raise --tp"
            ) from None
        except RuntimeError as error:  # after a fault of one method's kernel, everything on the GPU fails
            raise MlagenError(f"{tokens} tokens: the GPU failed: {_reason(error)}; leave methods out with --peers") from None


def _row(kernel: Kernel, methods: Methods, tokens: int, layers: int, repeats: int, record: Recorder) -> Row:
    torch.compiler.reset()  # it gives up on a function that it has compiled for many shapes; earlier graphs are gone by now
    workload = make_workload(kernel.spec, kernel.target, tokens, layers, device=kernel.device)
    return measure_methods(Oracle.of(workload, layers - 1), methods, repeats, record)


def measure_methods(oracle: Oracle, methods: Methods, repeats: int, record: Recorder) -> Row:
    """Every method on one workload, whose last layer the oracle knows."""
    workload = oracle.workload
    recordings: dict[str, Recording] = {}
    failures: dict[str, str] = {}
    for name, candidates in methods.items():
        try:
            recordings[name] = _fastest(oracle, candidates(workload), record)
        except Exception as error:  # a peer may fail in any way, and the others are to be measured all the same
            failures[name] = _reason(error)
    return Row(workload.tokens, workload.layers, measure(recordings, repeats), failures)


class _WrongResult(MlagenError):
    """A method that does not compute what the oracle does."""


def _fastest(oracle: Oracle, candidates: Sequence[Candidate], record: Recorder) -> Recording:
    """The recording of the fastest candidate among those that work and are right.  Raises what the last of the others raised."""
    sound: dict[str, Recording] = {}
    failure: Exception | None = None
    for candidate in candidates:
        try:
            sound[candidate.name] = _checked(oracle, candidate, record)
        except Exception as error:  # a tile that a GPU has no room for, say
            failure = error
    if not sound:
        raise failure or MlagenError("there is no way to run it")
    if len(sound) == 1:
        return next(iter(sound.values()))
    times = measure(sound, CHOICE_REPEATS)
    return sound[min(times, key=times.__getitem__)]


def _checked(oracle: Oracle, candidate: Candidate, record: Recorder) -> Recording:
    """The candidate's recording, whose replay left the right result in poisoned outputs.  Raises _WrongResult."""
    recording = record(candidate.launch, oracle.workload.layers)
    result = recording.result if isinstance(recording.result, tuple) else (recording.result,)
    for output in (*result, oracle.workload.caches[oracle.layer]):
        if output is not None:
            output.view(torch.uint8).fill_(POISON)
    recording.replay()
    wrong = candidate.check(oracle, recording.result)
    if wrong:
        raise _WrongResult(f"wrong: {wrong}")
    return recording


def _reason(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, MlagenError) else f"{type(error).__name__}: {text}"
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."
