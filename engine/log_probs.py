"""Log-probabilities of the raw distribution: of chosen tokens, and of the best at each position."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from quire.kernels.log_probs import log_probs
from quire.scheduler.output import MIN_LOG_PROB, TokenLogProbs


def token_log_probs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> list[torch.Tensor]:
    """Of one token in each row, and of the row's `num_top` best: what `read_log_probs` takes.

    Args:
        logits: [M, V] float32, as the model made them; rows may be the same (of stride 0).
        token_ids: [M] int64, each in the vocabulary.
    """
    return list(log_probs(logits, token_ids, min(num_top, logits.shape[-1])))


def read_log_probs(token_ids: list[int], num_top: list[int], tensors: Iterator[torch.Tensor]) -> list[TokenLogProbs]:
    """Of M tokens, and of as many of each row's best as `num_top` says; takes three of the tensors."""
    chosen, top_token_ids, top = (next(tensors).tolist() for _ in range(3))
    return [
        TokenLogProbs(token_id, bounded(log_prob), ids[:count], [bounded(value) for value in values[:count]])
        for token_id, log_prob, ids, values, count in zip(token_ids, chosen, top_token_ids, top, num_top, strict=True)
    ]


def bounded(log_prob: float) -> float:
    """Fit for JSON: at least MIN_LOG_PROB, and never NaN."""
    return MIN_LOG_PROB if math.isnan(log_prob) else max(log_prob, MIN_LOG_PROB)
