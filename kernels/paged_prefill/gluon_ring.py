"""The ring of tiles between the warp that loads and the warps that compute: who fills a slot, with what, and when.

Slots are filled and used in one order, K0, K1, V0, K2, V1, ..., V(n-1): a counter of turns says which slot it is and
which phase of its two barriers. `full` completes when the bytes of a tile have arrived, `empty` when every group of
warps has left it.

A tile is fetched as boxes of one page and one panel of 64 dimensions: what a 128-byte swizzle covers. The box in which
the query tile's last position lies is fetched from earlier in its page, so that this position comes to stand in its
last row. What would lie before the page the TMA fills with zeros: no slot behind the last position is ever read.
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
def wait_for(
    buffers: gl.tuple,
    turn: gl.tensor,
) -> gl.shared_memory_descriptor:
    """The tile [block_n, head_dim] whose turn it is, once it has arrived."""
    ring, full, _ = buffers
    num_slots: gl.constexpr = ring.shape[0]
    mbarrier.wait(full.index(turn % num_slots), turn // num_slots & 1)
    return ring.index(turn % num_slots)


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
def _fill(
    buffers: gl.tuple,
    turn: gl.tensor,
    desc: tma.tensor_descriptor,
    tile: gl.tensor,
    kv_end: gl.tensor,
    kv_head: gl.tensor,
    table: gl.tensor,
    BLOCK_SIZE: gl.constexpr,
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
        shift = box_shift(first, kv_end, box_rows)
        block_id = gl.load(table + gl.minimum(first, kv_end - 1) // BLOCK_SIZE)
        # A box that lies beyond the last position altogether is "fetched" from behind the page: all zeros.
        row = gl.where(shift < box_rows, first % BLOCK_SIZE - shift, BLOCK_SIZE)
        for panel in gl.static_range(num_panels):
            target = boxes.index((slot * num_panels + panel) * num_boxes + box)
            tma.async_copy_global_to_shared(desc, [block_id, kv_head, row, panel * PANEL], full.index(slot), target)


@gluon.jit
def load_tiles(
    buffers: gl.tuple,
    k_desc: tma.tensor_descriptor,
    v_desc: tma.tensor_descriptor,
    kv_end: gl.tensor,
    kv_head: gl.tensor,
    table: gl.tensor,
    BLOCK_SIZE: gl.constexpr,
) -> None:
    """What the loading warp does: all tiles of positions before kv_end, in the order in which they are used."""
    block_n: gl.constexpr = buffers[0].shape[1]
    num_tiles = gl.cdiv(kv_end, block_n)
    _fill(buffers, 0, k_desc, 0, kv_end, kv_head, table, BLOCK_SIZE)
    for tile in range(1, num_tiles):
        _fill(buffers, turn_of_keys(tile), k_desc, tile, kv_end, kv_head, table, BLOCK_SIZE)
        turn = turn_of_values(tile - 1, num_tiles)
        _fill(buffers, turn, v_desc, tile - 1, kv_end, kv_head, table, BLOCK_SIZE)
    turn = turn_of_values(num_tiles - 1, num_tiles)
    _fill(buffers, turn, v_desc, num_tiles - 1, kv_end, kv_head, table, BLOCK_SIZE)
