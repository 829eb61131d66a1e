"""Paged causal attention as a Triton kernel: a tile of query rows walks over the keys that any of them sees.

All sequences share one flat grid whose size follows from shapes alone; each program finds its sequence by bisecting
query_start. Where tiles are too few to keep a GPU busy, triton_pieces.py shares their keys out among programs.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl

from quire.kernels.paged_prefill.parameters import (
    CODE_UNITS,
    PrefillParameters,
    bits_of,
    num_piece_shares,
    num_query_tiles,
    prefill_parameters,
    warp_specialized,
)
from quire.kernels.paged_prefill.triton_pieces import launch_pieces
from quire.kernels.paged_prefill.triton_tiles import attend, locate, seen_positions
from quire.kernels.targets import current_target


# Numbers and tables that change from step to step must not ask for another compilation.
@triton.jit(
    do_not_specialize=["num_seqs", "table_stride"],
    do_not_specialize_on_alignment=["block_tables", "seq_lens", "query_start"],
)
def prefill_kernel(
    query: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    block_tables: tl.tensor,
    seq_lens: tl.tensor,
    query_start: tl.tensor,
    out: tl.tensor,
    scale_log2: tl.tensor,
    num_seqs: tl.tensor,
    query_stride_token: tl.tensor,
    query_stride_head: tl.tensor,
    cache_stride_block: tl.tensor,
    cache_stride_head: tl.tensor,
    scales_stride_block: tl.tensor,
    scales_stride_head: tl.tensor,
    table_stride: tl.tensor,
    out_stride_token: tl.tensor,
    out_stride_head: tl.tensor,
    GROUP_SIZE: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CODE_UNITS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    tokens_per_tile: tl.constexpr = BLOCK_M // HEADS_PER_PROGRAM
    programs_per_group: tl.constexpr = (GROUP_SIZE + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    # The last tiles of a sequence see the most keys: they start first, so that none is left alone at the end.
    query_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1) // programs_per_group
    sequence, start, query_len, seq_len, first_token = locate(
        query_tile, query_start, seq_lens, num_seqs, tokens_per_tile, BITS
    )
    if first_token >= query_len:
        return

    row = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    token = first_token + row // HEADS_PER_PROGRAM
    head_in_group = (tl.program_id(1) % programs_per_group) * HEADS_PER_PROGRAM + row % HEADS_PER_PROGRAM
    row_mask = (row < tokens_per_tile * HEADS_PER_PROGRAM) & (token < query_len) & (head_in_group < GROUP_SIZE)
    head = (kv_head * GROUP_SIZE + head_in_group).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    q_row = (start + token).to(tl.int64) * query_stride_token + head * query_stride_head
    q_mask = row_mask[:, None] & (dim < HEAD_DIM)[None, :]
    q = tl.load(query + q_row[:, None] + dim[None, :], mask=q_mask, other=0.0)  # [BLOCK_M, BLOCK_D]

    first_position, kv_first, kv_end = seen_positions(query_len, seq_len, first_token, True, WINDOW, tokens_per_tile)
    k_head = k_cache + kv_head.to(tl.int64) * cache_stride_head
    v_head = v_cache + kv_head.to(tl.int64) * cache_stride_head
    k_head_scales, v_head_scales = k_scales, v_scales
    if k_scales is not None:
        k_head_scales += kv_head.to(tl.int64) * scales_stride_head
        v_head_scales += kv_head.to(tl.int64) * scales_stride_head
    result, _ = attend(
        *(q, first_position + row // HEADS_PER_PROGRAM, kv_first // BLOCK_N, tl.cdiv(kv_end, BLOCK_N)),
        *(first_position, kv_first, kv_end, k_head, v_head, k_head_scales, v_head_scales),
        *(block_tables + sequence.to(tl.int64) * table_stride, cache_stride_block, scales_stride_block, scale_log2),
        *(False, HEAD_DIM, BLOCK_SIZE, WINDOW, CODE_UNITS, BLOCK_M, BLOCK_N, BLOCK_D),
    )
    out_row = (start + token).to(tl.int64) * out_stride_token + head * out_stride_head
    tl.store(out + out_row[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=q_mask)


def paged_prefill(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float,
    max_query_len: int,
    sliding_window: int | None = None,
    out: torch.Tensor | None = None,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    num_tokens, num_heads, head_dim = query.shape
    if num_tokens == 0:
        return out
    target = current_target(query.device)
    parameters = prefill_parameters(
        *(query.dtype, head_dim, num_heads // k_cache.shape[1], max_query_len, target, k_cache.dtype)
    )
    num_shares = num_piece_shares(
        *(parameters, num_tokens, seq_lens.shape[0], num_heads // parameters.heads_per_program),
        *(block_tables.shape[1] * k_cache.shape[2], target),
    )
    parameters = replace(parameters, num_shares=num_shares)
    if num_shares is None:
        parameters = warp_specialized(parameters, query, k_cache, max_query_len, sliding_window, target) or parameters
    launch(
        *(query, k_cache, v_cache, block_tables, seq_lens, query_start, scale, sliding_window, out),
        *(k_scales, v_scales, parameters),
    )
    return out


def launch(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    out: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
    parameters: PrefillParameters,
) -> None:
    """Fill `out` as paged_prefill does, with chosen parameters."""
    if parameters.num_shares is not None:
        launch_pieces(
            *(query, k_cache, v_cache, block_tables, seq_lens, query_start, scale, sliding_window, out),
            *(k_scales, v_scales, parameters),
        )
        return
    if parameters.num_slots is not None:
        from quire.kernels.paged_prefill.gluon import launch_gluon  # Gluon takes its time to be imported

        launch_gluon(query, k_cache, v_cache, block_tables, seq_lens, query_start, scale, out, parameters)
        return
    num_tokens, num_heads, head_dim = query.shape
    num_seqs = seq_lens.shape[0]
    _, num_kv_heads, block_size, _ = k_cache.shape
    group_size = num_heads // num_kv_heads
    num_programs = num_kv_heads * triton.cdiv(group_size, parameters.heads_per_program)
    prefill_kernel[num_query_tiles(parameters, num_tokens, num_seqs), num_programs](
        query,
        k_cache,
        v_cache,
        k_scales,
        v_scales,
        block_tables,
        seq_lens,
        query_start,
        out,
        scale * math.log2(math.e),
        num_seqs,
        query.stride(0),
        query.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        *((0, 0) if k_scales is None else k_scales.stride()[:2]),
        block_tables.stride(0),
        out.stride(0),
        out.stride(1),
        GROUP_SIZE=group_size,
        HEADS_PER_PROGRAM=parameters.heads_per_program,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=sliding_window,
        CODE_UNITS=CODE_UNITS,
        BITS=bits_of(num_seqs),
        BLOCK_M=parameters.block_m,
        BLOCK_N=parameters.block_n,
        BLOCK_D=parameters.block_d,
        num_warps=parameters.num_warps,
        num_stages=parameters.num_stages,
        **({} if parameters.max_registers is None else {"maxnreg": parameters.max_registers}),
    )
