"""int8 pages: how a token's key or value becomes codes and a scale, and how pages of either kind are read. Plain torch.

Each token has a scale of its own for each KV head. One scale for a whole page would have to grow with the tokens that
come later, and those before would be rounded again: what a page holds would depend on how a prompt was cut into steps.
With its own scale a token's codes depend on nothing but the token, and no write touches what another one wrote.
"""

from __future__ import annotations

import torch

LARGEST_CODE = 127
SMALLEST_RANGE = 2.0**-100
"""The largest magnitude of a vector counts as at least this: its inverse is finite, and zeros need no special case."""


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 codes, like x, and float32 scales without the last dimension: code * scale is x within half a scale.

    Rounded to nearest, ties to even, in float32. A vector with an infinity or NaN has a scale that is not finite, so
    that reading it gives NaN.
    """
    x = x.float()
    largest = x.abs().amax(dim=-1).clamp_min(SMALLEST_RANGE)  # NaN stays NaN
    inverse = torch.full_like(largest, LARGEST_CODE) / largest  # number / tensor would round twice
    codes = (x * inverse.unsqueeze(-1)).round()
    return codes.nan_to_num(0.0).to(torch.int8), largest * (1 / LARGEST_CODE)


def read_slots(
    cache: torch.Tensor, scales: torch.Tensor | None, block_ids: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """[L, Hk, D] in `dtype`: what the slots at block_ids [L], offsets [L] of a cache hold, codes times their scales."""
    tokens = cache[block_ids, :, offsets].to(dtype)
    return tokens if scales is None else tokens * scales[block_ids, :, offsets].to(dtype).unsqueeze(-1)
