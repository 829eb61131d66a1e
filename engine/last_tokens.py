"""The tokens that only the device knows: what each running sequence sampled last, for a step scheduled ahead."""

from __future__ import annotations

import numpy as np
import torch

from quire.engine.host_values import to_device
from quire.models.forward_batch import ForwardBatch
from quire.scheduler.output import UNKNOWN_TOKEN, ScheduledBatch


class StepTokens:
    """Rows of `LastTokens` where one step takes its unknown tokens from, and where it leaves those that it samples."""

    __slots__ = ("num_sampled", "read_rows", "written_rows")

    def __init__(self, batch: ScheduledBatch, device: torch.device) -> None:
        sequences = batch.sequences
        decodes = sequences[: batch.num_decodes]
        self.read_rows: torch.Tensor | None = None
        """[num_decodes] int64; None if all tokens are known."""
        if any(sequence.token_ids[-1] == UNKNOWN_TOKEN for sequence in decodes):
            self.read_rows = to_device(np.array([sequence.row for sequence in decodes], np.int64), device)
        self.num_sampled = len(batch.sampling) - len(batch.drafts)
        """Who has drafts is not scheduled ahead."""
        written = [sequences[index].row for index in batch.sampling[: self.num_sampled]]
        self.written_rows = to_device(np.array(written, np.int64), device)


class LastTokens:
    """[max_num_seqs] int64 on the device, by row."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self._tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    def fill(self, inputs: ForwardBatch, step: StepTokens) -> None:
        """Put the tokens where `inputs` has an `UNKNOWN_TOKEN`, in place. A row that failed has none: any will do."""
        if step.read_rows is not None:
            token_ids = inputs.token_ids[: len(step.read_rows)]
            torch.where(token_ids < 0, self._tokens[step.read_rows].clamp_(min=0), token_ids, out=token_ids)

    def store(self, token_ids: torch.Tensor, step: StepTokens) -> None:
        """token_ids: [R] int64, in the order of the batch's rows of logits."""
        self._tokens[step.written_rows] = token_ids[: step.num_sampled]
