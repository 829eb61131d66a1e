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
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quire.kernels.paged_decode.parameters import MIN_TILES, DecodeParameters, decode_parameters
from quire.kernels.targets import current_target
from quire.kernels.triton_shares import add_pieces, owner_of, share_of

CODE_UNITS = 64
"""Weights times scales of coded values are multiplied by this and results divided: of the size of the largest value
of a token, they neither overflow float16 nor vanish in it. A power of two, so it costs no bit."""


@triton.jit
def seen_tiles(seq_len: tl.tensor, prefix_len: tl.tensor, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tuple:
    """(first tile, number of tiles) of the positions that the newest token sees here: in its window, behind its prefix.

    A padding row of length 0 has none, nor has a sequence that is all prefix.
    """
    first_position = seq_len * 0
    if WINDOW is not None:
        first_position = tl.maximum(seq_len - WINDOW, 0)
    first_position = tl.maximum(first_position, prefix_len)
    first = first_position // BLOCK_N
    return first, tl.where(first_position < seq_len, tl.cdiv(seq_len, BLOCK_N) - first, 0)


@triton.jit
def tiles_of_sequences(
    seq_lens: tl.tensor,
    prefix_lens: tl.tensor,
    num_seqs: tl.tensor,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> tl.tensor:
    """[BLOCK_S] how many tiles of each sequence are seen."""
    sequence = tl.arange(0, BLOCK_S)
    seq_len = tl.load(seq_lens + sequence, mask=sequence < num_seqs, other=0)
    prefix_len = 0
    if prefix_lens is not None:
        prefix_len = tl.load(prefix_lens + sequence, mask=sequence < num_seqs, other=0)
    _, tiles = seen_tiles(seq_len, prefix_len, WINDOW, BLOCK_N)
    return tiles


@triton.jit
def _attend(
    q: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    seq_len: tl.tensor,
    prefix_len: tl.tensor,
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
    HAS_PREFIX: tl.constexpr,
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
        if HAS_PREFIX:
            visible = visible & (position >= prefix_len)
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
    do_not_specialize_on_alignment=["block_tables", "seq_lens", "prefix_lens"],
)
def split_kernel(
    query: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    block_tables: tl.tensor,
    seq_lens: tl.tensor,
    prefix_lens: tl.tensor,
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

    With `prefix_lens` a sequence's first positions are left to another kernel, and what is seen here is a piece of it.
    Whoever has a sequence's first tile notes in `shares` which is its first share and how many it has. A piece that is
    not a whole sequence goes to a slot: the first one of a sequence to the sequence's, any other to its share's, of
    which there is one at most, the share's first.
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

    tiles = tiles_of_sequences(seq_lens, prefix_lens, num_seqs, WINDOW, BLOCK_N, BLOCK_S)
    first, end, first_sequence, end_sequence, start, num_all, num_used = share_of(share, num_shares, tiles, MIN_TILES)
    sequence = first_sequence.to(tl.int64)
    for _ in range(first_sequence, end_sequence):
        seq_len = tl.load(seq_lens + sequence)
        prefix_len = 0
        if prefix_lens is not None:
            prefix_len = tl.load(prefix_lens + sequence)
        first_tile, num_tiles = seen_tiles(seq_len, prefix_len, WINDOW, BLOCK_N)
        piece_begin = tl.maximum(first - start, 0)
        piece_end = tl.minimum(end - start, num_tiles)
        if piece_begin < piece_end:
            q_at = query + (sequence * QUERY_STRIDE_SEQ + head * QUERY_STRIDE_HEAD)[:, None] + dim[None, :]
            q = tl.load(q_at, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]
            table = block_tables + sequence * table_stride
            result, lse = _attend(
                *(q, first_tile + piece_begin, first_tile + piece_end, seq_len, prefix_len, table),
                *(k_head, v_head, k_head_scales, v_head_scales, scale_log2, CACHE_STRIDE_BLOCK, SCALES_STRIDE_BLOCK),
                *(HEAD_DIM, BLOCK_SIZE, WINDOW, prefix_lens is not None, CODE_UNITS, BLOCK_M, BLOCK_N, BLOCK_D),
            )
            is_whole = piece_end - piece_begin == num_tiles
            if prefix_lens is not None:
                is_whole = is_whole & (prefix_len == 0)
            if is_whole:
                out_at = out + (sequence * OUT_STRIDE_SEQ + head * OUT_STRIDE_HEAD)[:, None] + dim[None, :]
                tl.store(out_at, result.to(out.dtype.element_ty), mask=mask)
            else:
                slot = head * (num_seqs + num_shares) + tl.where(piece_begin == 0, sequence, num_seqs + share)
                tl.store(partial_out + (slot * HEAD_DIM)[:, None] + dim[None, :], result, mask=mask)
                tl.store(partial_lse + slot, lse, mask=row_mask)
            if (piece_begin == 0) & (tl.program_id(0) == 0):
                tl.store(shares + sequence * 2, share)
                last_share = owner_of(start + num_tiles - 1, num_all, num_used)
                tl.store(shares + sequence * 2 + 1, last_share - share + 1)
        start += num_tiles
        sequence += 1


@triton.jit
def add_pieces_of_sequence(
    highest: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    first_share: tl.tensor,
    num_pieces: tl.tensor,
    num_shares: tl.tensor,
    sequence: tl.tensor,
    num_seqs: tl.tensor,
    head: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tuple:
    """Join what split_kernel left of one head of one sequence to a sum of [BLOCK_D]."""
    for begin in range(0, num_pieces, BLOCK_P):
        piece = begin + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        slot = head * (num_seqs + num_shares) + tl.where(piece == 0, sequence, num_seqs + first_share + piece)
        highest, total, acc = add_pieces(
            highest, total, acc, partial_out, partial_lse, slot, piece < num_pieces, HEAD_DIM, BLOCK_D
        )
    return highest, total, acc


@triton.jit(do_not_specialize=["num_seqs", "num_shares"], do_not_specialize_on_alignment=["seq_lens"])
def reduce_kernel(
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    shares: tl.tensor,
    seq_lens: tl.tensor,
    out: tl.tensor,
    num_seqs: tl.tensor,
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
    highest, total, acc = add_pieces_of_sequence(
        *(highest, total, acc, partial_out, partial_lse, first_share, num_pieces, num_shares),
        *(sequence, num_seqs, head, HEAD_DIM, BLOCK_P, BLOCK_D),
    )
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


@dataclass(frozen=True, slots=True)
class Pieces:
    """What split_kernel leaves for another to merge: the first piece of a sequence lies in the sequence's slot, the
    others in their shares' slots, which come behind."""

    out: torch.Tensor  # [Hq, num_seqs + num_shares, D] float32
    lse: torch.Tensor  # [Hq, num_seqs + num_shares] float32, log2 of the sum of weights
    shares: torch.Tensor  # [num_seqs, 2] int32: first share and how many; nothing of a sequence without a tile


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
    pieces = launch_split(
        *(query, k_cache, v_cache, block_tables, seq_lens, scale, sliding_window, out, k_scales, v_scales),
        *(None, parameters),
    )
    reduce_kernel[(num_seqs * num_heads,)](
        *(pieces.out, pieces.lse, pieces.shares, seq_lens, out, num_seqs, parameters.num_shares, *out.stride()[:2]),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_P=16,
        BLOCK_D=parameters.block_d,
        num_warps=4,
    )


def launch_split(
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
    prefix_lens: torch.Tensor | None,
    parameters: DecodeParameters,
) -> Pieces:
    """Write to `out` what needs no merging, and leave the rest in pieces.

    With `prefix_lens`, [num_seqs] int32, so many positions of each sequence are left out, and whoever has a prefix is
    left in pieces.
    """
    num_seqs, num_heads, head_dim = query.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    num_shares = parameters.num_shares
    pieces = Pieces(
        out.new_empty((num_heads, num_seqs + num_shares, head_dim), dtype=torch.float32),
        out.new_empty((num_heads, num_seqs + num_shares), dtype=torch.float32),
        out.new_empty((num_seqs, 2), dtype=torch.int32),
    )
    group_size = num_heads // num_kv_heads
    num_programs = num_kv_heads * triton.cdiv(group_size, parameters.heads_per_program)
    split_kernel[(num_programs, num_shares)](
        *(query, k_cache, v_cache, k_scales, v_scales, block_tables, seq_lens, prefix_lens, out),
        *(pieces.out, pieces.lse, pieces.shares, num_seqs, num_shares),
        *(scale * math.log2(math.e), block_tables.stride(0)),
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
    return pieces
