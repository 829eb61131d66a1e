"""Runs the model on a step's inputs: recorded kernels for decodes on a CPU, else the model itself."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from quire.kernels.argmax import argmax
from quire.kernels.cpu_recording import Arena, NotRecordableError, Recording, record
from quire.models.forward_batch import ForwardBatch
from quire.models.layers.attention import KVCache
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


@dataclass(frozen=True, slots=True)
class _RecordedDecode:
    inputs: ForwardBatch
    recording: Recording
    output: ModelOutput


class ModelRunner:
    """Recordings are made when a number of decodes first occurs, and kept: one for each, at most max_num_seqs.

    They read their inputs where those were when they were made: `InputBuilder` puts those of steps that only decode
    always into the same memory, and hands out the same ForwardBatch for the same number of them.
    """

    def __init__(self, model: Model, kv_caches: list[KVCache], device: torch.device) -> None:
        self._model = model
        self._kv_caches = kv_caches
        self._arena = Arena()
        self._decodes: dict[int, _RecordedDecode] = {}
        self._records = device.type == "cpu"

    def run(self, inputs: ForwardBatch, num_sampled_rows: int) -> ModelOutput:
        """Compute a step."""
        if inputs.logits_indices is None and self._records:
            recorded = self._decodes.get(inputs.num_decodes) or self._record(inputs)
            if recorded is not None and recorded.inputs is inputs:
                recorded.recording.replay(torch.get_num_threads())
                return recorded.output
        hidden = self._model.forward(inputs, self._kv_caches)
        return ModelOutput(self._model.logits(hidden[:num_sampled_rows]), None, hidden[num_sampled_rows:])

    def _record(self, inputs: ForwardBatch) -> _RecordedDecode | None:
        try:
            with record(self._arena) as recording:
                logits = self._model.logits(self._model.forward(inputs, self._kv_caches))
                output = ModelOutput(logits, argmax(logits), logits[:0])
        except NotRecordableError as error:
            log.info("Steps of this model are not recorded: %s.", error)
            self._records = False
            return None
        recorded = self._decodes[inputs.num_decodes] = _RecordedDecode(inputs, recording, output)
        return recorded
