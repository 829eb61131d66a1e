"""RMS norm as a Triton kernel: a few rows per program, each read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ELEMENTS_PER_PROGRAM = 1024


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    num_rows: tl.tensor,
    x_stride_token: tl.tensor,
    x_stride_head: tl.tensor,
    residual_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    dim = tl.arange(0, BLOCK_DIM)  # [BLOCK_DIM]
    mask = (row < num_rows)[:, None] & (dim < DIM)[None, :]
    x_row = (row // NUM_HEADS) * x_stride_token + (row % NUM_HEADS) * x_stride_head
    values = tl.load(x + x_row[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_at = residual + (row * residual_stride)[:, None] + dim[None, :]
        values += tl.load(residual_at, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(residual.dtype.element_ty)
        tl.store(residual_at, rounded, mask=mask)
        values = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / DIM + eps)
    normed = (values * scale[:, None]).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + dim, mask=dim < DIM, other=0.0).to(tl.float32)
    tl.store(out + (row * DIM)[:, None] + dim[None, :], (normed * factor[None, :]).to(out.dtype.element_ty), mask=mask)


def launch_parameters(dim: int) -> tuple[int, int, int]:
    """(rows per program, columns, warps)."""
    block_dim = triton.next_power_of_2(dim)
    block_rows = max(1, ELEMENTS_PER_PROGRAM // block_dim)
    return block_rows, block_dim, 16 if block_dim >= 8192 else 8 if block_dim >= 2048 else 4


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dim = x.shape[-1]
    num_heads = x.shape[1] if x.dim() == 3 else 1
    num_rows = x.shape[0] * num_heads
    if num_rows == 0:
        return out
    block_rows, block_dim, num_warps = launch_parameters(dim)
    rms_norm_kernel[(triton.cdiv(num_rows, block_rows),)](
        x,
        weight,
        x if residual is None else residual,
        out,
        eps,
        num_rows,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        0 if residual is None else residual.stride(0),
        NUM_HEADS=num_heads,
        DIM=dim,
        BLOCK_ROWS=block_rows,
        BLOCK_DIM=block_dim,
        HAS_RESIDUAL=residual is not None,
        num_warps=num_warps,
    )
    return out
