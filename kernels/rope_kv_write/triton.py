"""Norm, rotation and the write into the pages as one Triton kernel: some heads of some tokens per program.

Programs first share the query's heads, then the key's, then the value's; heads of one token follow each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ELEMENTS_PER_PROGRAM = 2048  # 16 for each thread: two loads of 16 bytes in bfloat16


@triton.jit
def _rotate(
    source: tl.tensor,  # [BLOCK_ROWS]: where each head begins
    target: tl.tensor,  # [BLOCK_ROWS]
    is_row: tl.tensor,  # [BLOCK_ROWS]
    angles: tl.tensor,  # [BLOCK_ROWS]: where each row's cosines begin
    norm: tl.tensor,
    eps: tl.tensor,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HAS_NORM: tl.constexpr,
) -> None:
    dtype: tl.constexpr = target.dtype.element_ty
    pair = tl.arange(0, BLOCK_HALF)
    mask = is_row[:, None] & (pair < HALF)[None, :]
    first = tl.load(source[:, None] + pair[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source[:, None] + HALF + pair[None, :], mask=mask, other=0.0).to(tl.float32)
    if BLOCK_REST > 0:  # dimensions that are not rotated
        other = 2 * HALF + tl.arange(0, BLOCK_REST)
        rest_mask = is_row[:, None] & (other < HEAD_DIM)[None, :]
        rest = tl.load(source[:, None] + other[None, :], mask=rest_mask, other=0.0).to(tl.float32)
    cos = tl.load(angles[:, None] + pair[None, :], mask=mask, other=0.0)
    sin = tl.load(angles[:, None] + HALF + pair[None, :], mask=mask, other=0.0)
    if HAS_NORM:
        squares = tl.sum(first * first + second * second, axis=1)
        if BLOCK_REST > 0:
            squares += tl.sum(rest * rest, axis=1)
        factor = (1.0 / tl.sqrt(squares / HEAD_DIM + eps))[:, None]
        first *= factor * tl.load(norm + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        second *= factor * tl.load(norm + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
        if BLOCK_REST > 0:
            rest *= factor * tl.load(norm + other, mask=other < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
    tl.store(target[:, None] + pair[None, :], (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(target[:, None] + HALF + pair[None, :], (second * cos + first * sin).to(dtype), mask=mask)
    if BLOCK_REST > 0:
        tl.store(target[:, None] + other[None, :], rest.to(dtype), mask=rest_mask)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["positions", "slot_mapping"])
def rope_kv_write_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    positions: tl.tensor,
    cos_sin: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    slot_mapping: tl.tensor,
    query_norm: tl.tensor,
    key_norm: tl.tensor,
    eps: tl.tensor,
    num_tokens: tl.tensor,
    query_stride_token: tl.tensor,
    query_stride_head: tl.tensor,
    key_stride_token: tl.tensor,
    key_stride_head: tl.tensor,
    value_stride_token: tl.tensor,
    value_stride_head: tl.tensor,
    cache_stride_block: tl.tensor,
    cache_stride_head: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HAS_NORM: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    num_query_programs = tl.cdiv(num_tokens * NUM_HEADS, BLOCK_ROWS)
    num_key_programs = tl.cdiv(num_tokens * NUM_KV_HEADS, BLOCK_ROWS)
    lane = tl.arange(0, BLOCK_ROWS)
    if program < num_query_programs:
        row = program.to(tl.int64) * BLOCK_ROWS + lane
        is_row = row < num_tokens * NUM_HEADS
        token, head = row // NUM_HEADS, row % NUM_HEADS
        heads = query + token * query_stride_token + head * query_stride_head
        angles = cos_sin + tl.load(positions + token, mask=is_row, other=0).to(tl.int64) * (2 * HALF)
        _rotate(heads, heads, is_row, angles, query_norm, eps, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, HAS_NORM)
        return
    program -= num_query_programs
    is_key = program < num_key_programs
    program = tl.where(is_key, program, program - num_key_programs)
    row = program.to(tl.int64) * BLOCK_ROWS + lane
    is_row = row < num_tokens * NUM_KV_HEADS
    token, head = row // NUM_KV_HEADS, row % NUM_KV_HEADS
    slot = tl.load(slot_mapping + token, mask=is_row, other=0).to(tl.int64)
    target = slot // BLOCK_SIZE * cache_stride_block + head * cache_stride_head + slot % BLOCK_SIZE * HEAD_DIM
    if is_key:
        keys = key + token * key_stride_token + head * key_stride_head
        angles = cos_sin + tl.load(positions + token, mask=is_row, other=0).to(tl.int64) * (2 * HALF)
        _rotate(keys, k_cache + target, is_row, angles, key_norm, eps, HEAD_DIM, HALF, BLOCK_HALF, BLOCK_REST, HAS_NORM)
    else:
        dim = tl.arange(0, BLOCK_DIM)
        mask = is_row[:, None] & (dim < HEAD_DIM)[None, :]
        values = value + token * value_stride_token + head * value_stride_head
        tl.store(
            (v_cache + target)[:, None] + dim[None, :], tl.load(values[:, None] + dim[None, :], mask=mask), mask=mask
        )


def launch_parameters(head_dim: int) -> tuple[int, int]:
    """(heads of all tokens per program, columns)."""
    block_dim = triton.next_power_of_2(head_dim)
    return max(1, ELEMENTS_PER_PROGRAM // block_dim), block_dim


def rope_kv_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
) -> None:
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, rotary_dim = key.shape[1], cos_sin.shape[1]
    if num_tokens == 0:
        return
    block_rows, block_dim = launch_parameters(head_dim)
    rest = head_dim - rotary_dim
    programs = triton.cdiv(num_tokens * num_heads, block_rows) + 2 * triton.cdiv(num_tokens * num_kv_heads, block_rows)
    rope_kv_write_kernel[(programs,)](
        query,
        key,
        value,
        positions,
        cos_sin,
        k_cache,
        v_cache,
        slot_mapping,
        query_norm,
        key_norm,
        eps,
        num_tokens,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HALF=rotary_dim // 2,
        BLOCK_SIZE=k_cache.shape[2],
        BLOCK_ROWS=block_rows,
        BLOCK_DIM=block_dim,
        BLOCK_HALF=triton.next_power_of_2(rotary_dim // 2),
        BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
        HAS_NORM=query_norm is not None,
        num_warps=4,
    )
