"""Linear layers in plain torch, float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quire.kernels.linear import Activation, PackedWeight, unpack


def activate(x: torch.Tensor, activation: Activation | None) -> torch.Tensor:
    match activation:
        case None:
            return x
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    activation: Activation | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    out = x.float() @ unpack(weight).float().T
    if bias is not None:
        panels = bias.unflatten(0, (weight.data.shape[0], -1))
        if weight.gated:
            panels = panels.unflatten(1, (2, -1)).transpose(0, 1)
            out = out + panels.flatten(1)[:, : weight.out_features].flatten()
        else:
            out = out + panels.flatten()[: weight.out_features]
    if not weight.gated:
        return activate(out, activation).to(out_dtype)
    gate, up = out.chunk(2, dim=1)
    return (activate(gate, activation) * up).to(out_dtype)


def embedding(indices: torch.Tensor, weight: PackedWeight, out_dtype: torch.dtype) -> torch.Tensor:
    return unpack(weight)[indices].to(out_dtype)
