"""Rotary position embedding as a Triton kernel: a token and a group of heads per program, queries and keys together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PAIRS_PER_PROGRAM = 1024


@triton.jit
def _rotate(
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    first_head: tl.tensor,
    num_heads: tl.tensor,
    stride_head: tl.tensor,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    head = first_head + tl.arange(0, BLOCK_HEADS)  # [BLOCK_HEADS]
    pair = tl.arange(0, BLOCK_HALF)  # [BLOCK_HALF]
    mask = (head < num_heads)[:, None] & (pair < HALF)[None, :]
    first_at = x + (head.to(tl.int64) * stride_head)[:, None] + pair[None, :]
    second_at = first_at + HALF
    first = tl.load(first_at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(second_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(first_at, (first * cos - second * sin).to(x.dtype.element_ty), mask=mask)
    tl.store(second_at, (second * cos + first * sin).to(x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["positions"])
def rope_kernel(
    query: tl.tensor,
    key: tl.tensor,
    positions: tl.tensor,
    cos_sin: tl.tensor,
    query_stride_token: tl.tensor,
    query_stride_head: tl.tensor,
    key_stride_token: tl.tensor,
    key_stride_head: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    pair = tl.arange(0, BLOCK_HALF)  # [BLOCK_HALF]
    angles = cos_sin + tl.load(positions + token).to(tl.int64) * (2 * HALF) + pair
    cos = tl.load(angles, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(angles + HALF, mask=pair < HALF, other=0.0)[None, :]
    num_query_groups: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    if group < num_query_groups:
        row = query + token * query_stride_token
        _rotate(row, cos, sin, group * BLOCK_HEADS, NUM_HEADS, query_stride_head, HALF, BLOCK_HEADS, BLOCK_HALF)
    else:
        row = key + token * key_stride_token
        first_head = (group - num_query_groups) * BLOCK_HEADS
        _rotate(row, cos, sin, first_head, NUM_KV_HEADS, key_stride_head, HALF, BLOCK_HEADS, BLOCK_HALF)


def launch_parameters(num_heads: int, rotary_dim: int) -> tuple[int, int]:
    """(heads per program, pairs)."""
    block_half = triton.next_power_of_2(rotary_dim // 2)
    return min(triton.next_power_of_2(num_heads), max(1, PAIRS_PER_PROGRAM // block_half)), block_half


def rope(query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    num_tokens, num_heads, _ = query.shape
    num_kv_heads, rotary_dim = key.shape[1], cos_sin.shape[1]
    if num_tokens == 0:
        return
    block_heads, block_half = launch_parameters(num_heads, rotary_dim)
    grid = (num_tokens, triton.cdiv(num_heads, block_heads) + triton.cdiv(num_kv_heads, block_heads))
    rope_kernel[grid](
        query,
        key,
        positions,
        cos_sin,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=rotary_dim // 2,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        num_warps=4,
    )
