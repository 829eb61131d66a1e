"""Quantized linear layers in plain torch, float32, on weights that are made whole again."""

from __future__ import annotations

import torch

from quire.kernels.linear import Activation, pack
from quire.kernels.linear import reference as plain
from quire.kernels.quantized_linear.weight import QuantizedWeight, dequantize


def quantized_linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    activation: Activation | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    packed = pack(dequantize(weight), gated=weight.gated)
    return plain.linear(x.float(), packed, bias, activation, out_dtype)


def embedding(indices: torch.Tensor, weight: QuantizedWeight, out_dtype: torch.dtype) -> torch.Tensor:
    return dequantize(weight)[indices].to(out_dtype)
