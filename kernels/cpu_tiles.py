"""Matrix products in tile registers (AMX), where the processor has them: the CPU's linear layers in bfloat16.

A tile register holds 16 rows of 64 bytes. One instruction multiplies 16 rows of 32 bfloat16 with 32 x 16 weights and
adds to the 256 sums of a third tile, in 16 cycles: that is 16 times what the vectors of the same core do. A panel of
`cpu_matrix` is laid out pair by pair, so that 32 inputs of any 16 of its features are a tile as they lie. Each sum is
made in the order of the input features, 32 of them at a time, whatever rows stand beside it and however many: there is
no number of rows below which vectors multiply, so that a row's result never depends on the batch.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume 2, TDPBF16PS.
"""

from __future__ import annotations

import ctypes
import functools
import sys

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils

from quire.kernels import cpu_lanes as lanes
from quire.kernels.cpu_elements import (
    F32,
    I64,
    Builder,
    Kinds,
    Value,
    address_of,
    architecture,
    emitted,
    has_feature,
    nothing,
)
from quire.kernels.cpu_lanes import at, integer
from quire.kernels.cpu_matrix import PANEL

TILE_DEPTH = 32
"""Inputs of a product of tiles. Weights whose depth is not a multiple of it are multiplied by vectors."""
ROWS_PER_BLOCK = 128
"""Rows whose sums are kept while a panel is read once."""

_TILE_ROWS = 16
_ROWS_TOGETHER = 2 * _TILE_ROWS
_TILE_BYTES = 64  # of a row of a tile
_LINE_BYTES = 4 * PANEL  # of a panel, for a pair of inputs
_STEP_BYTES = TILE_DEPTH // 2 * _LINE_BYTES
_HALF_BYTES = _LINE_BYTES // 2

_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18

_BYTE, _SHORT = ir.IntType(8), ir.IntType(16)
HAS_TILES = PANEL == 4 * _TILE_ROWS and has_feature("amx-bf16") and lanes.CONVERTS_PAIRS and architecture() == "x86_64"


@functools.cache
def has_tiles() -> bool:
    """Whether kernels may use tile registers. The system is asked for them, once for all threads of the process."""
    if not HAS_TILES or sys.platform != "linux":
        return False
    return int(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)) == 0


def instruction(builder: Builder, name: str, *operands: Value | int) -> None:
    """Tiles are named by their numbers, which are part of the instruction."""
    arguments = [ir.Constant(_BYTE, operand) if isinstance(operand, int) else operand for operand in operands]
    lanes.call(builder, f"llvm.x86.{name}", ir.VoidType(), arguments)


@emitted(nothing)
def configure_tiles(builder: Builder, kinds: Kinds, first_rows: Value, second_rows: Value) -> None:
    """Before tiles are used: how many rows of x the first and the second of two tiles have, up to 16 each."""
    if not HAS_TILES:
        return
    memory = cgutils.alloca_once(builder, _BYTE, size=64)
    cgutils.memset(builder, memory, ir.Constant(I64, 64), 0)
    builder.store(ir.Constant(_BYTE, 1), memory)  # the only palette there is
    sixteen = integer(_TILE_ROWS)
    # Tiles 0 to 3 hold sums, 4 and 5 rows of x, 6 and 7 weights; or of few rows 4 rows of x, 5 to 7 weights.
    one_tile = builder.icmp_signed("==", second_rows, integer(0))
    second_sums, fifth = (builder.select(one_tile, other, second_rows) for other in (first_rows, sixteen))
    rows = [first_rows, first_rows, second_sums, second_sums, first_rows, fifth, sixteen, sixteen]
    for tile, count in enumerate(rows):
        columns = builder.bitcast(at(builder, memory, 16 + 2 * tile), _SHORT.as_pointer())
        builder.store(ir.Constant(_SHORT, _TILE_BYTES), columns)
        builder.store(builder.trunc(count, _BYTE), at(builder, memory, 48 + tile))
    instruction(builder, "ldtilecfg", memory)


@emitted(nothing)
def release_tiles(builder: Builder, kinds: Kinds) -> None:
    """Once tiles are not used any more: the system then need not keep them for this thread."""
    if HAS_TILES:
        instruction(builder, "tilerelease")


@emitted(nothing)
def _multiply_whole(
    builder: Builder,
    kinds: Kinds,
    x: Value,
    x_stride: Value,
    panel: Value,
    num_steps: Value,
    tile: Value,
) -> None:
    """tile[row, :] = x[row, :] @ panel, all addresses, for as many rows as the first tile is configured for."""
    if not HAS_TILES:
        return
    x, panel, tile = (builder.inttoptr(address, _BYTE.as_pointer()) for address in (x, panel, tile))
    line = integer(_LINE_BYTES)
    for part in range(4):
        instruction(builder, "tilezero", part)
    with cgutils.for_range(builder, num_steps, intp=I64) as loop:
        weights = at(builder, panel, builder.mul(loop.index, integer(_STEP_BYTES)))
        instruction(builder, "tileloadd64", 4, at(builder, x, builder.mul(loop.index, integer(_TILE_BYTES))), x_stride)
        for part in range(4):
            register = 5 + part % 3
            instruction(builder, "tileloadd64", register, at(builder, weights, part * _TILE_BYTES), line)
            instruction(builder, "tdpbf16ps", part, 4, register)
    for part in range(4):
        instruction(builder, "tilestored64", part, at(builder, tile, part * _TILE_BYTES), line)


@emitted(nothing)
def _multiply_half(
    builder: Builder,
    kinds: Kinds,
    x: Value,
    x_stride: Value,
    panel: Value,
    num_steps: Value,
    tile: Value,
    ahead: Value,
    ahead_lines: Value,
) -> None:
    """tile[row, :32] = x[row, :] @ panel[:, :32], all addresses, for the rows of both tiles of x.

    Meanwhile `ahead_lines` lines at `ahead` are brought into the second level of the cache in each step.
    """
    if not HAS_TILES:
        return
    x, panel, tile, ahead = (builder.inttoptr(address, _BYTE.as_pointer()) for address in (x, panel, tile, ahead))
    line, second = integer(_LINE_BYTES), builder.mul(integer(_TILE_ROWS), x_stride)
    for sums in range(4):
        instruction(builder, "tilezero", sums)
    with cgutils.for_range(builder, num_steps, intp=I64) as loop:
        weights = at(builder, panel, builder.mul(loop.index, integer(_STEP_BYTES)))
        rows = at(builder, x, builder.mul(loop.index, integer(_TILE_BYTES)))
        instruction(builder, "tileloadd64", 6, weights, line)
        instruction(builder, "tileloadd64", 4, rows, x_stride)
        instruction(builder, "tdpbf16ps", 0, 4, 6)
        instruction(builder, "tileloadd64", 7, at(builder, weights, _TILE_BYTES), line)
        instruction(builder, "tdpbf16ps", 1, 4, 7)
        instruction(builder, "tileloadd64", 5, at(builder, rows, second), x_stride)
        instruction(builder, "tdpbf16ps", 2, 5, 6)
        instruction(builder, "tdpbf16ps", 3, 5, 7)
        next_weights = at(builder, ahead, builder.mul(builder.mul(loop.index, ahead_lines), integer(_TILE_BYTES)))
        with cgutils.for_range(builder, ahead_lines, intp=I64) as lines:
            index = builder.mul(lines.index, integer(_TILE_BYTES))
            lanes.prefetch_line(builder, at(builder, next_weights, index), locality=2)
    for sums in range(4):
        row, part = divmod(sums, 2)
        place = at(builder, tile, row * _TILE_ROWS * _LINE_BYTES + part * _TILE_BYTES)
        instruction(builder, "tilestored64", sums, place, line)


@numba.njit
def multiply_block(x, x_stride, num_rows, panel, depth, tile, ahead, is_ahead):  # type: ignore[no-untyped-def]
    """tile[row, :] = x[row, :depth] @ panel for up to ROWS_PER_BLOCK rows; tile is float32 [ROWS_PER_BLOCK, PANEL].

    Meanwhile the panel at `ahead` is brought into the cache, if `is_ahead` is not 0. For up to 16 rows the processor
    does so by itself.
    """
    x, stride, panel, tile, ahead = address_of(x), 2 * x_stride, address_of(panel), address_of(tile), address_of(ahead)
    num_steps = depth // TILE_DEPTH
    rest = num_rows % _ROWS_TOGETHER
    num_paired = num_rows if rest > _TILE_ROWS else num_rows - rest
    num_passes = 2 * -(-num_paired // _ROWS_TOGETHER)
    lines = -(-PANEL // max(num_passes, 1)) if is_ahead != 0 else 0  # of the next panel, in each step of a pass
    configured = 0
    for half in range(2):
        for row in range(0, num_paired, _ROWS_TOGETHER):
            count = min(_ROWS_TOGETHER, num_paired - row)
            if count != configured:
                configure_tiles(_TILE_ROWS, count - _TILE_ROWS)
                configured = count
            _multiply_half(
                x + row * stride,
                stride,
                panel + half * _HALF_BYTES,
                num_steps,
                tile + row * _LINE_BYTES + half * _HALF_BYTES,
                ahead,
                lines,
            )
            ahead += num_steps * lines * _TILE_BYTES
    if num_paired < num_rows:
        configure_tiles(num_rows - num_paired, 0)
        _multiply_whole(x + num_paired * stride, stride, panel, num_steps, tile + num_paired * _LINE_BYTES)
    release_tiles()


@emitted(lambda: types.CPointer(types.float32))
def new_block(builder: Builder, kinds: Kinds) -> Value:
    """Room on the stack for [ROWS_PER_BLOCK, PANEL], good until the function returns."""
    return cgutils.alloca_once(builder, F32, size=ROWS_PER_BLOCK * PANEL)
