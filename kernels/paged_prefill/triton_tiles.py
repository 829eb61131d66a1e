"""What a tile of query rows sees of its sequence, and its attention over a range of that.

The rows of a tile are BLOCK_M // HEADS_PER_PROGRAM tokens times the query heads that share a KV head, so a short chunk
still fills the tile and fewer tiles lie on the diagonal.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_sequence(
    query_start: tl.tensor, tile: tl.tensor, num_seqs: tl.tensor, TOKENS: tl.constexpr, BITS: tl.constexpr
) -> tl.tensor:
    """The last sequence s < 2 ** BITS with query_start[s] // TOKENS + s <= tile; for one tile or a vector of them.

    That expression grows from s to s + 1 by at least the number of tiles that s needs, so it can number them.
    """
    found = tile * 0
    # Unrolled: of what comes out of a loop over vectors the compiler knows no alignment, nor of what follows from it.
    for bit in tl.static_range(BITS):
        later = found + (1 << (BITS - 1 - bit))
        start = tl.load(query_start + later, mask=later < num_seqs, other=0)
        found = tl.where((later < num_seqs) & (start // TOKENS + later <= tile), later, found)
    return found


@triton.jit
def locate(
    tile: tl.tensor,
    query_start: tl.tensor,
    seq_lens: tl.tensor,
    num_seqs: tl.tensor,
    TOKENS: tl.constexpr,
    BITS: tl.constexpr,
) -> tl.tuple:
    """Of one tile or a vector: its sequence, the sequence's first token, length of its query and length, and which of
    its query's tokens is the tile's first; a tile whose first token lies past the query does not exist."""
    sequence = find_sequence(query_start, tile, num_seqs, TOKENS, BITS)
    start = tl.load(query_start + sequence)
    query_len = tl.load(query_start + sequence + 1) - start
    first_token = (tile - start // TOKENS - sequence) * TOKENS
    return sequence, start, query_len, tl.load(seq_lens + sequence), first_token


@triton.jit
def seen_positions(
    query_len: tl.tensor,
    seq_len: tl.tensor,
    first_token: tl.tensor,
    IS_CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tuple:
    """Position of a tile's first token, and the range [kv_first, kv_end) that its tokens see between them; empty for a
    tile that does not exist. Without IS_CAUSAL all tokens stand at the sequence's last position and see all of it."""
    first_position = seq_len - query_len + first_token
    kv_end = first_position + tl.minimum(TOKENS, query_len - first_token)
    if not IS_CAUSAL:
        first_position = seq_len - 1 + first_token * 0
        kv_end = first_position + 1
    kv_end = tl.where(first_token < query_len, kv_end, 0)
    kv_first = kv_end * 0
    if WINDOW is not None:
        kv_first = tl.minimum(tl.maximum(first_position - WINDOW + 1, 0), kv_end)
    return first_position, kv_first, kv_end


@triton.jit
def _attend_tile(
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
    HAS_EMPTY_ROWS: tl.constexpr,
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
    if MASKED and HAS_EMPTY_ROWS:
        # Such a row has seen nothing yet: -inf - -inf would be NaN.
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


@triton.jit
def attend(
    q: tl.tensor,
    row_position: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    first_position: tl.tensor,
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
    IS_PIECE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CODE_UNITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tuple:
    """(result [BLOCK_M, BLOCK_D], log2 of the sum of weights [BLOCK_M]) of the tiles of keys from begin to end, all of
    them in [kv_first, kv_end) at least in part. A row that sees nothing there has zeros and -inf.

    Only tiles that some row does not see all of are masked. Without IS_PIECE the tiles are all that are seen.
    """
    # With a window, or where a piece begins behind its position, a row may have seen nothing after a masked tile.
    has_empty_rows: tl.constexpr = IS_PIECE or WINDOW is not None
    full_begin = kv_first * 0
    if WINDOW is not None:
        full_begin = tl.cdiv(tl.maximum(kv_end - WINDOW, 0), BLOCK_N)
    full_end = tl.maximum((first_position + 1) // BLOCK_N, full_begin)
    if IS_PIECE:
        full_end = tl.minimum(full_end, end)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOW is not None:
        for tile in range(begin, tl.minimum(full_begin, end)):
            highest, total, acc = _attend_tile(
                highest, total, acc, q, row_position, tile, kv_first, kv_end, k_head, v_head,
                k_head_scales, v_head_scales, table, cache_stride_block, scales_stride_block, scale_log2, True,
                has_empty_rows, HEAD_DIM, BLOCK_SIZE, WINDOW, CODE_UNITS, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    for tile in range(tl.maximum(full_begin, begin), full_end):
        highest, total, acc = _attend_tile(
            highest, total, acc, q, row_position, tile, kv_first, kv_end, k_head, v_head,
            k_head_scales, v_head_scales, table, cache_stride_block, scales_stride_block, scale_log2, False,
            has_empty_rows, HEAD_DIM, BLOCK_SIZE, WINDOW, CODE_UNITS, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for tile in range(tl.maximum(full_end, begin), end):
        highest, total, acc = _attend_tile(
            highest, total, acc, q, row_position, tile, kv_first, kv_end, k_head, v_head,
            k_head_scales, v_head_scales, table, cache_stride_block, scales_stride_block, scale_log2, True,
            has_empty_rows, HEAD_DIM, BLOCK_SIZE, WINDOW, CODE_UNITS, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    if k_head_scales is not None:
        result *= 1 / CODE_UNITS
    return result, highest + tl.log2(total)
