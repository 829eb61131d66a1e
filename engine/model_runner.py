"""Runs the model on a CPU on a step's inputs: recorded kernels, or else the model itself."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from quire.engine.inputs import StepMemory
from quire.kernels.argmax import argmax
from quire.kernels.cpu_recording import Arena, NotRecordableError
from quire.kernels.cpu_sized_recording import SizedRecording, Sizes, record_for_sizes
from quire.models.forward_batch import ForwardBatch
from quire.models.kv_cache import KVCache
from quire.models.model import Model

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What a step computed; good until the next one."""

    logits: torch.Tensor
    """[num_sampled_rows, vocab_size] float32."""
    best: torch.Tensor | None
    """`argmax(logits)`, where it came along."""
    scored: torch.Tensor
    """[R - num_sampled_rows, hidden_size]: final hidden states of the other rows that the inputs ask for."""


class ModelRunner:
    """A step is a replay: one recording for steps that only decode, one for all others.

    They read their inputs where those were when they were made.

    Args:
        memory: where `InputBuilder` puts the inputs of steps; None if nothing is to be recorded.
    """

    def __init__(self, model: Model, kv_caches: list[KVCache], memory: StepMemory | None) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._memory = memory
        self._arena = Arena()
        self._decodes: SizedRecording | None = None
        self._mixed: SizedRecording | None = None

    def place(self, inputs: ForwardBatch) -> ForwardBatch:
        """On a CPU inputs are where they are read."""
        return inputs

    def run(self, inputs: ForwardBatch, num_sampled: int) -> ModelOutput:
        """Compute a step."""
        memory = self._memory
        if memory is not None and inputs.token_ids.data_ptr() == memory.token_ids.ctypes.data and self.record():
            return self._replay(inputs, num_sampled)
        hidden = self._model.forward(inputs, self._kv_caches)
        return ModelOutput(self._model.logits(hidden[:num_sampled]), None, hidden[num_sampled:])

    def _replay(self, inputs: ForwardBatch, num_sampled: int) -> ModelOutput:
        num_decodes, num_threads = inputs.num_decodes, torch.get_num_threads()
        if inputs.logits_indices is None and self._decodes is not None:
            self._decodes.replay((num_decodes,), num_threads)
            logits, best, hidden = self._decodes.outputs
            return ModelOutput(logits[:num_decodes], best[:num_decodes], hidden[:0])
        assert self._mixed is not None
        assert inputs.logits_indices is not None
        num_prefills, num_logits = len(inputs.seq_lens) - num_decodes, len(inputs.logits_indices)
        self._mixed.replay((num_decodes, num_prefills, len(inputs.token_ids), num_logits, num_sampled), num_threads)
        logits, best, hidden = self._mixed.outputs
        return ModelOutput(logits[:num_sampled], best[:num_sampled], hidden[num_sampled:num_logits])

    def record(self) -> bool:
        """Record the steps of a CPU, if that was not tried yet; False if they cannot be."""
        if self._decodes is None and self._memory is not None:
            try:
                self._record(self._memory)
            except NotRecordableError as error:
                log.info("Steps of this model are not recorded: %s.", error)
                self._memory = None
        return self._decodes is not None

    def _record(self, memory: StepMemory) -> None:
        model, num_seqs, num_rows = self._model, memory.max_num_seqs, memory.max_num_tokens

        def decode(sizes: Sizes) -> tuple[torch.Tensor, ...]:
            hidden = model.forward(memory.batch(sizes[0], 0, sizes[0], None), self._kv_caches)
            logits = model.logits(hidden)
            return logits, argmax(logits), hidden

        def mixed(sizes: Sizes) -> tuple[torch.Tensor, ...]:
            hidden = model.forward(memory.batch(*sizes[:-1]), self._kv_caches)
            logits = model.logits(hidden[: sizes[-1]])
            return logits, argmax(logits), hidden

        self._decodes = record_for_sizes(self._arena, decode, (1,), (num_seqs,), num_seqs)
        smallest, largest = (1, 1, 4, 2, 1), (num_seqs, num_seqs, num_rows, num_rows, num_rows)
        self._mixed = record_for_sizes(self._arena, mixed, smallest, largest, num_rows)
