"""Weights in fp8: how they are rounded, and which fp8 a GPU multiplies."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quire.kernels.checks import KERNEL_DTYPES, require
from quire.kernels.targets import current_target

CODE_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
SMALLEST_SCALE = 2.0**-100
"""Of a row of zeros, or nearly: nothing is divided by zero, and no scale is subnormal."""


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A weight [N, K] as codes times a scale for each output feature.

    codes: [N, K], contiguous, one of CODE_DTYPES. scales: [N] float32, contiguous.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def code_dtype(device: torch.device) -> torch.dtype | None:
    """The fp8 that the matrix units of `device` multiply, or None if they have none.

    NVIDIA's from compute capability 8.9 on and AMD's from gfx950 on take the one of the Open Compute Project; gfx942
    takes one whose numbers are half as large. A CPU, which only tests compute on, counts as having the first.
    """
    if device.type != "cuda":
        return torch.float8_e4m3fn
    target = current_target(device)
    if target.vendor == "cuda":
        return torch.float8_e4m3fn if int(target.arch) >= 89 else None
    return {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}.get(str(target.arch))


def quantize(weight: torch.Tensor, dtype: torch.dtype) -> Fp8Weight:
    """Round a weight [N, K] to `dtype`, one of CODE_DTYPES.

    Raises:
        ValueError: a dtype other than float32, float16 and bfloat16, or a number that is not finite.
    """
    require(weight.dim() == 2 and weight.dtype in KERNEL_DTYPES, "weight must be [N, K], float32 to bfloat16", weight)
    largest = weight.abs().amax(dim=1).float()
    require(bool(largest.isfinite().all()), "the weight has numbers that are not finite", weight)
    scales = (largest / torch.finfo(dtype).max).clamp(min=SMALLEST_SCALE)
    codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for part, source, scale in zip(codes.split(1024), weight.split(1024), scales.split(1024), strict=True):
        part.copy_(source.float() / scale[:, None])
    return Fp8Weight(codes, scales)


def in_code_dtype(weight: Fp8Weight, dtype: torch.dtype) -> Fp8Weight:
    """The same weight in codes of `dtype`.

    Bit for bit a float8_e4m3fnuz is half of a float8_e4m3fn, but for what is minus zero there and NaN here.
    """
    if weight.codes.dtype == dtype:
        return weight
    require(weight.codes.dtype == torch.float8_e4m3fn, "only float8_e4m3fn is converted", weight.codes)
    bits = weight.codes.view(torch.uint8)
    return Fp8Weight(bits.where(bits != 0x80, 0).view(dtype), weight.scales * 2)
