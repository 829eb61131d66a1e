"""The feed-forward half of a decoder layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from quire.models.config import Activation, ModelConfig
from quire.models.layers.linear import fused_linear, linear
from quire.models.weights import Weights


def activation_function(activation: Activation) -> Callable[[torch.Tensor], torch.Tensor]:
    match activation:
        case "silu":
            return F.silu
        case "gelu":
            return F.gelu
        case "gelu_tanh":
            return lambda x: F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu


class GatedMLP:
    """`down(activation(gate(x)) * up(x))` (Shazeer, "GLU Variants Improve Transformer", 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, weights: Weights, name: str, *, bias: bool = False) -> None:
        size = config.intermediate_size
        rows = {f"{name}.gate_proj": size, f"{name}.up_proj": size}
        self._gate_up = fused_linear(weights, rows, config.hidden_size, bias=bias)
        self._down = linear(weights, f"{name}.down_proj", size, config.hidden_size, bias=bias)
        self._activation = activation_function(config.activation)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self._gate_up(hidden).chunk(2, dim=-1)
        return self._down(self._activation(gate) * up)
