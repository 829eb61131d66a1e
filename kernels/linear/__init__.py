"""Linear layers on weights that were packed once, at load, for the processor's vectors.

For CPUs: on a GPU torch's `F.linear` is what the vendors' libraries do best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from quire.kernels.backend import Backend, choose_body
from quire.kernels.checks import KERNEL_DTYPES, require
from quire.kernels.cpu_matrix import PANEL
from quire.kernels.cpu_memory import WEIGHT_MEMORY

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [N, K] in panels of PANEL output features; made by `pack`.

    `data` is [P, K, PANEL] or, for bfloat16, [P, ceil(K / 2), PANEL, 2]; what lies beyond N and K is zero. If `gated`,
    each panel holds half as many features of the gate and, behind them, the same features of what it lets through.
    """

    data: torch.Tensor
    out_features: int
    """Of the result: half of N if `gated`."""
    in_features: int
    gated: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def features_per_panel(self) -> int:
        return PANEL // 2 if self.gated else PANEL


def pack(weight: torch.Tensor, *, gated: bool = False) -> PackedWeight:
    """Pack a weight [N, K] on the CPU; `gated`: its first half are the gate's features, N is even.

    Raises:
        ValueError: a dtype other than float32, float16 and bfloat16.
    """
    require(weight.dim() == 2 and weight.device.type == "cpu", "weight must be [N, K] on the CPU", weight)
    num_features, depth = weight.shape
    require(weight.dtype in KERNEL_DTYPES, "weight must be float32, float16 or bfloat16", weight)
    require(not gated or num_features % 2 == 0, "a gated weight has an even number of rows", weight)
    panels = in_panels(weight, gated)  # [P, PANEL, K]
    if weight.dtype == torch.bfloat16:  # two inputs travel as one integer, which is a few times as fast
        panels = F.pad(panels, (0, depth % 2)).contiguous().view(torch.int32)
    laid_out = panels.transpose(1, 2)
    data = WEIGHT_MEMORY.empty(tuple(laid_out.shape), laid_out.dtype).copy_(laid_out)
    if weight.dtype == torch.bfloat16:
        data = data.view(torch.bfloat16).unflatten(2, (-1, 2))
    return PackedWeight(data, num_features // 2 if gated else num_features, depth, gated)


def pack_bias(bias: torch.Tensor, *, gated: bool = False) -> torch.Tensor:
    """A bias [N] in the order of the packed weight's features, [P * PANEL] float32."""
    return in_panels(bias.float().unsqueeze(1), gated).flatten()


def unpack(weight: PackedWeight) -> torch.Tensor:
    """The weight [N, K] that was packed."""
    panels = weight.data
    if weight.dtype == torch.bfloat16:
        panels = panels.transpose(1, 2).flatten(2)[:, :, : weight.in_features]
    else:
        panels = panels.transpose(1, 2)
    if not weight.gated:
        return panels.flatten(0, 1)[: weight.out_features]
    halves: torch.Tensor = panels.unflatten(1, (2, PANEL // 2)).transpose(0, 1).flatten(1, 2)
    return halves[:, : weight.out_features].flatten(0, 1)


def in_panels(matrix: torch.Tensor, gated: bool) -> torch.Tensor:
    """[N, K] to [P, PANEL, K], filled up with zeros."""
    depth = matrix.shape[1]
    if not gated:
        return F.pad(matrix, (0, 0, 0, -len(matrix) % PANEL)).reshape(-1, PANEL, depth)
    halves = matrix.reshape(2, -1, depth)
    halves = F.pad(halves, (0, 0, 0, -halves.shape[1] % (PANEL // 2)))
    return halves.reshape(2, -1, PANEL // 2, depth).transpose(0, 1).flatten(1, 2)


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    activation: Activation | None = None,
    out_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """`f(x @ weight.T + bias)`, or `f(gate) * up` of the two halves if the weight is gated.

    Sums are made in float32, in an order that depends on nothing but K: a row's result is the same in every batch.
    Bias, activation and product are applied to them before they are rounded.

    Args:
        x: [T, K] in the weight's dtype, or float32: the weight is then widened on its way, and the result is, bit for
            bit, that of the weight in float32. The last dimension is contiguous.
        weight: from `pack`.
        bias: from `pack_bias` (with the weight's `gated`), or None.
        activation: f; None is the identity.
        out_dtype: x's dtype, or float32.
        backend: "auto" is the CPU kernel.

    Returns:
        [T, out_features], contiguous.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.

    Source: the panels are those of Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008.
    """
    body = choose_body(backend, x.device)
    require(body != "triton", "packed weights are for the CPU")
    require(
        x.dim() == 2
        and x.shape[1] == weight.in_features
        and x.stride(1) == 1
        and x.dtype in (weight.dtype, torch.float32),
        f"x must be [T, {weight.in_features}] {weight.dtype} or float32, its last dimension contiguous",
        x,
    )
    require(out_dtype in (None, x.dtype, torch.float32), f"out_dtype must be {x.dtype} or float32, not {out_dtype}")
    if bias is not None:
        require(
            bias.dtype == torch.float32 and bias.numel() == weight.data.shape[0] * PANEL and bias.is_contiguous(),
            "bias must come from pack_bias",
            bias,
        )
    if body == "cpu":
        from quire.kernels.linear.cpu import linear as run
    else:
        from quire.kernels.linear.reference import linear as run
    return run(x, weight, bias, activation, out_dtype or x.dtype)


def embedding(
    indices: torch.Tensor, weight: PackedWeight, out_dtype: torch.dtype, *, backend: Backend = "auto"
) -> torch.Tensor:
    """Row i of a weight that is not gated for each index i: [T] int64 to [T, K] in the weight's dtype or float32.

    So that one packed tensor serves both as embedding and as the head tied to it.

    Raises:
        ValueError: indices are not [T] int64 on the CPU, the weight is gated, or `out_dtype` is another. That indices
            are in range is the caller's duty.
    """
    body = choose_body(backend, indices.device)
    require(body != "triton", "packed weights are for the CPU")
    require(
        indices.dim() == 1 and indices.dtype == torch.int64 and indices.is_contiguous() and not weight.gated,
        "indices must be contiguous int64 [T], the weight not gated",
        indices,
    )
    require(out_dtype in (weight.dtype, torch.float32), f"out_dtype must be {weight.dtype} or float32, not {out_dtype}")
    if body == "cpu":
        from quire.kernels.linear.cpu import embedding as run
    else:
        from quire.kernels.linear.reference import embedding as run
    return run(indices, weight, out_dtype)
