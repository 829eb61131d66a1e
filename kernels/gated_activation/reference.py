"""Activation and gate in plain torch."""

from __future__ import annotations

import torch

from quire.kernels.linear import Activation
from quire.kernels.linear.reference import activate


def gated_activation(gate_up: torch.Tensor, activation: Activation | None) -> torch.Tensor:
    wide = gate_up if gate_up.dtype == torch.float64 else gate_up.float()
    gate, up = wide.chunk(2, dim=-1)
    return (activate(gate, activation) * up).to(gate_up.dtype)
