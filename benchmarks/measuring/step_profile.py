"""Where the time of a step goes, measured from outside: functions at public boundaries are wrapped with timers.

Every timer is exclusive: what a wrapped function spends in another wrapped one counts there. On a CPU a recorded step
runs kernel by kernel while it is profiled, so each kernel pays a fork and a join of the threads that it does not pay
otherwise.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch

from quire.engine.engine import Engine
from quire.engine.inputs import InputBuilder
from quire.engine.kv_storage import KVStorage
from quire.engine.messages import StepResult, ToFront
from quire.engine.model_runner import ModelRunner
from quire.engine.output_processor import OutputProcessor
from quire.engine.prompt_log_probs import PromptLogProbs
from quire.engine.sampler import Sampler
from quire.engine.wire import FrameDecoder, pack
from quire.kernels.cpu_recording import Recording
from quire.kernels.cpu_workers import Worker
from quire.models.layers.embedding import Embedding
from quire.models.layers.linear import PackedLinear, TorchLinear
from quire.scheduler.output import ScheduledBatch, StepOutputs
from quire.scheduler.scheduler import Scheduler

REST = "engine, rest"
BOUNDARIES = (
    (Scheduler, "schedule", "schedule"),
    (InputBuilder, "build", "inputs"),
    (KVStorage, "copy_blocks", "page copies"),
    (ModelRunner, "run", "model, outside kernels"),
    (Embedding, "__call__", "embedding"),
    (TorchLinear, "__call__", "linear"),
    (Sampler, "plan", "sample"),
    (Sampler, "choose", "sample"),
    (Sampler, "read", "sample"),
    (PromptLogProbs, "compute", "prompt log-probs"),
    (PromptLogProbs, "collect", "prompt log-probs"),
    (Scheduler, "update", "update"),
    (OutputProcessor, "process", "front: detokenize"),
)


class Timers:
    """Exclusive seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]  # for each timer that runs: the seconds that belong to timers within it

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        self._inner.append(0.0)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._end(name, time.perf_counter() - begin)

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.time(name):
                return function(*args, **kwargs)

        return timed

    def add(self, name: str, seconds: float) -> None:
        """Seconds that were measured elsewhere, within the timer that runs now."""
        self.seconds[name] += seconds
        self._inner[-1] += seconds

    def take(self) -> dict[str, float]:
        """What has been measured since the last call."""
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken

    def _end(self, name: str, seconds: float) -> None:
        self.seconds[name] += seconds - self._inner.pop()
        self._inner[-1] += seconds


@contextmanager
def replaced(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """`owner.name` is `make(what it was)` as long as the context is open."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


class StepProfile:
    """Seconds of each part, step by step; steps that only decode are kept apart from those that compute prompts.

    To be opened before the engine is made: what is recorded takes its kernels' names along.
    """

    def __init__(self) -> None:
        self.steps: dict[str, list[dict[str, float]]] = {"decode": [], "prompt": []}
        self._timers = Timers()
        self._linear: str | None = None
        self._batch: ScheduledBatch | None = None
        self._decoder: FrameDecoder[ToFront] = FrameDecoder(ToFront)

    @contextmanager
    def open(self) -> Iterator[None]:
        timers = self._timers
        with ExitStack() as stack:
            for owner, name, label in BOUNDARIES:
                stack.enter_context(replaced(owner, name, lambda f, label=label: timers.wrap(f, label)))  # type: ignore[misc]
            stack.enter_context(replaced(PackedLinear, "__call__", self._name_linear))
            stack.enter_context(replaced(Worker, "run", self._time_worker))
            stack.enter_context(replaced(Recording, "add", self._name_recorded))
            stack.enter_context(replaced(Recording, "replay", self._replay_apart))
            stack.enter_context(replaced(Scheduler, "schedule", self._keep_batch))
            stack.enter_context(replaced(Engine, "step", self._time_step))
            yield

    def _name_linear(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The linear layers run the same kernel; their sizes tell them apart."""

        def named(layer: PackedLinear, *args: Any, **kwargs: Any) -> Any:
            weight = layer._weight
            self._linear = f"linear {weight.in_features} to {weight.out_features}{' gated' if weight.gated else ''}"
            try:
                return call(layer, *args, **kwargs)
            finally:
                self._linear = None

        return named

    def _time_worker(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(worker: Worker, *args: Any) -> None:
            with self._timers.time(self._linear or worker.name):
                run(worker, *args)

        return timed

    def _name_recorded(self, add: Callable[..., Any]) -> Callable[..., Any]:
        return lambda recording, name, *rest: add(recording, self._linear or name, *rest)

    def _replay_apart(self, replay: Callable[..., Any]) -> Callable[..., Any]:
        def profiled(recording: Recording, num_threads: int) -> None:
            for name, seconds in recording.profile(num_threads):
                self._timers.add(name, seconds)

        return profiled

    def _keep_batch(self, schedule: Callable[..., Any]) -> Callable[..., Any]:
        def kept(scheduler: Scheduler) -> ScheduledBatch | None:
            self._batch = schedule(scheduler)
            return self._batch

        return kept

    def _time_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def timed(engine: Engine) -> StepOutputs:
            self._file()
            with self._timers.time(REST):
                outputs: StepOutputs = step(engine)
            with self._timers.time("encode"):
                frame = pack(StepResult(outputs=outputs, stats=engine.stats(), started=engine.started))
            with self._timers.time("front: decode"):
                self._decoder.feed(bytes(frame))
            return outputs

        return timed

    def _file(self) -> None:
        """Put away the step before this one, of which the front's part is known only now."""
        parts = self._timers.take()
        if self._batch is not None and REST in parts:
            is_decode = self._batch.num_decodes == len(self._batch.sequences)
            self.steps["decode" if is_decode else "prompt"].append(parts)
        self._batch = None

    def restart(self) -> None:
        """Forget all steps so far."""
        self._file()
        for steps in self.steps.values():
            steps.clear()

    def finish(self) -> dict[str, dict[str, float]]:
        """Mean milliseconds of each part, by kind of step, and under "steps" how many there were."""
        self._file()
        result = {}
        for kind, steps in self.steps.items():
            names = dict.fromkeys(name for step in steps for name in step)
            means = {name: 1e3 * sum(step.get(name, 0.0) for step in steps) / len(steps) for name in names}
            result[kind] = {"steps": float(len(steps)), **dict(sorted(means.items(), key=lambda part: -part[1]))}
        return result


def torch_operations(run: Callable[[], object], count: int = 8) -> list[tuple[str, float]]:
    """The operations of torch that took longest while `run` ran, in milliseconds of their own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return [(event.key, event.self_cpu_time_total / 1e3) for event in events[:count]]
