"""Linear layers on the CPU: each thread takes panels of packed weights, and blocks of rows, one after another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch

from quire.kernels.cpu_activation import CODES, NO_ACTIVATION
from quire.kernels.cpu_elements import (
    bfloat16_pointer,
    float16_pointer,
    int64_pointer,
    move,
    pointer_to,
    read,
    take,
    write,
)
from quire.kernels.cpu_epilogue import finish_common, finish_row, is_common
from quire.kernels.cpu_matrix import (
    MAX_PASSES,
    MAX_PASSES_AHEAD,
    MAX_ROWS,
    NOT_WIDENED,
    PANEL,
    WIDE_DEPTH,
    WIDENED,
    WIDENING,
    group_of_panels,
    multiply_panels,
    new_tile,
    new_wide,
    panels_together,
)
from quire.kernels.cpu_ranges import Panels, enter_ranges, open_ranges, state_bytes, take_unit
from quire.kernels.cpu_tiles import ROWS_PER_BLOCK, TILE_DEPTH, has_tiles, multiply_block, new_block
from quire.kernels.cpu_workers import Worker, new_tensor, scratch, thread_number_address

if TYPE_CHECKING:
    from quire.kernels.linear import Activation, PackedWeight

_ROWS_PER_UNIT = MAX_PASSES * MAX_ROWS
_MIN_PRODUCTS = 65536  # multiplications that are worth a second thread

# A call's parameters: their places in the int64 array that its threads share. Strides are in elements.
(
    TICKET,
    X,
    X_STRIDE,
    WEIGHT,
    BIAS,  # 0 if there is none
    OUT,
    OUT_IS_FLOAT32,
    NUM_ROWS,
    IN_FEATURES,
    OUT_FEATURES,
    NUM_PANELS,
    PANEL_STRIDE,
    ACTIVATION,
    GATED,
    NUM_RANGES,
    RANGES,
    THREAD_NUMBER,
) = range(17)


def _prepare(shared: Any) -> None:
    parameters = int64_pointer(shared)
    open_ranges(int64_pointer(parameters[RANGES]), parameters[NUM_RANGES])


@numba.njit
def _finish_rows(parameters, shared, panel, first_row, count, tile):  # type: ignore[no-untyped-def]
    """Write a panel's results for `count` rows, whose sums `tile` holds."""
    bias, gated, out_features = parameters[BIAS], parameters[GATED], parameters[OUT_FEATURES]
    features_per_panel = PANEL // 2 if gated else PANEL
    first_feature = panel * features_per_panel
    for row in range(count):
        finish_row(
            shared,
            move(tile, row * PANEL),
            bias + panel * PANEL * 4 if bias != 0 else 0,
            parameters[ACTIVATION],
            gated,
            parameters[OUT],
            parameters[OUT_IS_FLOAT32],
            (first_row + row) * out_features + first_feature,
            min(features_per_panel, out_features - first_feature),
        )


@numba.njit
def _multiply_few_rows(parameters, shared, x, weight, group, tile):  # type: ignore[no-untyped-def]
    """All rows, which one pass is enough for, on a group of panels."""
    num_rows, stride = parameters[NUM_ROWS], parameters[PANEL_STRIDE]
    first_panel, end, step = group_of_panels(group, panels_together(num_rows), parameters[NUM_PANELS])
    for panel in range(first_panel, end, step):
        multiply_panels(
            x,
            parameters[X_STRIDE],
            num_rows,
            move(weight, panel * stride),
            stride,
            step,
            parameters[IN_FEATURES],
            tile,
            weight,
            0,
            tile,
            NOT_WIDENED,
            0,
        )
        for i in range(step):
            _finish_rows(parameters, shared, panel + i, 0, num_rows, move(tile, i * num_rows * PANEL))


@numba.njit
def _multiply_unit(  # type: ignore[no-untyped-def]
    parameters, shared, x, weight, unit, following, num_blocks, tile, wide, widens
):
    """A block of rows on a panel, in passes, while the panel of the unit `following` is brought; < 0: there is none.

    If the weights are of another type than the rows (`widens`), all passes go over one part of the panel after another,
    which the first of them widens.
    """
    depth, x_stride, stride = parameters[IN_FEATURES], parameters[X_STRIDE], parameters[PANEL_STRIDE]
    panel, block = divmod(unit, num_blocks)
    first_row, end = block * _ROWS_PER_UNIT, min((block + 1) * _ROWS_PER_UNIT, parameters[NUM_ROWS])
    num_passes = -(-(end - first_row) // MAX_ROWS)
    panel_weight = move(weight, panel * stride)
    next_panel = move(weight, following // num_blocks * stride)
    passes_ahead = min(num_passes, MAX_PASSES_AHEAD) if following >= 0 and num_passes > 1 else 0
    part = -(-2 * PANEL // max(passes_ahead, 1))  # of the next panel, for each pair of input features
    in_parts = widens and WIDE_DEPTH > 0 and num_passes > 1
    depth_at_once = WIDE_DEPTH if in_parts else depth
    for first in range(0, depth, depth_at_once):
        row, passes_left = first_row, num_passes
        while row < end:
            count = -(-(end - row) // passes_left)  # as even as can be
            ahead, step = panel_weight, 0
            if passes_left <= passes_ahead:
                pairs_before = (passes_ahead - passes_left) * (depth // 2) + first // 2
                ahead, step = move(next_panel, pairs_before * part), part
            use_of_wide, its_tile = NOT_WIDENED, tile
            if in_parts:
                use_of_wide = WIDENING if row == first_row else WIDENED
                its_tile = move(tile, (row - first_row) * PANEL)
            multiply_panels(
                move(x, row * x_stride + first),
                x_stride,
                count,
                move(panel_weight, first * PANEL),
                stride,
                1,
                min(depth_at_once, depth - first),
                its_tile,
                ahead,
                step,
                wide,
                use_of_wide,
                first,
            )
            if first + depth_at_once >= depth:
                _finish_rows(parameters, shared, panel, row, count, its_tile)
            row += count
            passes_left -= 1


@numba.njit
def _multiply_panels(shared, weight, widens):  # type: ignore[no-untyped-def]
    """As `_multiply`, on `weight`, which may be of another type than the rows."""
    parameters = int64_pointer(shared)
    x, tile, wide = pointer_to(parameters[X], shared), new_tile(), new_wide()
    num_blocks = -(-parameters[NUM_ROWS] // _ROWS_PER_UNIT)
    together = panels_together(parameters[NUM_ROWS])
    num_units = -(-parameters[NUM_PANELS] // together) * num_blocks
    ranges, num_ranges = int64_pointer(parameters[RANGES]), parameters[NUM_RANGES]
    thread = enter_ranges(ranges, parameters[THREAD_NUMBER])
    unit = take_unit(ranges, num_ranges, thread, num_units)
    while unit < num_units:
        following = take_unit(ranges, num_ranges, thread, num_units)
        if together > 1:
            _multiply_few_rows(parameters, shared, x, weight, unit, tile)
        else:
            ahead = following if following < num_units else -1
            _multiply_unit(parameters, shared, x, weight, unit, ahead, num_blocks, tile, wide, widens)
        unit = following


def _multiply(shared: Any) -> None:
    _multiply_panels(shared, pointer_to(int64_pointer(shared)[WEIGHT], shared), False)


def _multiply_bfloat16(shared: Any) -> None:
    _multiply_panels(shared, bfloat16_pointer(int64_pointer(shared)[WEIGHT]), True)


def _multiply_float16(shared: Any) -> None:
    _multiply_panels(shared, float16_pointer(int64_pointer(shared)[WEIGHT]), True)


def _multiply_tiles(shared: Any) -> None:
    parameters = int64_pointer(shared)
    num_rows, depth, x_stride = parameters[NUM_ROWS], parameters[IN_FEATURES], parameters[X_STRIDE]
    x, weight = pointer_to(parameters[X], shared), pointer_to(parameters[WEIGHT], shared)
    block_sums = new_block()
    num_blocks = -(-num_rows // ROWS_PER_BLOCK)
    num_units = parameters[NUM_PANELS] * num_blocks
    ranges, num_ranges = int64_pointer(parameters[RANGES]), parameters[NUM_RANGES]
    thread = enter_ranges(ranges, parameters[THREAD_NUMBER])
    gated, out_features = parameters[GATED], parameters[OUT_FEATURES]
    features_per_panel = PANEL // 2 if gated else PANEL
    unit = take_unit(ranges, num_ranges, thread, num_units)
    while unit < num_units:
        following = take_unit(ranges, num_ranges, thread, num_units)
        panel, block = divmod(unit, num_blocks)
        row = block * ROWS_PER_BLOCK
        count = min(ROWS_PER_BLOCK, num_rows - row)
        multiply_block(
            move(x, row * x_stride),
            x_stride,
            count,
            move(weight, panel * parameters[PANEL_STRIDE]),
            depth,
            block_sums,
            move(weight, following // num_blocks * parameters[PANEL_STRIDE]),
            following < num_units and following // num_blocks != panel,
        )
        width = min(features_per_panel, out_features - panel * features_per_panel)
        if is_common(parameters[BIAS], parameters[ACTIVATION], gated, parameters[OUT_IS_FLOAT32], width):
            out = parameters[OUT] + 2 * (row * out_features + panel * features_per_panel)
            finish_common(block_sums, count, gated, out, 2 * out_features)
        else:
            _finish_rows(parameters, shared, panel, row, count, block_sums)
        unit = following


WORKER = Worker(_multiply, _prepare)
WIDENING_WORKERS = {
    torch.bfloat16: Worker(_multiply_bfloat16, _prepare),
    torch.float16: Worker(_multiply_float16, _prepare),
}
"""For float32 rows on weights of 16 bits."""
TILES_WORKER = Worker(_multiply_tiles, _prepare)


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    activation: Activation | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    num_rows, depth = x.shape
    out = new_tensor((num_rows, weight.out_features), out_dtype)
    num_panels, num_threads = weight.data.shape[0], torch.get_num_threads()
    parameters = np.array(
        [
            *(0, x.data_ptr(), x.stride(0), weight.data.data_ptr(), 0 if bias is None else bias.data_ptr()),
            *(out.data_ptr(), out_dtype == torch.float32 != x.dtype, num_rows, depth, weight.out_features, num_panels),
            *(weight.data.stride(0), NO_ACTIVATION if activation is None else CODES[activation], weight.gated),
            *(num_threads, scratch(state_bytes(num_threads)), thread_number_address()),
        ],
        np.int64,
    )
    is_small = num_rows * num_panels * PANEL * depth < _MIN_PRODUCTS
    panels = Panels(weight.data.data_ptr(), num_panels, weight.data.stride(0) * weight.data.itemsize)
    in_tiles = x.dtype == torch.bfloat16 and depth % TILE_DEPTH == 0 and has_tiles()
    worker = TILES_WORKER if in_tiles else WORKER if weight.dtype == x.dtype else WIDENING_WORKERS[weight.dtype]
    worker.run(x.dtype, parameters, 1 if is_small else num_threads, panels)
    return out


# Of `embedding`.
_TOKENS, _TABLE, _ROWS, _NUM_TOKENS, _DEPTH, _STRIDE = range(1, 7)


@numba.njit
def _embed_rows(shared, table, is_paired):  # type: ignore[no-untyped-def]
    parameters = int64_pointer(shared)
    tokens, depth, rows = int64_pointer(parameters[_TOKENS]), parameters[_DEPTH], pointer_to(parameters[_ROWS], shared)
    token = take(parameters)
    while token < parameters[_NUM_TOKENS]:
        panel, column = divmod(tokens[token], PANEL)
        source, target = move(table, panel * parameters[_STRIDE]), move(rows, token * depth)
        for i in range(depth):
            place = (i // 2 * PANEL + column) * 2 + i % 2 if is_paired else i * PANEL + column
            write(target, i, read(source, place))
        token = take(parameters)


def _embed(shared: Any) -> None:
    _embed_rows(shared, pointer_to(int64_pointer(shared)[_TABLE], shared), False)


def _embed_float16(shared: Any) -> None:
    _embed_rows(shared, float16_pointer(int64_pointer(shared)[_TABLE]), False)


def _embed_bfloat16(shared: Any) -> None:
    _embed_rows(shared, bfloat16_pointer(int64_pointer(shared)[_TABLE]), True)


EMBEDDING_WORKERS = {
    torch.float32: Worker(_embed),
    torch.float16: Worker(_embed_float16),
    torch.bfloat16: Worker(_embed_bfloat16),
}
"""By the dtype of the table."""


def embedding(indices: torch.Tensor, weight: PackedWeight, out_dtype: torch.dtype) -> torch.Tensor:
    out = new_tensor((len(indices), weight.in_features), out_dtype)
    parameters = np.array(
        [
            *(0, indices.data_ptr(), weight.data.data_ptr(), out.data_ptr()),
            *(len(indices), weight.in_features, weight.data.stride(0)),
        ],
        np.int64,
    )
    EMBEDDING_WORKERS[weight.dtype].run(out_dtype, parameters, torch.get_num_threads() if len(indices) > 8 else 1)
    return out
