"""The clock: work captured in graphs, replayed in turn."""

import statistics
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from mlagen.timing.candidate import Launch, Result


class Recording(Protocol):
    """The work of some layers, to be replayed; `result` is what the last layer's launch returned."""

    result: Result

    def replay(self) -> None:
        """Do the work again."""

    def microseconds(self) -> float:
        """Time of one replay, for each layer."""


Recorder = Callable[[Launch, int], Recording]
"""Records a launch of each of so many layers."""


class Graph:
    """One CUDA graph (on ROCm a HIP graph) with a launch for each of `layers` layers."""

    def __init__(self, launch: Launch, layers: int) -> None:
        """Whatever a launch does only the first time is done before the capture."""
        self._layers, self._launch = layers, launch  # which holds the tensors that the graph reads
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for layer in range(min(2, layers)):
                self.result = launch(layer)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # The outer context brings the current stream back, which a capture that fails may not.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(self._graph):
            for layer in range(layers):
                self.result = launch(layer)
        self._start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def replay(self) -> None:
        self._graph.replay()

    def microseconds(self) -> float:
        # The first replay finds clocks and caches as the last method left them; and while it runs, the host enqueues the second.
        self._graph.replay()
        self._start.record()
        self._graph.replay()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) * 1e3 / self._layers


def measure(recordings: Mapping[str, Recording], repeats: int) -> dict[str, float]:
    """Median time of each in microseconds per layer; they take turns, so that whatever drifts meanwhile drifts for all alike."""
    times: dict[str, list[float]] = {name: [] for name in recordings}
    for _ in range(repeats):
        for name, recording in recordings.items():
            times[name].append(recording.microseconds())
    return {name: statistics.median(of_name) for name, of_name in times.items()}
