"""Sampling in plain torch: sort, softmax and cumulative sum in float64."""

from __future__ import annotations

import torch


def top_k_threshold(scaled: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """The k-th largest logit of each row, [R, 1]; minus infinity where top_k is 0."""
    ordered = scaled.sort(dim=-1, descending=True).values
    last = (top_k.long() - 1).clamp(0, scaled.shape[-1] - 1)
    return ordered.gather(1, last[:, None]).masked_fill((top_k == 0)[:, None], -torch.inf)


def top_p_threshold(scaled: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest logit of the fewest tokens whose mass reaches top_p, [R, 1]."""
    ordered = scaled.sort(dim=-1, descending=True).values
    mass = ordered.double().softmax(dim=-1).cumsum(dim=-1)
    last = (mass < top_p.double()[:, None]).sum(dim=-1, keepdim=True).clamp(max=scaled.shape[-1] - 1)
    return ordered.gather(1, last).masked_fill((top_p >= 1.0)[:, None], -torch.inf)


def min_p_threshold(scaled: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """The logit of a token with min_p times the best one's probability, [R, 1]."""
    return scaled.max(dim=-1, keepdim=True).values + min_p.log()[:, None]


def draw(scaled: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    cumulative = scaled.double().softmax(dim=-1).cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=scaled.shape[-1] - 1)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    greedy = temperature == 0
    scaled = logits / temperature.masked_fill(greedy, 1.0)[:, None]
    for threshold_of, option in ((top_k_threshold, top_k), (top_p_threshold, top_p), (min_p_threshold, min_p)):
        scaled = scaled.masked_fill(scaled < threshold_of(scaled, option), -torch.inf)
    return torch.where(greedy, logits.argmax(dim=-1), draw(scaled, uniform))
