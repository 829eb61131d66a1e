"""Who attends to what: the tiles of all items in one row, cut into equal shares. Each program computes its own.

An item is what one softmax goes over: a sequence in a decode, a tile of queries in a prefill. A share is a range of the
row. What it has of one item is a piece, and every piece has a tile at least. Pieces of an item are merged by the
logarithms of their sums of weights, which is exact but for rounding.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def share_of(program: tl.tensor, num_programs: tl.tensor, tiles: tl.tensor, MIN_TILES: tl.constexpr) -> tl.tuple:
    """What one of `num_programs` takes of `tiles` [number of items], item after item: equal shares, but for one tile.

    Returns (first tile, end tile, first item, end item, where the first item's tiles begin, number of tiles, number of
    programs that take any). Without a share there is no item between first and end.
    """
    ends = tl.cumsum(tiles, 0)
    num_tiles = tl.sum(tiles, 0)
    num_used = tl.minimum(num_programs, tl.cdiv(num_tiles, MIN_TILES))
    divisor = tl.maximum(num_used, 1)
    first = (tl.minimum(program, num_used).to(tl.int64) * num_tiles // divisor).to(tl.int32)
    end = (tl.minimum(program + 1, num_used).to(tl.int64) * num_tiles // divisor).to(tl.int32)
    is_before = ends <= first
    first_item = tl.sum(is_before.to(tl.int32), 0)
    end_item = tl.sum((ends - tiles < end).to(tl.int32), 0)
    return first, end, first_item, end_item, tl.sum(tl.where(is_before, tiles, 0), 0), num_tiles, num_used


@triton.jit
def owner_of(tile: tl.tensor, num_tiles: tl.tensor, num_used: tl.tensor) -> tl.tensor:
    """Which program's share a tile of all items lies in: the last one that begins no later."""
    return (((tile + 1).to(tl.int64) * num_used - 1) // num_tiles).to(tl.int32)


@triton.jit
def piece_in_slot(
    slot: tl.tensor, num_items: tl.tensor, num_shares: tl.tensor, tiles: tl.tensor, MIN_TILES: tl.constexpr
) -> tl.tuple:
    """The piece of slot `slot`: of item `slot` the first one; of share `slot - num_items` what begins with the share
    but within an item.

    Returns (item, its first tile, its end tile, its share, the share that the item ends in); tiles are counted from the
    item's first. A slot without a piece ends where it begins.
    """
    ends = tl.cumsum(tiles, 0)
    num_tiles = tl.sum(tiles, 0)
    num_used = tl.maximum(tl.minimum(num_shares, tl.cdiv(num_tiles, MIN_TILES)), 1)
    is_item = slot < num_items
    index = tl.arange(0, tiles.shape[0])
    share = tl.minimum(slot - num_items, num_used)
    first = tl.sum(tl.where(index == slot, ends - tiles, 0), 0)
    first = tl.where(is_item, first, (share.to(tl.int64) * num_tiles // num_used).to(tl.int32))
    item = tl.where(is_item, slot, tl.sum((ends <= first).to(tl.int32), 0))
    begin = tl.sum(tl.where(index == item, ends - tiles, 0), 0)
    end = begin + tl.sum(tl.where(index == item, tiles, 0), 0)
    share = tl.where(is_item, owner_of(first, num_tiles, num_used), share)
    share_end = ((share + 1).to(tl.int64) * num_tiles // num_used).to(tl.int32)
    has_piece = (first < end) & (is_item | (begin < first))
    piece_end = tl.where(has_piece, tl.minimum(share_end, end), first)
    return item, first - begin, piece_end - begin, share, owner_of(end - 1, num_tiles, num_used)


@triton.jit
def add_pieces(
    highest: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    slot: tl.tensor,
    used: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tuple:
    """Join the used ones of the pieces in slots [BLOCK_P] to one row's sums: acc [BLOCK_D], highest and total [1].

    A piece that saw nothing has -inf as the logarithm of its weights and adds nothing, not even to an empty sum.
    """
    dim = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    lse = tl.load(partial_lse + slot, mask=used, other=float("-inf"))
    values_at = partial_out + (slot * HEAD_DIM)[:, None] + dim[None, :]
    values = tl.load(values_at, mask=used[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    new_highest = tl.maximum(highest, tl.max(lse, 0))
    shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # -inf - -inf would be NaN
    weights = tl.exp2(lse - shift)
    decay = tl.exp2(highest - shift)
    acc = acc * decay + tl.sum(values * weights[:, None], 0)
    return new_highest, total * decay + tl.sum(weights, 0), acc
