"""Biases and masks: what single tokens gain or lose, whatever the others' logits are. In place on [R, V] float32."""

from __future__ import annotations

import torch

from quire.engine.sampling_options import SampleRow


def add_biases(logits: torch.Tensor, rows: list[SampleRow]) -> None:
    for row in rows:
        if row.params.logit_bias:
            token_ids = torch.tensor(list(row.params.logit_bias), device=logits.device)
            biases = torch.tensor(list(row.params.logit_bias.values()), dtype=torch.float32, device=logits.device)
            logits[row.index, token_ids] += biases


def keep_allowed(logits: torch.Tensor, rows: list[SampleRow]) -> None:
    for row in rows:
        if row.params.allowed_token_ids is not None:
            token_ids = torch.tensor(row.params.allowed_token_ids, device=logits.device)
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
        logits[torch.tensor(indices, device=logits.device), torch.tensor(token_ids, device=logits.device)] = -torch.inf


def ends_of_bad_words(row: SampleRow) -> list[int]:
    """The tokens that would complete a bad word after prompt and output."""
    banned = []
    for *beginning, last in row.params.bad_word_token_ids:
        if not beginning or row.last_tokens(len(beginning)) == beginning:
            banned.append(last)
    return banned
