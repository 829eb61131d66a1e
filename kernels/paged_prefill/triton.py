"""Paged causal attention as a Triton kernel: a tile of query rows walks over the keys that any of them sees.

The rows of a tile are BLOCK_M // HEADS_PER_PROGRAM tokens times the query heads that share a KV head, so a short chunk
still fills the tile and fewer tiles lie on the diagonal. All sequences share one flat grid whose size follows from
shapes alone; each program finds its sequence by bisecting query_start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quire.kernels.targets import Target, current_target

MAX_HEADS_PER_PROGRAM = 16
CODE_UNITS = 64
"""Weights times scales of int8 values are multiplied by this and results divided: about half the largest value of a
token, they neither overflow float16 nor vanish in it. A power of two, so it costs no bit."""


@triton.jit
def _find_sequence(query_start: tl.tensor, tile: tl.tensor, num_seqs: tl.tensor, TOKENS: tl.constexpr) -> tl.tensor:
    """The last sequence s with query_start[s] // TOKENS + s <= tile.

    That expression grows from s to s + 1 by at least the number of tiles that s needs, so it can number them.
    """
    low, high = 0, num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        starts_after = tl.load(query_start + middle) // TOKENS + middle > tile
        low = tl.where(starts_after, low, middle)
        high = tl.where(starts_after, middle, high)
    return low


@triton.jit
def _attend(
    highest: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    q: tl.tensor,
    row_position: tl.tensor,
    tile: tl.tensor,
    kv_first: tl.tensor,
    kv_end: tl.tensor,
    k_head: tl.tensor,
    v_head: tl.tensor,
    k_head_scales: tl.tensor,
    v_head_scales: tl.tensor,
    table: tl.tensor,
    cache_stride_block: tl.tensor,
    scales_stride_block: tl.tensor,
    scale_log2: tl.tensor,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CODE_UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tuple:
    """One tile of keys and values; without MASKED every row sees every key of it.

    int8 codes are multiplied as they are, which is exact in query's dtype; scales of keys are multiplied into scores,
    those of values into weights.
    """
    position = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    dim = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    dim_mask = dim < HEAD_DIM
    # Masked loads give zeros: 0 * NaN of a foreign slot would be NaN.
    if MASKED:
        present = (position >= kv_first) & (position < kv_end)
        block_id = tl.load(table + position // BLOCK_SIZE, mask=present, other=0).to(tl.int64)
        k_mask = present[None, :] & dim_mask[:, None]
        v_mask = present[:, None] & dim_mask[None, :]
    else:
        block_id = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
        k_mask = dim_mask[:, None]
        v_mask = dim_mask[None, :]
    slot = block_id * cache_stride_block + (position % BLOCK_SIZE) * HEAD_DIM
    k_at = k_head + slot[None, :] + dim[:, None]
    v_at = v_head + slot[:, None] + dim[None, :]
    k = tl.load(k_at, mask=k_mask, other=0.0) if MASKED or HEAD_DIM != BLOCK_D else tl.load(k_at)
    scores = tl.dot(q, k.to(q.dtype), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if k_head_scales is not None:
        scale_at = block_id * scales_stride_block
        scale_at += position % BLOCK_SIZE
        if MASKED:
            key_scales = tl.load(k_head_scales + scale_at, mask=present, other=0.0)
            value_scales = tl.load(v_head_scales + scale_at, mask=present, other=0.0)
        else:
            key_scales = tl.load(k_head_scales + scale_at)
            value_scales = tl.load(v_head_scales + scale_at)
        scores *= key_scales.to(tl.float32)[None, :]
    if MASKED:
        distance = row_position[:, None] - position[None, :]
        visible = distance >= 0
        if WINDOW is not None:
            visible = visible & (distance < WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
    shift = new_highest
    if MASKED and WINDOW is not None:
        # A row may see nothing before its window begins: -inf - -inf would be NaN.
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores * scale_log2 - shift[:, None])
    decay = tl.exp2(highest - shift)
    v = tl.load(v_at, mask=v_mask, other=0.0) if MASKED or HEAD_DIM != BLOCK_D else tl.load(v_at)
    factors = weights
    if k_head_scales is not None:
        factors = weights * (value_scales.to(tl.float32) * CODE_UNITS)[None, :]
    acc = tl.dot(factors.to(q.dtype), v.to(q.dtype), acc * decay[:, None], input_precision="ieee")
    total = total * decay + tl.sum(weights, 1)
    return new_highest, total, acc


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    tokens_per_tile: tl.constexpr = BLOCK_M // HEADS_PER_PROGRAM
    programs_per_group: tl.constexpr = (GROUP_SIZE + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    # The last tiles of a sequence see the most keys: they start first, so that none is left alone at the end.
    query_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1) // programs_per_group
    sequence = _find_sequence(query_start, query_tile, num_seqs, tokens_per_tile)
    start = tl.load(query_start + sequence)
    query_len = tl.load(query_start + sequence + 1) - start
    first_token = (query_tile - start // tokens_per_tile - sequence) * tokens_per_tile
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

    # Positions: the tile's tokens are [first_position, kv_end); they see [kv_first, kv_end) between them.
    first_position = tl.load(seq_lens + sequence) - query_len + first_token
    kv_end = first_position + tl.minimum(tokens_per_tile, query_len - first_token)
    kv_first = 0
    all_see_from = 0
    if WINDOW is not None:
        kv_first = tl.maximum(first_position - WINDOW + 1, 0)
        all_see_from = tl.maximum(kv_end - WINDOW, 0)
    tile_begin = kv_first // BLOCK_N
    tile_end = tl.cdiv(kv_end, BLOCK_N)
    full_begin = tl.minimum(tl.cdiv(all_see_from, BLOCK_N), tile_end)
    full_end = tl.maximum((first_position + 1) // BLOCK_N, full_begin)

    row_position = first_position + row // HEADS_PER_PROGRAM
    table = block_tables + sequence.to(tl.int64) * table_stride
    k_head = k_cache + kv_head.to(tl.int64) * cache_stride_head
    v_head = v_cache + kv_head.to(tl.int64) * cache_stride_head
    k_head_scales, v_head_scales = k_scales, v_scales
    if k_scales is not None:
        k_head_scales += kv_head.to(tl.int64) * scales_stride_head
        v_head_scales += kv_head.to(tl.int64) * scales_stride_head
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOW is not None:
        for tile in range(tile_begin, full_begin):
            highest, total, acc = _attend(
                highest, total, acc, q, row_position, tile, kv_first, kv_end, k_head, v_head,
                k_head_scales, v_head_scales, table, cache_stride_block, scales_stride_block, scale_log2, True,
                HEAD_DIM, BLOCK_SIZE, WINDOW, CODE_UNITS, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    for tile in range(full_begin, full_end):
        highest, total, acc = _attend(
            highest, total, acc, q, row_position, tile, kv_first, kv_end, k_head, v_head,
            k_head_scales, v_head_scales, table, cache_stride_block, scales_stride_block, scale_log2, False,
            HEAD_DIM, BLOCK_SIZE, WINDOW, CODE_UNITS, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for tile in range(full_end, tile_end):
        highest, total, acc = _attend(
            highest, total, acc, q, row_position, tile, kv_first, kv_end, k_head, v_head,
            k_head_scales, v_head_scales, table, cache_stride_block, scales_stride_block, scale_log2, True,
            HEAD_DIM, BLOCK_SIZE, WINDOW, CODE_UNITS, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    if k_scales is not None:
        result *= 1 / CODE_UNITS
    out_row = (start + token).to(tl.int64) * out_stride_token + head * out_stride_head
    tl.store(out + out_row[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=q_mask)


@dataclass(frozen=True, slots=True)
class PrefillParameters:
    """How a prefill is launched. `block_m` rows are tokens times heads; `block_n` positions are one tile."""

    heads_per_program: int
    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


def prefill_parameters(
    dtype: torch.dtype,
    head_dim: int,
    group_size: int,
    max_query_len: int,
    target: Target,
    *,
    has_codes: bool = False,
) -> PrefillParameters:
    """The largest tiles that spill no register on the targets that the tests compile for.

    Rows of 64 and more let Hopper use its wgmma; GPUs without such instructions hold the tiles in registers. float32
    multiplies without tensor cores, so its tiles are small: it is there to compare with, not to be fast.
    """
    programs_per_group = triton.cdiv(group_size, MAX_HEADS_PER_PROGRAM)
    heads_per_program = triton.cdiv(group_size, programs_per_group)
    block_d = max(16, triton.next_power_of_2(head_dim))
    is_short = max_query_len * heads_per_program <= 64
    has_large_mma = target.vendor == "hip" or target.arch in (90, 100, 103)
    num_stages = 2 if target.vendor == "cuda" else 1
    if dtype == torch.float32:
        block_m, block_n, num_warps, num_stages = (32 if block_d <= 64 else 16), 16, 4, 1
    elif block_d > 128:
        block_m, block_n, num_warps = 64, (64 if target.shared_memory >= 166_000 else 32), 8
    elif is_short or (not has_large_mma and block_d > 64):
        block_m, block_n, num_warps = 64, 64, 4
    else:
        is_wide = target.vendor == "cuda" and has_large_mma and block_d <= 64
        block_m, block_n, num_warps = 128, (128 if is_wide else 64), 8
    if has_codes and block_n > 16 and not (target.arch == 90 and block_d <= 128):
        # Codes on their way to query's dtype take registers.
        block_n //= 4 if target.vendor == "hip" and block_d == 128 else 2
    return PrefillParameters(
        heads_per_program=heads_per_program,
        block_m=block_m,
        block_n=block_n,
        block_d=block_d,
        num_warps=num_warps,
        num_stages=num_stages,
    )


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
        *(query.dtype, head_dim, num_heads // k_cache.shape[1], max_query_len, target), has_codes=k_scales is not None
    )
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
    num_tokens, num_heads, head_dim = query.shape
    num_seqs = seq_lens.shape[0]
    _, num_kv_heads, block_size, _ = k_cache.shape
    group_size = num_heads // num_kv_heads
    tokens_per_tile = parameters.block_m // parameters.heads_per_program
    num_tiles = num_tokens // tokens_per_tile + num_seqs
    grid = (num_tiles, num_kv_heads * triton.cdiv(group_size, parameters.heads_per_program))
    prefill_kernel[grid](
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
        BLOCK_M=parameters.block_m,
        BLOCK_N=parameters.block_n,
        BLOCK_D=parameters.block_d,
        num_warps=parameters.num_warps,
        num_stages=parameters.num_stages,
    )
