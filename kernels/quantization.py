"""Pages of codes: how a token's key or value becomes codes and a scale, and how pages of any kind are read.

Each token has a scale of its own for each KV head. One scale for a whole page would have to grow with the tokens that
come later, and those before would be rounded again: what a page holds would depend on how a prompt was cut into steps.
With its own scale a token's codes depend on nothing but the token, and no write touches what another one wrote.
"""

from __future__ import annotations

import torch

LARGEST_CODE = {torch.int8: 127, torch.float8_e4m3fn: 448, torch.float8_e4m3fnuz: 240}
"""Of each dtype that codes may have: int8, or e4m3 as NVIDIA's GPUs have it and as AMD's gfx942 has it."""
SMALLEST_RANGE = 2.0**-100
"""The largest magnitude of a vector counts as at least this: inverses stay finite, and zeros are no special case."""


def quantize(x: torch.Tensor, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of `dtype`, like x, and bfloat16 scales without the last dimension.

    code * scale is x within half a scale if codes are int8; if they are e4m3, within a sixteenth of x, or within half
    of the smallest code where x is smaller than the smallest normal one.

    A scale is the largest magnitude divided by LARGEST_CODE, rounded up: codes fit, and where attention multiplies in
    bfloat16, a value of which all weight is on one token is not rounded again. Codes are rounded to nearest, ties to
    even, from float32. A vector with an infinity or NaN gets a scale that is not finite, so that reading it gives NaN.
    """
    x = x.float()
    largest = x.abs().amax(dim=-1).clamp_min(SMALLEST_RANGE)  # NaN stays NaN
    bits = (largest * (1 / LARGEST_CODE[dtype])).view(torch.int32).clamp_max(0x7FC00000)
    scales = ((bits + 0xFFFF) & -0x10000).view(torch.float32)
    codes = (x * scales.reciprocal().unsqueeze(-1)).nan_to_num(0.0)
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scales.bfloat16()


def read_slots(
    cache: torch.Tensor, scales: torch.Tensor | None, block_ids: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """[L, Hk, D] in `dtype`: what the slots at block_ids [L], offsets [L] of a cache hold, codes times their scales."""
    tokens = cache[block_ids, :, offsets].to(dtype)
    return tokens if scales is None else tokens * scales[block_ids, :, offsets].to(dtype).unsqueeze(-1)
