"""A device that computes later than it is asked, for an engine on a CPU, and that punishes whoever reuses memory early.

Steps are computed in order, as on a GPU's stream, but when they are is drawn: at once, or any time up to the moment
when the host waits for them. They complete in an order that is drawn too, also a step before the one in front of it:
its results reach the host, and what it writes to pages arrives once more, as if it had been on its way until then. So
what a step writes may come later than what the step behind it has written. And a block that is handed out holds NaN
from that moment on, also for steps that were asked for before and have not been computed.

Steps may not fit into its memory: then they are refused when they are asked for, twice in a row or once, sometimes
after they were computed, all but the end.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch

from quire.engine.device_queue import Work
from quire.engine.engine import Engine
from quire.engine.inputs import InputBuilder
from quire.engine.last_tokens import LastTokens
from quire.engine.model_runner import ModelOutput, ModelRunner
from quire.engine.prompt_log_probs import PromptLogProbs
from quire.engine.step_executor import StepExecutor
from quire.models.forward_batch import ForwardBatch
from quire.scheduler.block_pool import BlockPool

Late = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]
"""Pages, blocks, offsets, and what a step wrote there."""


@dataclass
class FakePending:
    queue: FakeQueue
    work: Work
    results: list[torch.Tensor] | None = None
    late: Late = field(default_factory=list)
    is_complete: bool = False
    was_waited_for: bool = False

    @torch.inference_mode()
    def compute(self) -> None:
        self.queue.late = self.late
        self.results = [tensor.clone() for tensor in self.work()]

    @torch.inference_mode()
    def complete(self) -> None:
        for pages, blocks, offsets, values in self.late:
            pages[blocks, :, offsets] = values
        self.is_complete = True

    def wait(self) -> list[torch.Tensor]:
        assert not self.was_waited_for
        self.was_waited_for = True
        self.queue.complete_until(self)
        assert self.results is not None
        return self.results


class FakeQueue:
    def __init__(self, rng: random.Random, promptness: float, refuses: Callable[[], bool]) -> None:
        self.late: Late = []
        """Of the step that is being computed."""
        self.marks: Counter[str] = Counter()
        self._rng = rng
        self._promptness = promptness
        self._refuses = refuses
        self._waiting: deque[FakePending] = deque()
        self._computed: list[FakePending] = []

    def run(self, work: Work) -> FakePending:
        pending = FakePending(self, work)
        if self._refuses():
            self.marks["did not fit"] += 1
            if self._rng.random() < 0.5:
                self._waiting.append(pending)
                self.compute_until(pending)
                self._computed.remove(pending)
            raise torch.OutOfMemoryError
        self.marks["steps"] += 1
        self.marks["submitted before the last was computed"] += bool(self._waiting)
        self._waiting.append(pending)
        if self._rng.random() < self._promptness:
            self.marks["computed before it was waited for"] += 1
            self.compute_until(pending)
        return pending

    def release_memory(self) -> None:
        self.marks["memory released"] += 1

    def compute_until(self, pending: FakePending) -> None:
        while self._waiting and pending.results is None:
            self._computed.append(self._waiting.popleft())
            self._computed[-1].compute()

    def complete_until(self, pending: FakePending) -> None:
        self.compute_until(pending)
        while not pending.is_complete:
            index = self._rng.randrange(len(self._computed))
            self.marks["completed before the one in front"] += index > 0
            self._computed.pop(index).complete()


class LateWritingRunner(ModelRunner):
    """Notes what a step writes to the pages. No recordings: they would read their inputs where the next step's are."""

    def __init__(self, engine: Engine, queue: FakeQueue) -> None:
        super().__init__(engine._model, engine._kv.layers, None)
        self._queue = queue
        self._block_size = engine.info.block_size

    def run(self, inputs: ForwardBatch, num_sampled: int) -> ModelOutput:
        output = super().run(inputs, num_sampled)
        blocks, offsets = inputs.slot_mapping // self._block_size, inputs.slot_mapping % self._block_size
        for layer in self._kv_caches:
            for pages in layer:
                if pages is not None:
                    self._queue.late.append((pages, blocks, offsets, pages[blocks, :, offsets]))
        return output


@contextmanager
def on_fake_device(
    engine: Engine, seed: int, promptness: float = 0.3, shortage: float = 0.0, always_fit: int = 2
) -> Iterator[Counter[str]]:
    """Have an idle engine of `async_scheduling` compute on a fake device; what happens there is counted.

    Args:
        promptness: probability that a step is computed at once.
        shortage: probability that a step does not fit when it is asked for.
        always_fit: steps of so many tokens fit.
    """
    rng, steps = random.Random(seed), engine._scheduler.steps
    queue = FakeQueue(rng, promptness, lambda: rng.random() < shortage and steps.batches[-1].num_tokens > always_fit)
    info, device = engine.info, torch.device("cpu")
    inputs = InputBuilder(info.max_num_batched_tokens, info.max_num_seqs, info.max_model_len, info.block_size, device)
    inputs.memory = None  # each step's inputs have memory of their own
    engine._executor = StepExecutor(
        inputs,
        engine._kv,
        LateWritingRunner(engine, queue),
        engine._sampler,
        PromptLogProbs(engine._kv.log_probs, info.max_num_seqs, info.vocab_size, engine._model.logits),
        queue,
        LastTokens(info.max_num_seqs, device),
    )
    allocate = BlockPool.allocate

    def poison(pool: BlockPool, num_blocks: int) -> list[int]:
        block_ids = allocate(pool, num_blocks)
        with torch.inference_mode():
            for layer in engine._kv.layers:
                layer.keys[block_ids] = torch.nan
                layer.values[block_ids] = torch.nan
        return block_ids

    with mock.patch.object(BlockPool, "allocate", poison):
        yield queue.marks
