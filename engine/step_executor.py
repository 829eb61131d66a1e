"""Between scheduler and device: steps are submitted in order, and retired in the same order once they are computed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from quire.engine.device_queue import DeviceQueue, Pending
from quire.engine.inputs import InputBuilder
from quire.engine.kv_storage import KVStorage
from quire.engine.last_tokens import LastTokens, StepTokens
from quire.engine.model_runner import ModelRunner
from quire.engine.prompt_log_probs import PromptLogProbs, ScoredChunk, num_score_tensors, scored_chunks
from quire.engine.sampler import SamplePlan, Sampler
from quire.scheduler.output import SampledTokens, ScheduledBatch


@dataclass(frozen=True, slots=True)
class SubmittedStep:
    batch: ScheduledBatch
    plan: SamplePlan
    chunks: list[ScoredChunk]
    pending: Pending


class StepExecutor:
    """All that a step reads of the scheduler's sequences is read by `submit`: they have moved on when it retires.

    Args:
        last_tokens: where sampled tokens stay on the device; None if no step is ever submitted ahead.
    """

    def __init__(
        self,
        inputs: InputBuilder,
        kv: KVStorage,
        runner: ModelRunner,
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
        return len(self._steps) < self._max_num_steps

    @property
    def is_idle(self) -> bool:
        return not self._steps

    def submit(self, batch: ScheduledBatch) -> None:
        """Hand a step to the device, which has computed it by the time it is retired."""
        inputs = self._inputs.build(batch)
        plan = self._sampler.plan(batch)
        chunks = scored_chunks(batch)
        last_tokens = self._last_tokens
        tokens = None if last_tokens is None else StepTokens(batch, inputs.token_ids.device)

        def work() -> list[torch.Tensor]:
            self._kv.copy_blocks(batch.block_copies)
            if last_tokens is not None and tokens is not None:
                last_tokens.fill(inputs, tokens)
            output = self._runner.run(inputs, batch.num_sampled_rows)
            chosen = self._sampler.choose(output.logits, plan, output.best)
            scores = self._prompt_log_probs.compute(output.scored, chunks)
            if last_tokens is not None and tokens is not None and tokens.num_sampled:
                last_tokens.store(chosen[0], tokens)
            return scores + chosen

        self._steps.append(SubmittedStep(batch, plan, chunks, self._queue.run(work)))

    def retire(self) -> tuple[ScheduledBatch, SampledTokens]:
        """Wait for the oldest step; what was sampled in it."""
        step = self._steps.popleft()
        tensors = step.pending.wait()
        num_scores = num_score_tensors(step.chunks)
        sampled = self._sampler.read(step.plan, tensors[num_scores:])
        self._prompt_log_probs.collect(tensors[:num_scores], step.chunks, step.batch, sampled)
        return step.batch, sampled
