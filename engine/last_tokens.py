"""The tokens that only the device knows: what each running sequence sampled last, for a step scheduled ahead."""

from __future__ import annotations

import numpy as np
import torch

from quire.engine.host_values import to_device
from quire.models.forward_batch import ForwardBatch
from quire.scheduler.output import UNKNOWN_TOKEN, ScheduledBatch


class LastTokens:
    """[max_num_seqs] int64 on the device, by row."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.by_row = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    def of_step(self, batch: ScheduledBatch) -> StepTokens:
        return StepTokens(self.by_row, batch)


class StepTokens:
    """Where one step takes its unknown tokens from, and where it leaves those that it samples."""

    __slots__ = ("_by_row", "_num_written", "_read_rows", "_written_rows")

    def __init__(self, by_row: torch.Tensor, batch: ScheduledBatch) -> None:
        self._by_row = by_row
        sequences, device = batch.sequences, by_row.device
        decodes = sequences[: batch.num_decodes]
        self._read_rows: torch.Tensor | None = None
        """[num_decodes] int64; None if all tokens are known."""
        if any(sequence.token_ids[-1] == UNKNOWN_TOKEN for sequence in decodes):
            self._read_rows = to_device(np.array([sequence.row for sequence in decodes], np.int64), device)
        self._num_written = len(batch.sampling) - len(batch.drafts)  # who has drafts is not scheduled ahead
        written = [sequences[index].row for index in batch.sampling[: self._num_written]]
        self._written_rows = to_device(np.array(written, np.int64), device)

    def fill(self, inputs: ForwardBatch) -> None:
        """Put the tokens where `inputs` has an `UNKNOWN_TOKEN`, in place. A row that failed has none: any will do."""
        if self._read_rows is not None:
            token_ids = inputs.token_ids[: len(self._read_rows)]
            torch.where(token_ids < 0, self._by_row[self._read_rows].clamp_(min=0), token_ids, out=token_ids)

    def store(self, token_ids: torch.Tensor) -> None:
        """token_ids: [R] int64, in the order of the batch's rows of logits."""
        self._by_row[self._written_rows] = token_ids[: self._num_written]
