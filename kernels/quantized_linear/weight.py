"""Weights of 8 or 4 bits: how they are rounded, and how they lie in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from quire.kernels.checks import KERNEL_DTYPES, require
from quire.kernels.cpu_matrix import PANEL
from quire.kernels.cpu_memory import WEIGHT_MEMORY
from quire.kernels.cpu_quantized import ZERO_POINTS
from quire.kernels.linear import in_panels

Bits = Literal[8, 4]

GROUP_SIZES: dict[int, int] = {8: 128, 4: 128}
"""Input features that share a scale: of the inputs, and of weights of 4 bits."""
_ELEMENTS_AT_ONCE = 2**22  # of a weight, so that rounding it takes little memory beside it


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight [N, K] in panels of PANEL output features; made by `quantize`.

    A weight is its scale times an integer from -127 to 127 (8 bits) or from -8 to 7 (4 bits).

    `data`, uint8 [P, L, PANEL, 4], holds the integers plus 128 or 8: L lines of four input features or, with the first
    four in the low halves of the bytes, of eight. `scales` are float32 [P * PANEL] for 8 bits, one for each output
    feature, and bfloat16 [P, G, PANEL] for 4 bits, one for each group of input features too. Output features beyond N
    have scales of 0. If `gated`, each panel holds half as many features of the gate and, behind them, the same features
    of what it lets through.
    """

    data: torch.Tensor
    scales: torch.Tensor
    bits: Bits
    group_size: int
    out_features: int
    """Of the result: half of N if `gated`."""
    in_features: int
    gated: bool

    @property
    def num_groups(self) -> int:
        return -(-self.in_features // self.group_size)

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes


def quantize(weight: torch.Tensor, bits: Bits, *, gated: bool = False) -> QuantizedWeight:
    """Round a weight [N, K] on the CPU; `gated`: its first half are the gate's features, N is even.

    8 bits: to the nearest of 255 steps that reach the row's largest magnitude. 4 bits: of several scales that clip
    more or less, the one with the least squared error in its group.

    Raises:
        ValueError: a dtype other than float32, float16 and bfloat16, or a weight that is not finite.
    """
    require(weight.dim() == 2 and weight.device.type == "cpu", "weight must be [N, K] on the CPU", weight)
    require(weight.dtype in KERNEL_DTYPES, "weight must be float32, float16 or bfloat16", weight)
    require(not gated or len(weight) % 2 == 0, "a gated weight has an even number of rows", weight)
    num_features, depth = weight.shape
    group_size, per_line = GROUP_SIZES[bits], 32 // bits
    integers = torch.empty((num_features, depth), dtype=torch.uint8)
    num_scales = 1 if bits == 8 else -(-depth // group_size)
    scales = torch.empty((num_features, num_scales))
    rows_at_once = max(1, _ELEMENTS_AT_ONCE // max(1, depth))
    for first in range(0, num_features, rows_at_once):
        rows = slice(first, first + rows_at_once)
        wide = weight[rows].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        require(bool(wide.isfinite().all()), "weight must be finite")
        integers[rows], scales[rows] = _round_rows(wide) if bits == 8 else _round_groups(wide, group_size)
    integers = F.pad(integers, (0, -depth % per_line), value=ZERO_POINTS[bits])
    lines = in_panels(integers, gated).unflatten(2, (-1, per_line // 4, 4))  # [P, PANEL, L, 1 or 2, 4]
    lines = lines[..., 0, :] if bits == 8 else lines[..., 0, :] | lines[..., 1, :] << 4
    lines = lines.transpose(1, 2)
    data = WEIGHT_MEMORY.empty(tuple(lines.shape), torch.uint8).copy_(lines)
    panels = in_panels(scales, gated)  # [P, PANEL, 1 or G]
    panels = panels.flatten() if bits == 8 else panels.transpose(1, 2).to(torch.bfloat16).contiguous()
    return QuantizedWeight(data, panels, bits, group_size, num_features // (1 + gated), depth, gated)


def dequantize(weight: QuantizedWeight) -> torch.Tensor:
    """The weight [N, K] that the integers and scales stand for, float32: exact for 8 bits and for 4."""
    data, bits, depth = weight.data.transpose(1, 2), weight.bits, weight.in_features  # [P, PANEL, L, 4]
    if bits == 4:
        data = torch.stack([data & 15, data >> 4], dim=3)
    integers = data.flatten(2)[:, :, :depth].float() - ZERO_POINTS[bits]
    if bits == 8:
        wide = integers * weight.scales.view(-1, PANEL, 1)
    else:
        wide = integers * weight.scales.float().transpose(1, 2).repeat_interleave(weight.group_size, 2)[:, :, :depth]
    if not weight.gated:
        return wide.flatten(0, 1)[: weight.out_features]
    halves: torch.Tensor = wide.unflatten(1, (2, PANEL // 2)).transpose(0, 1).flatten(1, 2)
    return halves[:, : weight.out_features].flatten(0, 1)


def _round_rows(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] float32 to uint8 [N, K] and scales [N, 1]."""
    scales = wide.abs().amax(dim=1, keepdim=True) / 127
    return (wide / scales.where(scales > 0, 1)).round_().add_(ZERO_POINTS[8]).to(torch.uint8), scales


def _round_groups(wide: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K] float32, which is overwritten, to uint8 [N, K] and scales [N, G]."""
    from quire.kernels.cpu_rounding import round_groups

    scales = round_groups(wide, group_size)
    return wide.to(torch.uint8), scales
