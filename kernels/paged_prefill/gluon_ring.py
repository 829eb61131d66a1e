"""The ring of tiles between the warps that load and the warps that compute: who fills a slot, with what, and when.

Slots are used in one order, K0, K1, V0, K2, V1, ..., V(n-1): a counter of turns says which slot it is and which phase
of its two barriers. `full` completes when the bytes of a tile have arrived, `empty` when every group of warps has left
it. One warp asks for keys, another for values. Neither can be two phases ahead at a slot: each has the turn before its
own but one, so with two slots or more all groups have left what was in the slot before its last tile.

A tile is fetched as boxes of one page and one panel of 64 dimensions: what a 128-byte swizzle covers. Only the last
tile may reach beyond the query tile's last position. The box in which that lies is fetched from earlier in its page,
so that it comes to stand in the box's last row. What would lie before the page the TMA fills with zeros: no slot behind
the last position is ever read.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

PANEL = gl.constexpr(64)


@gluon.jit
def turn_of_keys(tile: gl.tensor) -> gl.tensor:
    return gl.maximum(2 * tile - 1, 0)


@gluon.jit
def turn_of_values(tile: gl.tensor, num_tiles: gl.tensor) -> gl.tensor:
    return gl.minimum(2 * tile + 2, 2 * num_tiles - 1)


@gluon.jit
def box_shift(first: gl.tensor, kv_end: gl.tensor, BOX_ROWS: gl.constexpr) -> gl.tensor:
    """By how many rows a box is fetched from before `first`, its first position; BOX_ROWS if it is not fetched."""
    return gl.minimum(gl.maximum(first + BOX_ROWS - kv_end, 0), BOX_ROWS)


@gluon.jit
def tile_in(
    buffers: gl.tuple,
    turn: gl.tensor,
) -> gl.shared_memory_descriptor:
    """The tile [block_n, head_dim] whose turn it is: to be read after wait_for, until leave."""
    ring, _, _ = buffers
    num_slots: gl.constexpr = ring.shape[0]
    return ring.index(turn % num_slots)


@gluon.jit
def wait_for(
    buffers: gl.tuple,
    turn: gl.tensor,
) -> None:
    """Until the tile whose turn it is has arrived."""
    ring, full, _ = buffers
    num_slots: gl.constexpr = ring.shape[0]
    mbarrier.wait(full.index(turn % num_slots), turn // num_slots & 1)


@gluon.jit
def leave(
    buffers: gl.tuple,
    turn: gl.tensor,
) -> None:
    """This group reads the tile no more."""
    ring, _, empty = buffers
    num_slots: gl.constexpr = ring.shape[0]
    mbarrier.arrive(empty.index(turn % num_slots), count=1)


@gluon.jit
def _block_ids(
    table: gl.tensor,
    tile: gl.tensor,
    kv_end: gl.tensor,
    BLOCK_N: gl.constexpr,
    BOX_ROWS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    IS_LAST: gl.constexpr,
) -> gl.tuple:
    """Of each box of a tile the page; beyond the last position, which is in the last tile, any that is seen."""
    block_ids: gl.tuple = ()
    for box in gl.static_range(BLOCK_N // BOX_ROWS):
        first = tile * BLOCK_N + box * BOX_ROWS
        if IS_LAST:
            first = gl.minimum(first, kv_end - 1)
        block_ids += (gl.load(table + first // BLOCK_SIZE),)
    return block_ids


@gluon.jit
def _fill(
    buffers: gl.tuple,
    turn: gl.tensor,
    desc: tma.tensor_descriptor,
    tile: gl.tensor,
    block_ids: gl.tuple,
    kv_end: gl.tensor,
    kv_head: gl.tensor,
    BLOCK_SIZE: gl.constexpr,
    IS_LAST: gl.constexpr,
) -> None:
    """Ask for a tile of keys or values, into the slot whose turn it is, once all groups have left that."""
    ring, full, empty = buffers
    num_slots: gl.constexpr = ring.shape[0]
    block_n: gl.constexpr = ring.shape[1]
    num_panels: gl.constexpr = ring.shape[2] // PANEL
    box_rows: gl.constexpr = desc.block_shape[2]
    num_boxes: gl.constexpr = block_n // box_rows
    # A slot is a row of panels, [block_n, PANEL] each, and so a row of boxes.
    shape: gl.constexpr = [num_slots * num_panels * num_boxes, 1, 1, box_rows, PANEL]
    boxes = ring._reinterpret(desc.dtype, shape, desc.layout)
    slot = turn % num_slots
    mbarrier.wait(empty.index(slot), (turn // num_slots & 1) ^ 1)  # at first it counts as completed: phase 1
    mbarrier.expect(full.index(slot), num_panels * num_boxes * desc.block_type.nbytes)
    for box in gl.static_range(num_boxes):
        first = tile * block_n + box * box_rows
        row = first % BLOCK_SIZE
        if IS_LAST:
            shift = box_shift(first, kv_end, box_rows)
            # A box that lies beyond the last position altogether is "fetched" from behind the page: all zeros.
            row = gl.where(shift < box_rows, row - shift, BLOCK_SIZE)
        for panel in gl.static_range(num_panels):
            target = boxes.index((slot * num_panels + panel) * num_boxes + box)
            corner = [block_ids[box], kv_head, row, panel * PANEL]
            tma.async_copy_global_to_shared(desc, corner, full.index(slot), target)


@gluon.jit
def load_tiles(
    buffers: gl.tuple,
    desc: tma.tensor_descriptor,
    kv_end: gl.tensor,
    kv_head: gl.tensor,
    table: gl.tensor,
    BLOCK_SIZE: gl.constexpr,
    IS_KEYS: gl.constexpr,
) -> None:
    """What a loading warp does: all tiles of keys, or of values, of positions before kv_end.

    It has the pages of a tile before it waits for a slot, and asks but in the last tile where the last position is:
    128 positions are 16 boxes if pages are of 16, so what a box costs may hold up all.
    """
    block_n: gl.constexpr = buffers[0].shape[1]
    box_rows: gl.constexpr = desc.block_shape[2]
    num_tiles = gl.cdiv(kv_end, block_n)
    last = num_tiles - 1
    for tile in range(last):
        turn = turn_of_keys(tile) if IS_KEYS else turn_of_values(tile, num_tiles)
        block_ids = _block_ids(table, tile, kv_end, block_n, box_rows, BLOCK_SIZE, False)
        _fill(buffers, turn, desc, tile, block_ids, kv_end, kv_head, BLOCK_SIZE, False)
    turn = turn_of_keys(last) if IS_KEYS else turn_of_values(last, num_tiles)
    block_ids = _block_ids(table, last, kv_end, block_n, box_rows, BLOCK_SIZE, True)
    _fill(buffers, turn, desc, last, block_ids, kv_end, kv_head, BLOCK_SIZE, True)
