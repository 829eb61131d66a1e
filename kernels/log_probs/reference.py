"""Log probabilities in plain torch."""

from __future__ import annotations

import torch


def log_probs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = torch.where(logits.isnan(), -torch.inf, logits)
    normalised = logits.double().log_softmax(dim=-1).to(logits.dtype)
    top_ids = logits.argsort(dim=-1, descending=True, stable=True)[:, :num_top]
    return normalised.gather(1, token_ids[:, None]).squeeze(1), top_ids, normalised.gather(1, top_ids)
