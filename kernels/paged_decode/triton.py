"""Paged decode attention as two Triton kernels: the sequence is split, each split attends alone, the parts are merged.

The query heads that share a KV head fill the rows of one `tl.dot`, so every key and value is read once. The number of
splits is chosen from shapes; how much of a sequence each takes is decided on the device, from its length, so the host
never waits for one. A split with nothing to do leaves at once, and the merge never looks at what it has not written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quire.kernels.targets import Target, current_target

MAX_HEADS_PER_PROGRAM = 32
MAX_SPLITS = 64
MIN_TILES_PER_SPLIT = 4
PROGRAMS_PER_MULTIPROCESSOR = 4
CODE_UNITS = 64
"""Weights times scales of int8 values are multiplied by this and results divided: about half the largest value of a
token, they neither overflow float16 nor vanish in it. A power of two, so it costs no bit."""


@triton.jit
def _tiles(
    seq_len: tl.tensor,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_TILES: tl.constexpr,
) -> tl.tuple:
    """(first tile, end tile, tiles per split) of the positions that the newest token sees."""
    first = 0
    if WINDOW is not None:
        first = tl.maximum(seq_len - WINDOW, 0) // BLOCK_N
    end = tl.cdiv(seq_len, BLOCK_N)
    return first, end, tl.maximum(tl.cdiv(end - first, NUM_SPLITS), MIN_TILES)


# Numbers and tables that change from step to step must not ask for another compilation.
@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["block_tables", "seq_lens"])
def split_kernel(
    query: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    block_tables: tl.tensor,
    seq_lens: tl.tensor,
    out: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    scale_log2: tl.tensor,
    query_stride_seq: tl.tensor,
    query_stride_head: tl.tensor,
    cache_stride_block: tl.tensor,
    cache_stride_head: tl.tensor,
    scales_stride_block: tl.tensor,
    scales_stride_head: tl.tensor,
    table_stride: tl.tensor,
    out_stride_seq: tl.tensor,
    out_stride_head: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    CODE_UNITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One split of one sequence for the query heads (or some of them) of one KV head.

    int8 codes are multiplied as they are, which is exact in query's dtype; scales of keys are multiplied into scores,
    those of values into weights.
    """
    programs_per_group: tl.constexpr = (GROUP_SIZE + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    programs_per_seq: tl.constexpr = NUM_KV_HEADS * programs_per_group
    sequence = (tl.program_id(0) // programs_per_seq).to(tl.int64)
    kv_head = (tl.program_id(0) % programs_per_seq) // programs_per_group
    split = tl.program_id(1)

    seq_len = tl.load(seq_lens + sequence)
    first_tile, end_tile, tiles_per_split = _tiles(seq_len, WINDOW, BLOCK_N, NUM_SPLITS, MIN_TILES)
    begin = first_tile + split * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, end_tile)
    if NUM_SPLITS > 1 and begin >= end:
        return

    row = (tl.program_id(0) % programs_per_group) * HEADS_PER_PROGRAM + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_mask = (tl.arange(0, BLOCK_M) < HEADS_PER_PROGRAM) & (row < GROUP_SIZE)
    head = (kv_head * GROUP_SIZE + row).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    dim_mask = dim < HEAD_DIM
    q_at = query + sequence * query_stride_seq + (head * query_stride_head)[:, None] + dim[None, :]
    q = tl.load(q_at, mask=row_mask[:, None] & dim_mask[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]

    table = block_tables + sequence * table_stride
    k_head = k_cache + kv_head.to(tl.int64) * cache_stride_head
    v_head = v_cache + kv_head.to(tl.int64) * cache_stride_head
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in range(begin, end):
        position = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        visible = position < seq_len
        if WINDOW is not None:
            visible = visible & (position >= seq_len - WINDOW)
        # Masked loads give zeros: 0 * NaN of a foreign slot would be NaN.
        block_id = tl.load(table + position // BLOCK_SIZE, mask=visible, other=0).to(tl.int64)
        slot = block_id * cache_stride_block + (position % BLOCK_SIZE) * HEAD_DIM
        k = tl.load(k_head + slot[None, :] + dim[:, None], mask=visible[None, :] & dim_mask[:, None], other=0.0)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale_log2  # [BLOCK_M, BLOCK_N]
        if k_scales is not None:
            scale_at = block_id * scales_stride_block + kv_head.to(tl.int64) * scales_stride_head
            scale_at += position % BLOCK_SIZE
            scores *= tl.load(k_scales + scale_at, mask=visible, other=0.0).to(tl.float32)[None, :]
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        v = tl.load(v_head + slot[:, None] + dim[None, :], mask=visible[:, None] & dim_mask[None, :], other=0.0)
        factors = weights
        if k_scales is not None:
            value_scales = tl.load(v_scales + scale_at, mask=visible, other=0.0).to(tl.float32)
            factors = weights * (value_scales * CODE_UNITS)[None, :]
        acc = tl.dot(factors.to(q.dtype), v.to(q.dtype), acc * decay[:, None], input_precision="ieee")
        total = total * decay + tl.sum(weights, 1)
        highest = new_highest

    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    if k_scales is not None:
        result *= 1 / CODE_UNITS
    out_mask = row_mask[:, None] & dim_mask[None, :]
    if NUM_SPLITS == 1:
        out_at = out + sequence * out_stride_seq + (head * out_stride_head)[:, None] + dim[None, :]
        tl.store(out_at, result.to(out.dtype.element_ty), mask=out_mask)
    else:
        part = (sequence * (NUM_KV_HEADS * GROUP_SIZE) + head) * NUM_SPLITS + split  # [BLOCK_M]
        tl.store(partial_out + (part * HEAD_DIM)[:, None] + dim[None, :], result, mask=out_mask)
        tl.store(partial_lse + part, highest + tl.log2(total), mask=row_mask)


@triton.jit(do_not_specialize_on_alignment=["seq_lens"])
def reduce_kernel(
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    seq_lens: tl.tensor,
    out: tl.tensor,
    out_stride_seq: tl.tensor,
    out_stride_head: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Merge the splits of one head of one sequence."""
    sequence = (tl.program_id(0) // NUM_HEADS).to(tl.int64)
    head = (tl.program_id(0) % NUM_HEADS).to(tl.int64)
    seq_len = tl.load(seq_lens + sequence)
    first_tile, end_tile, tiles_per_split = _tiles(seq_len, WINDOW, BLOCK_N, NUM_SPLITS, MIN_TILES)
    num_used = tl.cdiv(end_tile - first_tile, tiles_per_split)

    split = tl.arange(0, BLOCK_SPLITS)  # [BLOCK_SPLITS]
    dim = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    used = split < num_used
    part = (sequence * NUM_HEADS + head) * NUM_SPLITS + split
    lse = tl.load(partial_lse + part, mask=used, other=float("-inf"))
    highest = tl.max(lse, 0)
    weights = tl.where(used, tl.exp2(lse - highest), 0.0)
    values_at = partial_out + (part * HEAD_DIM)[:, None] + dim[None, :]
    values = tl.load(values_at, mask=used[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    total = tl.sum(weights, 0)
    result = tl.sum(values * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    out_at = out + sequence * out_stride_seq + head * out_stride_head + dim
    tl.store(out_at, result.to(out.dtype.element_ty), mask=dim < HEAD_DIM)


@dataclass(frozen=True, slots=True)
class DecodeParameters:
    """How a decode is launched. `block_m` rows hold `heads_per_program` heads; `block_n` positions are one tile."""

    heads_per_program: int
    block_m: int
    block_n: int
    block_d: int
    num_splits: int
    num_warps: int
    num_stages: int


def decode_parameters(
    dtype: torch.dtype,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    num_seqs: int,
    max_seq_len: int,
    window: int | None,
    target: Target,
    *,
    has_codes: bool = False,
) -> DecodeParameters:
    """Tiles that fit the target's shared memory, and enough splits to fill its multiprocessors a few times over.

    Splits are a power of two, so that few variants are ever compiled.
    """
    group_size = num_heads // num_kv_heads
    programs_per_group = triton.cdiv(group_size, MAX_HEADS_PER_PROGRAM)
    heads_per_program = triton.cdiv(group_size, programs_per_group)
    block_d = max(16, triton.next_power_of_2(head_dim))
    tile_bytes = 8_192 if dtype == torch.float32 else 16_384
    if has_codes and target.vendor == "hip":
        tile_bytes //= 2  # codes on their way to query's dtype take registers
    block_n = max(16, min(64, tile_bytes // (block_d * dtype.itemsize)))
    num_programs = num_seqs * num_kv_heads * programs_per_group
    visible = max_seq_len if window is None else min(window + block_n - 1, max_seq_len)
    wanted = PROGRAMS_PER_MULTIPROCESSOR * target.num_multiprocessors // num_programs
    useful = triton.cdiv(triton.cdiv(visible, block_n), MIN_TILES_PER_SPLIT)
    return DecodeParameters(
        heads_per_program=heads_per_program,
        block_m=max(16, triton.next_power_of_2(heads_per_program)),
        block_n=block_n,
        block_d=block_d,
        num_splits=1 << (max(1, min(wanted, useful, MAX_SPLITS)).bit_length() - 1),
        num_warps=4,
        num_stages=3 if target.vendor == "cuda" else 2,
    )


def paged_decode(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    out: torch.Tensor | None = None,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    num_seqs, num_heads, head_dim = query.shape
    if num_seqs == 0:
        return out
    _, num_kv_heads, block_size, _ = k_cache.shape
    max_seq_len = block_tables.shape[1] * block_size
    target = current_target(query.device)
    parameters = decode_parameters(
        *(query.dtype, head_dim, num_heads, num_kv_heads, num_seqs, max_seq_len, sliding_window, target),
        has_codes=k_scales is not None,
    )
    launch(query, k_cache, v_cache, block_tables, seq_lens, scale, sliding_window, out, k_scales, v_scales, parameters)
    return out


def launch(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    out: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
    parameters: DecodeParameters,
) -> None:
    """Fill `out` as paged_decode does, with chosen parameters."""
    num_seqs, num_heads, head_dim = query.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group_size = num_heads // num_kv_heads
    num_programs = num_seqs * num_kv_heads * triton.cdiv(group_size, parameters.heads_per_program)
    num_splits = parameters.num_splits
    partial_out = partial_lse = out
    if num_splits > 1:
        partial_out = out.new_empty((num_seqs, num_heads, num_splits, head_dim), dtype=torch.float32)
        partial_lse = out.new_empty((num_seqs, num_heads, num_splits), dtype=torch.float32)
    split_kernel[(num_programs, num_splits)](
        query,
        k_cache,
        v_cache,
        k_scales,
        v_scales,
        block_tables,
        seq_lens,
        out,
        partial_out,
        partial_lse,
        scale * math.log2(math.e),
        query.stride(0),
        query.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        *((0, 0) if k_scales is None else k_scales.stride()[:2]),
        block_tables.stride(0),
        out.stride(0),
        out.stride(1),
        NUM_KV_HEADS=num_kv_heads,
        GROUP_SIZE=group_size,
        HEADS_PER_PROGRAM=parameters.heads_per_program,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=sliding_window,
        NUM_SPLITS=num_splits,
        MIN_TILES=MIN_TILES_PER_SPLIT,
        CODE_UNITS=CODE_UNITS,
        BLOCK_M=parameters.block_m,
        BLOCK_N=parameters.block_n,
        BLOCK_D=parameters.block_d,
        num_warps=parameters.num_warps,
        num_stages=parameters.num_stages,
    )
    if num_splits > 1:
        reduce_kernel[(num_seqs * num_heads,)](
            partial_out,
            partial_lse,
            seq_lens,
            out,
            out.stride(0),
            out.stride(1),
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            WINDOW=sliding_window,
            NUM_SPLITS=num_splits,
            MIN_TILES=MIN_TILES_PER_SPLIT,
            BLOCK_N=parameters.block_n,
            BLOCK_SPLITS=triton.next_power_of_2(num_splits),
            BLOCK_D=parameters.block_d,
            num_warps=4,
        )
