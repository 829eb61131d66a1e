"""Normalisation layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quire.kernels.rms_norm import rms_norm
from quire.models.weights import Weights


class RMSNorm:
    def __init__(self, weights: Weights, name: str, size: int, eps: float) -> None:
        self._weight = weights.tensor(f"{name}.weight", size)
        self._eps = eps

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise x; with a residual, add x to it IN PLACE and normalise the sum."""
        return rms_norm(x, self._weight, self._eps, residual)


class LayerNorm:
    def __init__(self, weights: Weights, name: str, size: int, eps: float) -> None:
        self._weight = weights.tensor(f"{name}.weight", size)
        self._bias = weights.tensor(f"{name}.bias", size)
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self._weight.shape, self._weight, self._bias, self._eps)
