"""The feed-forward half of a decoder layer."""

from __future__ import annotations

import torch

from quire.models.config import ModelConfig
from quire.models.layers.linear import fused_linear, linear
from quire.models.weights import Weights


class GatedMLP:
    """`down(activation(gate(x)) * up(x))` (Shazeer, "GLU Variants Improve Transformer", 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, weights: Weights, name: str, *, bias: bool = False) -> None:
        size = config.intermediate_size
        rows = {f"{name}.gate_proj": size, f"{name}.up_proj": size}
        self._gate_up = fused_linear(
            weights, rows, config.hidden_size, bias=bias, activation=config.activation, gated=True
        )
        self._down = linear(weights, f"{name}.down_proj", size, config.hidden_size, bias=bias)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._down(self._gate_up(hidden))
