"""Paged decode attention as two Triton kernels: programs attend to equal shares of all sequences, pieces are merged.

The tiles of all sequences stand in one row, and each program takes as many of them as any other, wherever sequences
begin and end: a batch of one long and many short ones keeps all multiprocessors busy to the end. Who takes what is
computed on the device, by each program for itself, from the lengths: the host never waits for one, and a captured
graph may be replayed with others. What a program sees of one sequence is a piece; no piece is ever empty. A sequence
that is one piece is done with it, the pieces of others are merged by the second kernel.

The query heads that share a KV head fill the rows of one `tl.dot`, so every key and value is read once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from quire.kernels.paged_decode.parameters import MIN_TILES, DecodeParameters, decode_parameters
from quire.kernels.paged_decode.triton_shares import owner_of, seen_tiles, share_of
from quire.kernels.targets import current_target

CODE_UNITS = 64
"""Weights times scales of coded values are multiplied by this and results divided: of the size of the largest value
of a token, they neither overflow float16 nor vanish in it. A power of two, so it costs no bit."""


@triton.jit
def _attend(
    q: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    seq_len: tl.tensor,
    table: tl.tensor,
    k_head: tl.tensor,
    v_head: tl.tensor,
    k_head_scales: tl.tensor,
    v_head_scales: tl.tensor,
    scale_log2: tl.tensor,
    CACHE_STRIDE_BLOCK: tl.constexpr,
    SCALES_STRIDE_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CODE_UNITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tuple:
    """(result [BLOCK_M, BLOCK_D], log2 of the sum of weights [BLOCK_M]) of the tiles from begin to end of a sequence.

    Codes are multiplied as they are, which is exact in query's dtype; scales of keys are multiplied into scores, those
    of values into weights.
    """
    dim = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    dim_mask = dim < HEAD_DIM
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
        slot = block_id * CACHE_STRIDE_BLOCK + (position % BLOCK_SIZE) * HEAD_DIM
        k = tl.load(k_head + slot[None, :] + dim[:, None], mask=visible[None, :] & dim_mask[:, None], other=0.0)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale_log2  # [BLOCK_M, BLOCK_N]
        if k_head_scales is not None:
            scale_at = block_id * SCALES_STRIDE_BLOCK
            scale_at += position % BLOCK_SIZE
            scores *= tl.load(k_head_scales + scale_at, mask=visible, other=0.0).to(tl.float32)[None, :]
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        decay = tl.exp2(highest - new_highest)
        v = tl.load(v_head + slot[:, None] + dim[None, :], mask=visible[:, None] & dim_mask[None, :], other=0.0)
        factors = weights
        if k_head_scales is not None:
            value_scales = tl.load(v_head_scales + scale_at, mask=visible, other=0.0).to(tl.float32)
            factors = weights * (value_scales * CODE_UNITS)[None, :]
        acc = tl.dot(factors.to(q.dtype), v.to(q.dtype), acc * decay[:, None], input_precision="ieee")
        total = total * decay + tl.sum(weights, 1)
        highest = new_highest
    result = acc / total[:, None]
    if k_head_scales is not None:
        result *= 1 / CODE_UNITS
    return result, highest + tl.log2(total)


# Numbers and tables that change from step to step must not ask for another compilation.
@triton.jit(
    do_not_specialize=["table_stride", "num_seqs", "num_shares"],
    do_not_specialize_on_alignment=["block_tables", "seq_lens"],
)
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
    shares: tl.tensor,
    num_seqs: tl.tensor,
    num_shares: tl.tensor,
    scale_log2: tl.tensor,
    table_stride: tl.tensor,
    QUERY_STRIDE_SEQ: tl.constexpr,
    QUERY_STRIDE_HEAD: tl.constexpr,
    CACHE_STRIDE_BLOCK: tl.constexpr,
    CACHE_STRIDE_HEAD: tl.constexpr,
    SCALES_STRIDE_BLOCK: tl.constexpr,
    SCALES_STRIDE_HEAD: tl.constexpr,
    OUT_STRIDE_SEQ: tl.constexpr,
    OUT_STRIDE_HEAD: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_TILES: tl.constexpr,
    CODE_UNITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One share of all sequences' tiles for the query heads (or some of them) of one KV head.

    Whoever has a sequence's first tile notes in `shares` which is its first share and how many it has. A piece that is
    not a whole sequence goes to its share's slot 1 if it has the sequence's first tile, else to slot 0: of each there
    is one at most, since pieces between are whole.
    """
    programs_per_group: tl.constexpr = (GROUP_SIZE + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    kv_head = tl.program_id(0) // programs_per_group
    share = tl.program_id(1)
    row = (tl.program_id(0) % programs_per_group) * HEADS_PER_PROGRAM + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    row_mask = (tl.arange(0, BLOCK_M) < HEADS_PER_PROGRAM) & (row < GROUP_SIZE)
    head = (kv_head * GROUP_SIZE + row).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask = row_mask[:, None] & (dim < HEAD_DIM)[None, :]
    k_head = k_cache + kv_head.to(tl.int64) * CACHE_STRIDE_HEAD
    v_head = v_cache + kv_head.to(tl.int64) * CACHE_STRIDE_HEAD
    k_head_scales, v_head_scales = k_scales, v_scales
    if k_scales is not None:
        k_head_scales += kv_head.to(tl.int64) * SCALES_STRIDE_HEAD
        v_head_scales += kv_head.to(tl.int64) * SCALES_STRIDE_HEAD

    first, end, first_sequence, end_sequence, start, num_all, num_used = share_of(
        share, num_shares, seq_lens, num_seqs, WINDOW, MIN_TILES, BLOCK_N, BLOCK_S
    )
    sequence = first_sequence.to(tl.int64)
    for _ in range(first_sequence, end_sequence):
        seq_len = tl.load(seq_lens + sequence)
        first_tile, num_tiles = seen_tiles(seq_len, WINDOW, BLOCK_N)
        piece_begin = tl.maximum(first - start, 0)
        piece_end = tl.minimum(end - start, num_tiles)
        if piece_begin < piece_end:
            q_at = query + (sequence * QUERY_STRIDE_SEQ + head * QUERY_STRIDE_HEAD)[:, None] + dim[None, :]
            q = tl.load(q_at, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]
            table = block_tables + sequence * table_stride
            result, lse = _attend(
                *(q, first_tile + piece_begin, first_tile + piece_end, seq_len, table),
                *(k_head, v_head, k_head_scales, v_head_scales, scale_log2, CACHE_STRIDE_BLOCK, SCALES_STRIDE_BLOCK),
                *(HEAD_DIM, BLOCK_SIZE, WINDOW, CODE_UNITS, BLOCK_M, BLOCK_N, BLOCK_D),
            )
            if piece_end - piece_begin == num_tiles:
                out_at = out + (sequence * OUT_STRIDE_SEQ + head * OUT_STRIDE_HEAD)[:, None] + dim[None, :]
                tl.store(out_at, result.to(out.dtype.element_ty), mask=mask)
            else:
                slot = (head * num_shares + share) * 2 + (piece_begin == 0).to(tl.int32)  # [BLOCK_M]
                tl.store(partial_out + (slot * HEAD_DIM)[:, None] + dim[None, :], result, mask=mask)
                tl.store(partial_lse + slot, lse, mask=row_mask)
            if (piece_begin == 0) & (tl.program_id(0) == 0):
                tl.store(shares + sequence * 2, share)
                last_share = owner_of(start + num_tiles - 1, num_all, num_used)
                tl.store(shares + sequence * 2 + 1, last_share - share + 1)
        start += num_tiles
        sequence += 1


@triton.jit(do_not_specialize=["num_shares"], do_not_specialize_on_alignment=["seq_lens"])
def reduce_kernel(
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    shares: tl.tensor,
    seq_lens: tl.tensor,
    out: tl.tensor,
    num_shares: tl.tensor,
    OUT_STRIDE_SEQ: tl.constexpr,
    OUT_STRIDE_HEAD: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Merge the pieces of one head of one sequence, if it is in several. A padding row becomes zeros."""
    sequence = (tl.program_id(0) // NUM_HEADS).to(tl.int64)
    head = (tl.program_id(0) % NUM_HEADS).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    out_at = out + sequence * OUT_STRIDE_SEQ + head * OUT_STRIDE_HEAD + dim
    if tl.load(seq_lens + sequence) == 0:  # nobody noted anything for it
        tl.store(out_at, tl.zeros([BLOCK_D], out.dtype.element_ty), mask=dim < HEAD_DIM)
        return
    first_share = tl.load(shares + sequence * 2)
    num_pieces = tl.load(shares + sequence * 2 + 1)
    if num_pieces == 1:
        return

    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, num_pieces, BLOCK_P):
        piece = begin + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        used = piece < num_pieces
        slot = (head * num_shares + first_share + piece) * 2 + (piece == 0).to(tl.int32)
        lse = tl.load(partial_lse + slot, mask=used, other=float("-inf"))
        new_highest = tl.maximum(highest, tl.max(lse, 0))
        weights = tl.exp2(lse - new_highest)
        decay = tl.exp2(highest - new_highest)
        values_at = partial_out + (slot * HEAD_DIM)[:, None] + dim[None, :]
        values = tl.load(values_at, mask=used[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        acc = acc * decay + tl.sum(values * weights[:, None], 0)
        total = total * decay + tl.sum(weights, 0)
        highest = new_highest
    tl.store(out_at, (acc / total).to(out.dtype.element_ty), mask=dim < HEAD_DIM)


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
        pages=k_cache.dtype,
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
    num_shares = parameters.num_shares
    partial_out = out.new_empty((num_heads, num_shares, 2, head_dim), dtype=torch.float32)
    partial_lse = out.new_empty((num_heads, num_shares, 2), dtype=torch.float32)
    shares = out.new_empty((num_seqs, 2), dtype=torch.int32)
    group_size = num_heads // num_kv_heads
    num_programs = num_kv_heads * triton.cdiv(group_size, parameters.heads_per_program)
    split_kernel[(num_programs, num_shares)](
        *(query, k_cache, v_cache, k_scales, v_scales, block_tables, seq_lens, out, partial_out, partial_lse, shares),
        *(num_seqs, num_shares, scale * math.log2(math.e), block_tables.stride(0)),
        *(*query.stride()[:2], *k_cache.stride()[:2], *((0, 0) if k_scales is None else k_scales.stride()[:2])),
        *out.stride()[:2],
        GROUP_SIZE=group_size,
        HEADS_PER_PROGRAM=parameters.heads_per_program,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=sliding_window,
        MIN_TILES=MIN_TILES,
        CODE_UNITS=CODE_UNITS,
        BLOCK_S=max(64, triton.next_power_of_2(num_seqs)),
        BLOCK_M=parameters.block_m,
        BLOCK_N=parameters.block_n,
        BLOCK_D=parameters.block_d,
        num_warps=parameters.num_warps,
        num_stages=parameters.num_stages,
        **({} if parameters.max_registers is None else {"maxnreg": parameters.max_registers}),
    )
    reduce_kernel[(num_seqs * num_heads,)](
        *(partial_out, partial_lse, shares, seq_lens, out, num_shares, *out.stride()[:2]),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_P=16,
        BLOCK_D=parameters.block_d,
        num_warps=4,
    )
