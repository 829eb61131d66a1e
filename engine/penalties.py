"""Repetition, presence and frequency penalties: what a sequence already says changes what it says next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from quire.engine.host_values import to_device
from quire.engine.sampling_options import SampleRow
from quire.sampling_params import SamplingParams


class TokenCounts:
    """Which tokens one sequence holds, and how often its output holds each; follows the sequence as it grows."""

    def __init__(self, history: list[int]) -> None:
        self.history = history
        """The list that is followed; it may only grow."""
        self._places: dict[int, int] = {}
        self._token_ids = np.zeros(64, np.int64)
        self._output_counts = np.zeros(64, np.float32)
        self._num_seen = 0

    def catch_up(self, num_prompt_tokens: int) -> None:
        for position in range(self._num_seen, len(self.history)):
            self._count(self.history[position], position >= num_prompt_tokens)
        self._num_seen = len(self.history)

    def with_drafts(self, drafts: list[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The tokens, each once, and how often each is in the output, if `drafts` were its last tokens."""
        token_ids, counts = self._token_ids[: len(self._places)], self._output_counts[: len(self._places)]
        if not drafts:
            return token_ids, counts
        new = [token_id for token_id in dict.fromkeys(drafts) if token_id not in self._places]
        places = self._places | {token_id: len(self._places) + place for place, token_id in enumerate(new)}
        counts = np.concatenate([counts, np.zeros(len(new), np.float32)])
        np.add.at(counts, [places[token_id] for token_id in drafts], 1.0)
        return np.concatenate([token_ids, np.array(new, np.int64)]), counts

    def _count(self, token_id: int, is_output: bool) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
            self._output_counts = np.concatenate([self._output_counts, np.zeros_like(self._output_counts)])
        self._token_ids[place] = token_id
        self._output_counts[place] += is_output


class Penalties:
    """Keeps the counts of each running sequence by its row."""

    def __init__(self, max_num_seqs: int) -> None:
        self._counts = [TokenCounts([]) for _ in range(max_num_seqs)]

    def apply(self, logits: torch.Tensor, rows: list[SampleRow]) -> None:
        """In place on [R, V] float32, at the tokens that the rows' own histories hold.

        Repetition: Keskar et al., "CTRL", arXiv 1909.05858, section 4.1. The others: OpenAI's API reference.
        """
        rows = [row for row in rows if has_penalty(row.params)]
        if not rows:
            return
        indices, token_ids, factors, subtrahends = [], [], [], []
        for row in rows:
            params = row.params
            own_token_ids, output_counts = self._counts_of(row).with_drafts(row.drafts)
            indices.append(np.full(len(output_counts), row.index))
            token_ids.append(own_token_ids)
            factors.append(np.full(len(output_counts), params.repetition_penalty, np.float32))
            subtrahends.append(params.presence_penalty * (output_counts > 0) + params.frequency_penalty * output_counts)
        at = (_join(indices, logits), _join(token_ids, logits))
        values, factor = logits[at], _join(factors, logits)
        values = torch.where(values > 0, values / factor, values * factor)
        logits[at] = values - _join(subtrahends, logits).float()

    def _counts_of(self, row: SampleRow) -> TokenCounts:
        counts = self._counts[row.sequence.row]
        history = row.sequence.token_ids
        if counts.history is not history:  # another sequence, or a beam that goes on from another's tokens
            counts = self._counts[row.sequence.row] = TokenCounts(history)
        counts.catch_up(row.sequence.num_prompt_tokens)
        return counts


def has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _join(arrays: Sequence[npt.NDArray[np.generic]], logits: torch.Tensor) -> torch.Tensor:
    return to_device(np.concatenate(arrays), logits.device)
