"""Log-probabilities of the raw distribution: of chosen tokens, and of the best at each position."""

from __future__ import annotations

import math

import torch

from quire.kernels.log_probs import log_probs
from quire.scheduler.output import MIN_LOG_PROB, TokenLogProbs


def token_log_probs(logits: torch.Tensor, token_ids: list[int], num_top: list[int]) -> list[TokenLogProbs]:
    """Of one token in each row, and of as many of the row's best as `num_top` says.

    Args:
        logits: [M, V] float32, as the model made them; rows may be the same (of stride 0).
        token_ids: M, each in the vocabulary.
        num_top: M.
    """
    if not token_ids:
        return []
    most = min(max(num_top), logits.shape[-1])
    chosen, top_token_ids, top = log_probs(logits, torch.tensor(token_ids, device=logits.device), most)
    return [
        TokenLogProbs(token_id, bounded(log_prob), ids[:count], [bounded(value) for value in values[:count]])
        for token_id, log_prob, ids, values, count in zip(
            token_ids, chosen.tolist(), top_token_ids.tolist(), top.tolist(), num_top, strict=True
        )
    ]


def bounded(log_prob: float) -> float:
    """Fit for JSON: at least MIN_LOG_PROB, and never NaN."""
    return MIN_LOG_PROB if math.isnan(log_prob) else max(log_prob, MIN_LOG_PROB)
