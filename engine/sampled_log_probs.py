"""Log-probabilities of what is sampled, and the candidates of beams: computed on the device, read on the host."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from quire.engine.host_values import to_device
from quire.engine.log_probs import read_log_probs, token_log_probs
from quire.engine.sampling_options import SampleRow, StepRows
from quire.scheduler.output import Candidates, TokenLogProbs

Tensors = Iterator[torch.Tensor]


def row_indices(rows: list[SampleRow], device: torch.device) -> torch.Tensor:
    return to_device(np.array([row.index for row in rows], np.int64), device)


class RawLogits:
    """The logits of the rows that want log-probabilities, as they were before anything changed them."""

    def __init__(self, logits: torch.Tensor, rows: StepRows) -> None:
        self._scored = rows.scored
        wanting = rows.scored + [row for row in rows.beams if row.params.logprobs is not None]
        self._places = {row.index: place for place, row in enumerate(wanting)}
        self._logits = logits[row_indices(wanting, logits.device)] if wanting else logits[:0]

    def of_chosen(self, token_ids: torch.Tensor) -> list[torch.Tensor]:
        """Of the tokens [R] that rows without beams have sampled: see `read_chosen`. Those without one get some."""
        if not self._scored:
            return []
        chosen = token_ids[row_indices(self._scored, token_ids.device)].clamp(min=0)
        return token_log_probs(self._logits[: len(chosen)], chosen, max(num_top(row) for row in self._scored))

    def of_candidates(self, row: SampleRow, token_ids: torch.Tensor) -> list[torch.Tensor]:
        """Of several tokens in a beam's row; nothing if the request does not ask."""
        if row.index not in self._places:
            return []
        logits = self._logits[self._places[row.index]].expand(len(token_ids), -1)
        return token_log_probs(logits, token_ids.contiguous(), num_top(row))


def num_top(row: SampleRow) -> int:
    return row.params.logprobs or 0


def read_chosen(rows: list[SampleRow], token_ids: list[int], tensors: Tensors) -> dict[int, TokenLogProbs]:
    """By index of the row; rows that have sampled nothing are left out. token_ids: of all R rows."""
    if not rows:
        return {}
    found = read_log_probs([token_ids[row.index] for row in rows], [num_top(row) for row in rows], tensors)
    return {row.index: each for row, each in zip(rows, found, strict=True) if token_ids[row.index] >= 0}


def best_of_beams(logits: torch.Tensor, raw: RawLogits, rows: list[SampleRow]) -> list[torch.Tensor]:
    """The best continuations of each beam: see `read_candidates`. logits: [R, V], of beams log-probabilities."""
    if not rows:
        return []
    counts = [num_candidates(row, logits.shape[-1]) for row in rows]
    values, token_ids = logits[row_indices(rows, logits.device)].topk(max(counts), dim=-1)
    parts = [values, token_ids]
    for row, count, ids in zip(rows, counts, token_ids, strict=True):
        parts += raw.of_candidates(row, ids[:count])
    return parts


def read_candidates(
    rows: list[SampleRow], token_ids: list[int], vocab_size: int, tensors: Tensors
) -> dict[int, Candidates]:
    """By index of the row, of each beam that has any. token_ids: of all R rows, -1 where there is no way on."""
    if not rows:
        return {}
    all_values, all_ids = next(tensors).tolist(), next(tensors).tolist()
    result = {}
    for row, values, ids in zip(rows, all_values, all_ids, strict=True):
        count = num_candidates(row, vocab_size)
        raw = None
        if row.params.logprobs is not None:
            raw = read_log_probs(ids[:count], [num_top(row)] * count, tensors)
        if token_ids[row.index] >= 0:
            count -= values[:count].count(-float("inf"))
            result[row.index] = Candidates(ids[:count], values[:count], None if raw is None else raw[:count])
    return result


def num_candidates(row: SampleRow, vocab_size: int) -> int:
    """As in Hugging Face's beam search: twice the width, or more when several tokens can end a sequence."""
    return min(row.params.num_sequences * max(2, 1 + len(row.sequence.stop_token_ids)), vocab_size)
