"""Who attends to what: the tiles of all sequences in one row, cut into equal shares. Each program computes its own.

A share is a range of that row. What it has of one sequence is a piece, and every piece has a tile at least.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def seen_tiles(seq_len: tl.tensor, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tuple:
    """(first tile, number of tiles) of the positions that the newest token sees; a padding row of length 0 has none."""
    first = seq_len * 0
    if WINDOW is not None:
        first = tl.maximum(seq_len - WINDOW, 0) // BLOCK_N
    return first, tl.cdiv(seq_len, BLOCK_N) - first


@triton.jit
def share_of(
    program: tl.tensor,
    num_programs: tl.tensor,
    seq_lens: tl.tensor,
    num_seqs: tl.tensor,
    WINDOW: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> tl.tuple:
    """What one of `num_programs` takes of all tiles, sequence after sequence: equal shares, but for one tile.

    Returns (first tile, end tile, first sequence, end sequence, where the first sequence's tiles begin, number of
    tiles, number of programs that take any). Without a share there is no sequence between first and end.
    """
    sequence = tl.arange(0, BLOCK_S)
    lens = tl.load(seq_lens + sequence, mask=sequence < num_seqs, other=0)
    _, tiles = seen_tiles(lens, WINDOW, BLOCK_N)
    ends = tl.cumsum(tiles, 0)
    num_tiles = tl.sum(tiles, 0)
    num_used = tl.minimum(num_programs, tl.cdiv(num_tiles, MIN_TILES))
    divisor = tl.maximum(num_used, 1)
    first = (tl.minimum(program, num_used).to(tl.int64) * num_tiles // divisor).to(tl.int32)
    end = (tl.minimum(program + 1, num_used).to(tl.int64) * num_tiles // divisor).to(tl.int32)
    is_before = ends <= first
    first_sequence = tl.sum(is_before.to(tl.int32), 0)
    end_sequence = tl.sum((ends - tiles < end).to(tl.int32), 0)
    return first, end, first_sequence, end_sequence, tl.sum(tl.where(is_before, tiles, 0), 0), num_tiles, num_used


@triton.jit
def owner_of(tile: tl.tensor, num_tiles: tl.tensor, num_used: tl.tensor) -> tl.tensor:
    """Which program's share a tile of all sequences lies in: the last one that begins no later."""
    return (((tile + 1).to(tl.int64) * num_used - 1) // num_tiles).to(tl.int32)
