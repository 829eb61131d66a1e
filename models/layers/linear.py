"""Linear layers; the one place where packed weights can take the place of plain ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quire.models.weights import Weights


class Linear:
    """`x @ weight.T + bias` over the last dimension; weight [out_features, in_features]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)


def fused_linear(weights: Weights, rows: dict[str, int], in_features: int, *, bias: bool) -> Linear:
    """Several projections of one input as one: their outputs side by side, in the order of `rows` (name: features)."""
    weight = weights.stacked({f"{name}.weight": num for name, num in rows.items()}, in_features)
    return Linear(weight, weights.stacked({f"{name}.bias": num for name, num in rows.items()}) if bias else None)


def linear(weights: Weights, name: str, in_features: int, out_features: int, *, bias: bool) -> Linear:
    return fused_linear(weights, {name: out_features}, in_features, bias=bias)
