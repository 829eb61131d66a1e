"""Rotary position embedding in plain torch."""

from __future__ import annotations

import torch


def rope(query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    rotary_dim = cos_sin.shape[1]
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # [T, 1, rotary_dim / 2]
    for x in (query, key):
        first, second = x[..., :rotary_dim].to(cos_sin.dtype).chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        x[..., :rotary_dim] = rotated.to(x.dtype)
