"""Prefill in pieces: programs attend to equal shares of the keys of all query tiles, and their pieces are merged.

A short chunk on a long context has too few tiles of queries for a GPU. So the tiles of keys that they see stand in one
row, which is cut into equal shares (triton_shares.py), and a program takes what one share has of one tile of queries.
Everything is computed on the device from lengths; the host looks at shapes only. The same kernel computes what groups
of sequences see of a prefix that each group shares: queries are then `rows` of a decode, and all of them see all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quire.kernels.paged_prefill.parameters import CODE_UNITS, MIN_TILES, PrefillParameters, bits_of, num_query_tiles
from quire.kernels.paged_prefill.triton_tiles import attend, locate, seen_positions
from quire.kernels.triton_shares import add_pieces, piece_in_slot


@triton.jit
def seen_tiles(kv_first: tl.tensor, kv_end: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tuple:
    """(first tile, number of tiles) of a range of positions; an empty one has none."""
    first = kv_first // BLOCK_N
    return first, tl.where(kv_first < kv_end, tl.cdiv(kv_end, BLOCK_N) - first, 0)


@triton.jit
def tiles_of_queries(
    query_start: tl.tensor,
    seq_lens: tl.tensor,
    num_seqs: tl.tensor,
    IS_CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    TOKENS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
) -> tl.tensor:
    """[BLOCK_I] how many tiles of keys each query tile sees; those that do not exist see none."""
    item = tl.arange(0, BLOCK_I)
    _, _, query_len, seq_len, first_token = locate(item, query_start, seq_lens, num_seqs, TOKENS, BITS)
    _, kv_first, kv_end = seen_positions(query_len, seq_len, first_token, IS_CAUSAL, WINDOW, TOKENS)
    _, tiles = seen_tiles(kv_first, kv_end, BLOCK_N)
    return tiles


# Numbers and tables that change from step to step must not ask for another compilation.
@triton.jit(
    do_not_specialize=["num_seqs", "num_items", "num_shares", "table_stride"],
    do_not_specialize_on_alignment=["block_tables", "seq_lens", "query_start", "rows"],
)
def pieces_kernel(
    query: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    block_tables: tl.tensor,
    seq_lens: tl.tensor,
    query_start: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    shares: tl.tensor,
    scale_log2: tl.tensor,
    num_seqs: tl.tensor,
    num_items: tl.tensor,
    num_shares: tl.tensor,
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
    MIN_TILES: tl.constexpr,
    CODE_UNITS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One piece of the keys of a query tile ("item"), for the query heads (or some of them) of one KV head.

    The first pieces of the items come first, and then of each share what is not a first piece; there is one at most,
    where the share begins within an item. Each has a slot, numbered like that. Whoever has the first piece notes in
    `shares` in which share it lies and how many the item has. An item in one piece is written to `out` instead. With
    `rows`, token i is row rows[i] of `query`, a sequence's table that of its first row, and everything is left in
    pieces.
    """
    tokens_per_tile: tl.constexpr = BLOCK_M // HEADS_PER_PROGRAM
    programs_per_group: tl.constexpr = (GROUP_SIZE + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    kv_head = tl.program_id(0) // programs_per_group
    slot = tl.program_id(1)
    tiles = tiles_of_queries(
        query_start, seq_lens, num_seqs, rows is None, WINDOW, tokens_per_tile, BITS, BLOCK_N, BLOCK_I
    )
    item, piece_begin, piece_end, share, last_share = piece_in_slot(slot, num_items, num_shares, tiles, MIN_TILES)
    if piece_begin >= piece_end:
        return
    sequence, start, query_len, seq_len, first_token = locate(
        item, query_start, seq_lens, num_seqs, tokens_per_tile, BITS
    )
    first_position, kv_first, kv_end = seen_positions(
        query_len, seq_len, first_token, rows is None, WINDOW, tokens_per_tile
    )
    first_tile, num_tiles = seen_tiles(kv_first, kv_end, BLOCK_N)

    row = tl.arange(0, BLOCK_M)  # [BLOCK_M]
    token = first_token + row // HEADS_PER_PROGRAM
    head_in_group = (tl.program_id(0) % programs_per_group) * HEADS_PER_PROGRAM + row % HEADS_PER_PROGRAM
    row_mask = (row < tokens_per_tile * HEADS_PER_PROGRAM) & (token < query_len) & (head_in_group < GROUP_SIZE)
    head = (kv_head * GROUP_SIZE + head_in_group).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    mask = row_mask[:, None] & (dim < HEAD_DIM)[None, :]
    token_row = (start + token).to(tl.int64)
    table = block_tables + sequence.to(tl.int64) * table_stride
    row_position = first_position + row // HEADS_PER_PROGRAM
    if rows is not None:
        token_row = tl.load(rows + token_row, mask=token < query_len, other=0).to(tl.int64)
        table = block_tables + tl.load(rows + start).to(tl.int64) * table_stride
        row_position = first_position + row * 0
    q_at = query + (token_row * query_stride_token + head * query_stride_head)[:, None] + dim[None, :]
    q = tl.load(q_at, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    k_head = k_cache + kv_head.to(tl.int64) * cache_stride_head
    v_head = v_cache + kv_head.to(tl.int64) * cache_stride_head
    k_head_scales, v_head_scales = k_scales, v_scales
    if k_scales is not None:
        k_head_scales += kv_head.to(tl.int64) * scales_stride_head
        v_head_scales += kv_head.to(tl.int64) * scales_stride_head
    result, lse = attend(
        *(q, row_position, first_tile + piece_begin, first_tile + piece_end, first_position, kv_first, kv_end),
        *(k_head, v_head, k_head_scales, v_head_scales, table),
        *(cache_stride_block, scales_stride_block, scale_log2),
        *(True, HEAD_DIM, BLOCK_SIZE, WINDOW, CODE_UNITS, BLOCK_M, BLOCK_N, BLOCK_D),
    )

    is_left = piece_end - piece_begin < num_tiles
    if rows is not None:
        is_left = piece_begin < piece_end
    else:
        out_row = token_row * out_stride_token + head * out_stride_head
        out_at = out + out_row[:, None] + dim[None, :]
        tl.store(out_at, result.to(out.dtype.element_ty), mask=mask & (piece_end - piece_begin == num_tiles))
    slot_row = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + slot) * BLOCK_M + row  # [BLOCK_M]
    tl.store(partial_out + (slot_row * HEAD_DIM)[:, None] + dim[None, :], result, mask=mask & is_left)
    tl.store(partial_lse + slot_row, lse, mask=row_mask & is_left)
    if (piece_begin == 0) & (tl.program_id(0) == 0):
        tl.store(shares + item * 2, share)
        tl.store(shares + item * 2 + 1, last_share - share + 1)


@triton.jit
def add_pieces_of_item(
    highest: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    shares: tl.tensor,
    num_shares: tl.tensor,
    item: tl.tensor,
    num_items: tl.tensor,
    token_in_tile: tl.tensor,
    head: tl.tensor,
    GROUP_SIZE: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tuple:
    """Join what pieces_kernel left of one head of one token to a sum of [BLOCK_D]."""
    programs_per_group: tl.constexpr = (GROUP_SIZE + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    head_in_group = head % GROUP_SIZE
    program = (head // GROUP_SIZE) * programs_per_group + head_in_group // HEADS_PER_PROGRAM
    row = token_in_tile * HEADS_PER_PROGRAM + head_in_group % HEADS_PER_PROGRAM
    first_share = tl.load(shares + item * 2)
    num_pieces = tl.load(shares + item * 2 + 1)
    for begin in range(0, num_pieces, BLOCK_P):
        piece = begin + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        slot = program.to(tl.int64) * (num_items + num_shares)
        slot += tl.where(piece == 0, item, num_items + first_share + piece)
        highest, total, acc = add_pieces(
            *(highest, total, acc, partial_out, partial_lse, slot * BLOCK_M + row, piece < num_pieces),
            *(HEAD_DIM, BLOCK_D),
        )
    return highest, total, acc


@triton.jit(
    do_not_specialize=["num_seqs", "num_items", "num_shares"],
    do_not_specialize_on_alignment=["query_start", "seq_lens"],
)
def merge_kernel(
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    shares: tl.tensor,
    query_start: tl.tensor,
    seq_lens: tl.tensor,
    out: tl.tensor,
    num_seqs: tl.tensor,
    num_items: tl.tensor,
    num_shares: tl.tensor,
    out_stride_token: tl.tensor,
    out_stride_head: tl.tensor,
    GROUP_SIZE: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Merge the pieces of one head of one token, if its tile is in several."""
    tokens_per_tile: tl.constexpr = BLOCK_M // HEADS_PER_PROGRAM
    item, token_in_tile = tl.program_id(0) // tokens_per_tile, tl.program_id(0) % tokens_per_tile
    head = tl.program_id(1)
    _, start, query_len, _, first_token = locate(item, query_start, seq_lens, num_seqs, tokens_per_tile, BITS)
    if first_token + token_in_tile >= query_len:
        return
    if tl.load(shares + item * 2 + 1) == 1:
        return
    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    highest, total, acc = add_pieces_of_item(
        *(highest, total, acc, partial_out, partial_lse, shares, num_shares, item, num_items, token_in_tile, head),
        *(GROUP_SIZE, HEADS_PER_PROGRAM, HEAD_DIM, BLOCK_M, BLOCK_P, BLOCK_D),
    )
    dim = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    token = (start + first_token + token_in_tile).to(tl.int64)
    out_at = out + token * out_stride_token + head.to(tl.int64) * out_stride_head + dim
    tl.store(out_at, (acc / total).to(out.dtype.element_ty), mask=dim < HEAD_DIM)


@dataclass(frozen=True, slots=True)
class ItemPieces:
    """What pieces_kernel leaves to merge: the first piece of an item lies in the item's slot, the others in their
    shares' slots, which come behind."""

    out: torch.Tensor  # [head sets, num_items + num_shares, BLOCK_M, D] float32
    lse: torch.Tensor  # [head sets, num_items + num_shares, BLOCK_M] float32, log2 of the sum of weights
    shares: torch.Tensor  # [num_items, 2] int32: first share and how many; nothing of an item without a tile
    num_items: int


def launch_pieces(
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
    """Fill `out` as paged_prefill does, with chosen parameters that have `num_shares`."""
    num_heads, head_dim = query.shape[1:]
    pieces = launch_partial(
        *(query, k_cache, v_cache, block_tables, seq_lens, query_start, None, scale, sliding_window, out),
        *(k_scales, v_scales, parameters),
    )
    merge_kernel[pieces.num_items * parameters.tokens_per_tile, num_heads](
        *(pieces.out, pieces.lse, pieces.shares, query_start, seq_lens, out),
        *(seq_lens.shape[0], pieces.num_items, parameters.num_shares, *out.stride()[:2]),
        GROUP_SIZE=num_heads // k_cache.shape[1],
        HEADS_PER_PROGRAM=parameters.heads_per_program,
        HEAD_DIM=head_dim,
        BITS=bits_of(seq_lens.shape[0]),
        BLOCK_M=parameters.block_m,
        BLOCK_P=16,
        BLOCK_D=parameters.block_d,
        num_warps=4,
    )


def launch_partial(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    rows: torch.Tensor | None,
    scale: float,
    sliding_window: int | None,
    out: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
    parameters: PrefillParameters,
) -> ItemPieces:
    """Write to `out` what needs no merging, and leave the rest in pieces; with `rows` all of it.

    Args:
        rows: None, or [T] int32: which row of `query` and of `block_tables` token i is. Then seq_lens are lengths of
            prefixes that the tokens of a sequence see all of; a prefix of 0 leaves no piece.
    """
    num_tokens = query.shape[0] if rows is None else rows.shape[0]
    num_heads, head_dim = query.shape[1:]
    num_seqs, group_size, num_shares = seq_lens.shape[0], num_heads // k_cache.shape[1], parameters.num_shares
    assert num_shares is not None
    num_items = num_query_tiles(parameters, num_tokens, num_seqs)
    num_head_sets = k_cache.shape[1] * triton.cdiv(group_size, parameters.heads_per_program)
    slots = (num_head_sets, num_items + num_shares, parameters.block_m)
    pieces = ItemPieces(
        out.new_empty((*slots, head_dim), dtype=torch.float32),
        out.new_empty(slots, dtype=torch.float32),
        out.new_empty((num_items, 2), dtype=torch.int32),
        num_items,
    )
    pieces_kernel[num_head_sets, num_items + num_shares](
        *(query, k_cache, v_cache, k_scales, v_scales, block_tables, seq_lens, query_start, rows, out),
        *(pieces.out, pieces.lse, pieces.shares, scale * math.log2(math.e), num_seqs, num_items, num_shares),
        *(*query.stride()[:2], *k_cache.stride()[:2], *((0, 0) if k_scales is None else k_scales.stride()[:2])),
        *(block_tables.stride(0), *out.stride()[:2]),
        GROUP_SIZE=group_size,
        HEADS_PER_PROGRAM=parameters.heads_per_program,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=k_cache.shape[2],
        WINDOW=sliding_window,
        MIN_TILES=MIN_TILES,
        CODE_UNITS=CODE_UNITS,
        BITS=bits_of(num_seqs),
        BLOCK_I=max(16, triton.next_power_of_2(num_items)),
        BLOCK_M=parameters.block_m,
        BLOCK_N=parameters.block_n,
        BLOCK_D=parameters.block_d,
        num_warps=parameters.num_warps,
        num_stages=parameters.num_stages,
        **({} if parameters.max_registers is None else {"maxnreg": parameters.max_registers}),
    )
    return pieces
