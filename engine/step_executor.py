"""Between scheduler and device: steps are submitted in order, and retired in the same order once they are computed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch

from quire.engine.device_queue import DeviceQueue, Pending, Work
from quire.engine.inputs import InputBuilder
from quire.engine.kv_storage import KVStorage
from quire.engine.last_tokens import LastTokens
from quire.engine.model_runner import ModelOutput
from quire.engine.prompt_log_probs import PromptLogProbs, ScoredChunk, num_score_tensors, scored_chunks
from quire.engine.sampler import SamplePlan, Sampler
from quire.models.forward_batch import ForwardBatch
from quire.scheduler.output import SampledTokens, ScheduledBatch


class Runner(Protocol):
    """The model on its device: `engine.model_runner.ModelRunner` or `engine.cuda_runner.CudaRunner`."""

    def place(self, inputs: ForwardBatch) -> ForwardBatch:
        """A step's inputs from the host, on the device."""
        ...

    def run(self, inputs: ForwardBatch, num_sampled: int) -> ModelOutput: ...


@dataclass(slots=True)
class SubmittedStep:
    batch: ScheduledBatch
    plan: SamplePlan
    chunks: list[ScoredChunk]
    pending: Pending | None
    """None: it did not fit into the device's memory."""


class StepExecutor:
    """All that a step reads of the scheduler's sequences is read by `submit`: they have moved on when it retires.

    A step that the device has no memory for is tried once more when nothing else holds any. If it does not fit even
    then it stays the last one, until it retires with nothing: what would follow it builds on what it samples.

    Args:
        last_tokens: where sampled tokens stay on the device; None if no step is ever submitted ahead.
    """

    def __init__(
        self,
        inputs: InputBuilder,
        kv: KVStorage,
        runner: Runner,
        sampler: Sampler,
        prompt_log_probs: PromptLogProbs,
        queue: DeviceQueue,
        last_tokens: LastTokens | None,
    ) -> None:
        self._inputs = inputs
        self._kv = kv
        self._runner = runner
        self._sampler = sampler
        self._prompt_log_probs = prompt_log_probs
        self._queue = queue
        self._last_tokens = last_tokens
        self._max_num_steps = 1 if last_tokens is None else 2
        self._steps: deque[SubmittedStep] = deque()

    @property
    def has_room(self) -> bool:
        return len(self._steps) < self._max_num_steps and not (self._steps and self._steps[-1].pending is None)

    @property
    def is_idle(self) -> bool:
        return not self._steps

    def submit(self, batch: ScheduledBatch) -> None:
        """Hand a step to the device, which has computed it by the time it is retired."""
        inputs = self._runner.place(self._inputs.build(batch))
        plan = self._sampler.plan(batch)
        chunks = scored_chunks(batch)
        tokens = None if self._last_tokens is None else self._last_tokens.of_step(batch)

        def work() -> list[torch.Tensor]:
            if batch.block_copies:
                self._kv.copy_blocks(batch.block_copies)
            if tokens is not None:
                tokens.fill(inputs)
            output = self._runner.run(inputs, batch.num_sampled_rows)
            tensors = self._sampler.choose(output.logits, plan, output.best)
            if tokens is not None and tensors:
                tokens.store(tensors[0])
            return tensors + self._prompt_log_probs.compute(output.scored, chunks) if chunks else tensors

        self._steps.append(SubmittedStep(batch, plan, chunks, self._run(work, batch)))

    def _run(self, work: Work, batch: ScheduledBatch) -> Pending | None:
        """Whatever a part of the work has left behind, the whole of it computes the same again."""
        for _ in range(2):
            try:
                return self._queue.run(work)
            except torch.OutOfMemoryError:
                self._queue.release_memory()
        if batch.block_copies:
            self._kv.copy_blocks(batch.block_copies)
        return None

    def retire(self) -> tuple[ScheduledBatch, SampledTokens | None]:
        """Wait for the oldest step; what was sampled in it, or None if it did not fit into the device's memory."""
        step = self._steps.popleft()
        if step.pending is None:
            self._prompt_log_probs.remember(step.chunks)
            return step.batch, None
        tensors = step.pending.wait()
        if not step.chunks:
            return step.batch, self._sampler.read(step.plan, tensors)
        num_chosen = len(tensors) - num_score_tensors(step.chunks)
        sampled = self._sampler.read(step.plan, tensors[:num_chosen])
        self._prompt_log_probs.collect(tensors[num_chosen:], step.chunks, step.batch, sampled)
        return step.batch, sampled
