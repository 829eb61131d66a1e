"""Time of kernels on a GPU: graphs that replay many calls over rotated inputs, medians, turn by turn with the peers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]

CALLS_PER_GRAPH = 20
NUM_SAMPLES = 50


class Replay:
    """`calls` one after another, often enough that one replay holds at least CALLS_PER_GRAPH of them.

    On a GPU they are captured in a graph, which leaves launching out of the figure, as it is in a served step. What
    cannot be captured (a peer that synchronises) is launched as it is, and says so. On a CPU, in a rehearsal, the calls
    are run as they are.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self._calls = list(calls) * -(-CALLS_PER_GRAPH // len(calls)) if device.type == "cuda" else list(calls)
        self._device = device
        self._run: Call = self._run_all
        self.is_captured = False
        self._run_all()
        if device.type == "cuda":
            torch.cuda.synchronize()
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self._run_all()
                self._run, self.is_captured = graph.replay, True
            except RuntimeError:
                torch.cuda.synchronize()

    def _run_all(self) -> None:
        for call in self._calls:
            call()

    def seconds(self) -> float:
        """Of one call, in one replay."""
        if self._device.type != "cuda":
            begin = time.perf_counter()
            self._run()
            return (time.perf_counter() - begin) / len(self._calls)
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        self._run()
        end_event.record()
        end_event.synchronize()
        return begin_event.elapsed_time(end_event) / 1e3 / len(self._calls)


def medians(replays: Mapping[str, Replay], seconds: float) -> dict[str, float]:
    """Seconds of a call of each, in turn: NUM_SAMPLES times, or as often as fit into `seconds`, at least three."""
    samples: dict[str, list[float]] = {name: [] for name in replays}
    deadline = time.perf_counter() + seconds
    for replay in replays.values():
        replay.seconds()
    for count in range(NUM_SAMPLES):
        if count >= 3 and time.perf_counter() > deadline:
            break
        for name, replay in replays.items():
            samples[name].append(replay.seconds())
    return {name: statistics.median(found) for name, found in samples.items()}
