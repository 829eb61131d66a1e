"""Rounding to fp8 and products of codes in plain torch."""

from __future__ import annotations

import torch

from quire.kernels.fp8_linear.weight import SMALLEST_SCALE


def quantize_tokens(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    scales = (wide.abs().amax(dim=1) / torch.finfo(dtype).max).clamp(min=SMALLEST_SCALE)
    return (wide / scales[:, None]).to(dtype), scales


def scaled_product(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight_codes: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    out = codes.to(wide) @ weight_codes.to(wide).T * scales.to(wide)[:, None] * weight_scales.to(wide)
    return (out if bias is None else out + bias).to(out_dtype)
