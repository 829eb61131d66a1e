"""Biases and masks: what single tokens gain or lose, whatever the others' logits are. In place on [R, V] float32."""

from __future__ import annotations

import numpy as np
import torch

from quire.engine.host_values import to_device
from quire.engine.sampling_options import SampleRow


def add_biases(logits: torch.Tensor, rows: list[SampleRow]) -> None:
    indices: list[int] = []
    token_ids: list[int] = []
    biases: list[float] = []
    for row in rows:
        for token_id, bias in (row.params.logit_bias or {}).items():
            indices.append(row.index)
            token_ids.append(token_id)
            biases.append(bias)
    if indices:
        logits[_at(indices, token_ids, logits)] += to_device(np.array(biases, np.float32), logits.device)


def keep_allowed(logits: torch.Tensor, rows: list[SampleRow]) -> None:
    for row in rows:
        if row.params.allowed_token_ids is not None:
            token_ids = to_device(np.array(row.params.allowed_token_ids, np.int64), logits.device)
            kept = logits[row.index, token_ids]
            logits[row.index] = -torch.inf
            logits[row.index, token_ids] = kept


def ban_tokens(logits: torch.Tensor, rows: list[SampleRow], complete: set[int]) -> None:
    """The last tokens of bad words that have been begun, and before `min_tokens` all that would end the sequence.

    Args:
        complete: indices of rows whose grammar leaves nothing but an end: they end, whatever else was asked for.
    """
    indices: list[int] = []
    token_ids: list[int] = []
    for row in rows:
        banned = ends_of_bad_words(row)
        if row.index not in complete:
            if row.num_output_tokens < row.params.min_tokens:
                banned += row.sequence.stop_token_ids
            elif row.params.grammar is not None and row.params.ignore_eos:
                banned += row.sequence.request.eos_token_ids
        token_ids += banned
        indices += [row.index] * len(banned)
    if indices:
        logits[_at(indices, token_ids, logits)] = -torch.inf


def _at(indices: list[int], token_ids: list[int], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each pair is there once, so that what is added at it is added once."""
    rows, columns = np.array([indices, token_ids], np.int64)
    return to_device(rows, logits.device), to_device(columns, logits.device)


def ends_of_bad_words(row: SampleRow) -> list[int]:
    """The tokens that would complete a bad word after prompt and output."""
    banned = []
    for *beginning, last in row.params.bad_word_token_ids:
        if not beginning or row.last_tokens(len(beginning)) == beginning:
            banned.append(last)
    return banned
