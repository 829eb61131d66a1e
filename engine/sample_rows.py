"""Which rows of logits a batch asks for, and whose next token each of them chooses."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from quire.scheduler.output import ScheduledBatch
from quire.scheduler.sequence import Sequence


@dataclass(slots=True)
class SampleRows:
    """R rows, in the order of `SampledTokens.token_ids`: those without drafts, then for each sequence with k drafts
    1 + k rows in a run."""

    sequences: list[Sequence]
    """Of each row; a sequence with drafts is there more than once."""
    drafts: dict[int, list[int]] = field(default_factory=dict)
    """By row: the drafts that stand before it, taken for its last tokens; rows without are left out."""

    def positions(self) -> npt.NDArray[np.uint64]:
        """Position in its sequence of the token that each row chooses, [R]."""
        positions = np.array([len(sequence.token_ids) for sequence in self.sequences], np.uint64)
        for row, drafts in self.drafts.items():
            positions[row] += np.uint64(len(drafts))
        return positions


def sample_rows(batch: ScheduledBatch) -> SampleRows:
    if not batch.drafts:
        return SampleRows([batch.sequences[index] for index in batch.sampling])
    rows = SampleRows([])
    for index in batch.sampling:
        drafts = batch.drafts.get(index, [])
        for num_before in range(1, len(drafts) + 1):
            rows.drafts[len(rows.sequences) + num_before] = drafts[:num_before]
        rows.sequences += [batch.sequences[index]] * (1 + len(drafts))
    return rows


def sample_indices(batch: ScheduledBatch, query_start: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Index among the batch's tokens of the last token that each row sees, [R]. query_start: [S + 1]."""
    last = query_start[1:][batch.sampling] - 1
    if not batch.drafts:
        return last
    num_without = len(last) - len(batch.drafts)
    runs = [
        np.arange(end - len(drafts), end + 1)
        for end, drafts in zip(last[num_without:], batch.drafts.values(), strict=True)
    ]
    return np.concatenate([last[:num_without], *runs])
