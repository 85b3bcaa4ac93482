"""A clock for tests: launches run where they are recorded, and each replay takes the time that the test says."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from mlagen.bench.run import Row, measure_methods
from mlagen.peers.registry import PEERS
from mlagen.spec import PrologueSpec
from mlagen.target import TARGETS
from mlagen.timing.candidate import Launch
from mlagen.timing.check import Oracle
from mlagen.timing.workload import make_workload


@dataclass
class Replay:
    """The launches of some layers; `times` are what its timed replays take, in microseconds per layer, the last one for ever."""

    launch: Launch
    layers: int
    times: list[float]
    log: list[Launch]
    result: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.replay()

    def replay(self) -> None:
        for layer in range(self.layers):
            self.result = self.launch(layer)

    def microseconds(self) -> float:
        self.log.append(self.launch)
        return self.times.pop(0) if len(self.times) > 1 else self.times[0]


class Clock:
    """A recorder whose recordings take, one after the other as they are made, the given times; then 1."""

    def __init__(self, *times: float) -> None:
        self._times: Iterator[float] = iter(times)
        self.log: list[Launch] = []
        self.layers: set[int] = set()

    def __call__(self, launch: Launch, layers: int) -> Replay:
        self.layers.add(layers)
        return Replay(launch, layers, [next(self._times, 1.0)], self.log)


def constant(result: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """A launch that does nothing."""
    return lambda layer: result


def measured(peer: str, spec: PrologueSpec, arch: str) -> Row:
    """What a peer comes to where torch is the CPU's."""
    work = make_workload(spec, TARGETS[arch], 9, 2, device="cpu")
    row = measure_methods(Oracle.of(work, 1), {peer: PEERS[peer].candidates}, 1, Clock())
    assert row.us.keys() | row.failures.keys() == {peer}
    return row
