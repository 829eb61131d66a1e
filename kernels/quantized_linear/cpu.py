"""Quantized linear layers on the CPU: one kernel quantizes the inputs, a second one multiplies.

Of few rows each thread quantizes all inputs for itself, which takes less than waiting for the others: the first kernel
has nothing to do then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch

from quire.kernels.cpu_activation import CODES, NO_ACTIVATION, multiply_row
from quire.kernels.cpu_elements import float32_pointer, int64_pointer, move, pointer_to, take, write
from quire.kernels.cpu_epilogue import finish_row
from quire.kernels.cpu_matrix import PANEL, group_of_panels, panels_together
from quire.kernels.cpu_quantized import (
    GROUP_BYTES,
    ROWS_PER_TILE,
    ROWS_TOGETHER,
    ZERO_POINTS,
    byte_at,
    multiply_group,
    new_tile,
    quantize_group,
)
from quire.kernels.cpu_ranges import Panels, enter_ranges, open_ranges, state_bytes, take_unit
from quire.kernels.cpu_workers import Worker, new_tensor, scratch, thread_number_address

if TYPE_CHECKING:
    from quire.kernels.linear import Activation
    from quire.kernels.quantized_linear import QuantizedWeight

_OWN_ROWS = 3  # so many at most are quantized by each thread
_GROUPS_PER_UNIT = 8
_FACTOR_BYTES = 8  # of a row's group: its scale and the sum of its inputs
_MIN_PRODUCTS = 65536  # multiplications that are worth a second thread
_ZERO_POINT = ZERO_POINTS[8]

# The parameters of both kernels: their places in the int64 array that the threads share. Strides are in elements.
(
    TICKET,  # the next unit of the first kernel
    X,
    X_STRIDE,
    INPUTS,  # [num_groups, num_rows, group_size * GROUP_BYTES] bytes: the quantized x
    FACTORS,  # [num_groups, num_rows, 2] words
    NUM_ROWS,
    IN_FEATURES,
    GROUP_SIZE,
    NUM_GROUPS,
    BITS,
    WEIGHT,
    SCALES,
    BIAS,  # 0 if there is none
    OUT,
    OUT_IS_FLOAT32,
    OUT_FEATURES,
    NUM_PANELS,
    PANEL_BYTES,
    ACTIVATION,
    GATED,
    NUM_RANGES,
    RANGES,  # the second kernel's work
    OWN,  # as INPUTS and FACTORS, for _OWN_ROWS rows and each thread
    OWN_BYTES,  # of each thread
    THREAD_NUMBER,
) = range(25)


def _prepare_quantize(shared: Any) -> None:
    parameters = int64_pointer(shared)
    if parameters[NUM_ROWS] <= _OWN_ROWS:
        parameters[TICKET] = parameters[NUM_ROWS] * parameters[NUM_GROUPS]  # all are taken


@numba.njit
def _quantize_groups(parameters, shared, row, first_group, last_group, inputs, factors):  # type: ignore[no-untyped-def]
    """The groups [first_group, last_group) of a row of x."""
    group_size = parameters[GROUP_SIZE]
    x = move(pointer_to(parameters[X], shared), row * parameters[X_STRIDE])
    for group in range(first_group, last_group):
        first, place = group * group_size, group * parameters[NUM_ROWS] + row
        quantize_group(
            move(x, first),
            min(group_size, parameters[IN_FEATURES] - first),
            inputs + place * group_size * GROUP_BYTES,
            factors + place * _FACTOR_BYTES,
        )


def _quantize(shared: Any) -> None:
    parameters = int64_pointer(shared)
    num_groups = parameters[NUM_GROUPS]
    num_chunks = -(-num_groups // _GROUPS_PER_UNIT)
    unit = take(parameters)
    while unit < parameters[NUM_ROWS] * num_chunks:
        row, chunk = divmod(unit, num_chunks)
        first, last = chunk * _GROUPS_PER_UNIT, min((chunk + 1) * _GROUPS_PER_UNIT, num_groups)
        _quantize_groups(parameters, shared, row, first, last, parameters[INPUTS], parameters[FACTORS])
        unit = take(parameters)


@numba.njit
def _multiply_tile(  # type: ignore[no-untyped-def]
    parameters, panel, num_panels, first_row, count, inputs, factors, tile
):
    """tile[p, row] = the sums of panel `panel` + p for `count` rows from `first_row`; several panels: for all rows."""
    num_rows, num_groups, bits = parameters[NUM_ROWS], parameters[NUM_GROUPS], parameters[BITS]
    depth, group_size, scales = parameters[IN_FEATURES], parameters[GROUP_SIZE], parameters[SCALES]
    features_per_line = 32 // bits
    group_bytes = group_size // features_per_line * PANEL * 4
    weight = parameters[WEIGHT] + panel * parameters[PANEL_BYTES]
    for i in range(num_panels * count * PANEL):
        tile[i] = 0.0
    for group in range(num_groups):
        size = min(group_size, depth - group * group_size)
        for row in range(0, count, ROWS_TOGETHER):
            place = group * num_rows + first_row + row
            multiply_group(
                bits,
                inputs + place * group_size * GROUP_BYTES,
                factors + place * _FACTOR_BYTES,
                min(ROWS_TOGETHER, count - row),
                group_size,
                -(-size // features_per_line),
                weight + group * group_bytes,
                row == ROWS_TOGETHER and count > 2 * ROWS_TOGETHER,
                scales + (panel * num_groups + group) * PANEL * 2,
                num_panels,
                parameters[PANEL_BYTES],
                num_groups * PANEL * 2,
                move(tile, row * PANEL),
            )
    if bits == 8:
        for line in range(num_panels * count):
            its_scales = move(float32_pointer(scales), (panel + line // count) * PANEL)
            multiply_row(move(tile, line * PANEL), its_scales, PANEL)


def _prepare_multiply(shared: Any) -> None:
    parameters = int64_pointer(shared)
    open_ranges(int64_pointer(parameters[RANGES]), parameters[NUM_RANGES])


def _multiply(shared: Any) -> None:
    parameters = int64_pointer(shared)
    num_rows, gated, out_features = parameters[NUM_ROWS], parameters[GATED], parameters[OUT_FEATURES]
    features_per_panel = PANEL // 2 if gated else PANEL
    ranges, num_ranges = int64_pointer(parameters[RANGES]), parameters[NUM_RANGES]
    thread = enter_ranges(ranges, parameters[THREAD_NUMBER])
    inputs, factors = parameters[INPUTS], parameters[FACTORS]
    if num_rows <= _OWN_ROWS:
        num_groups = parameters[NUM_GROUPS]
        inputs = parameters[OWN] + thread * parameters[OWN_BYTES]
        factors = inputs + num_rows * num_groups * parameters[GROUP_SIZE] * GROUP_BYTES
        for row in range(num_rows):
            _quantize_groups(parameters, shared, row, 0, num_groups, inputs, factors)
    tile = new_tile()
    num_blocks = -(-num_rows // ROWS_PER_TILE)
    together = panels_together(num_rows)
    num_units = -(-parameters[NUM_PANELS] // together) * num_blocks
    unit = take_unit(ranges, num_ranges, thread, num_units)
    while unit < num_units:
        group, block = divmod(unit, num_blocks)
        first_row = block * ROWS_PER_TILE
        count = min(ROWS_PER_TILE, num_rows - first_row)
        first_panel, end, step = group_of_panels(group, together, parameters[NUM_PANELS])
        for tile_panel in range(first_panel, end, step):
            _multiply_tile(parameters, tile_panel, step, first_row, count, inputs, factors, tile)
            for line in range(step * count):
                panel, row = tile_panel + line // count, first_row + line % count
                first_feature = panel * features_per_panel
                finish_row(
                    shared,
                    move(tile, line * PANEL),
                    parameters[BIAS] + panel * PANEL * 4 if parameters[BIAS] != 0 else 0,
                    parameters[ACTIVATION],
                    gated,
                    parameters[OUT],
                    parameters[OUT_IS_FLOAT32],
                    row * out_features + first_feature,
                    min(features_per_panel, out_features - first_feature),
                )
        unit = take_unit(ranges, num_ranges, thread, num_units)


QUANTIZE_WORKER = Worker(_quantize, _prepare_quantize)
MULTIPLY_WORKER = Worker(_multiply, _prepare_multiply)


def quantized_linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    activation: Activation | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    num_rows, depth = x.shape
    group_size, num_groups = weight.group_size, weight.num_groups
    # One kernel's result and the other's input, so not scratch memory, which is only good within one kernel.
    inputs = new_tensor((num_rows, num_groups * (group_size * GROUP_BYTES + _FACTOR_BYTES)), torch.uint8)
    factors = inputs.data_ptr() + num_rows * num_groups * group_size * GROUP_BYTES
    out = new_tensor((num_rows, weight.out_features), out_dtype)
    num_panels, num_threads = weight.data.shape[0], torch.get_num_threads()
    own_bytes = -(-_OWN_ROWS * num_groups * (group_size * GROUP_BYTES + _FACTOR_BYTES) // 64) * 64
    ranges = scratch(state_bytes(num_threads) + num_threads * own_bytes)
    parameters = np.array(
        [
            *(0, x.data_ptr(), x.stride(0), inputs.data_ptr(), factors),
            *(num_rows, depth, group_size, num_groups, weight.bits, weight.data.data_ptr(), weight.scales.data_ptr()),
            *(0 if bias is None else bias.data_ptr(), out.data_ptr(), out_dtype == torch.float32 != x.dtype),
            *(weight.out_features, num_panels, weight.data.stride(0)),
            *(NO_ACTIVATION if activation is None else CODES[activation], weight.gated),
            *(num_threads, ranges, ranges + state_bytes(num_threads), own_bytes, thread_number_address()),
        ],
        np.int64,
    )
    is_small = num_rows * num_panels * PANEL * depth < _MIN_PRODUCTS
    for_products = parameters.copy()  # each kernel has parameters of its own
    QUANTIZE_WORKER.run(x.dtype, parameters, num_threads if num_rows * depth > _MIN_PRODUCTS else 1)
    panels = Panels(weight.data.data_ptr(), num_panels, weight.data.stride(0))
    MULTIPLY_WORKER.run(x.dtype, for_products, 1 if is_small else num_threads, panels)
    return out


# Of `embedding`.
_TOKENS, _TABLE, _TABLE_SCALES, _ROWS, _NUM_TOKENS, _DEPTH, _STRIDE = range(1, 8)


def _embed(shared: Any) -> None:
    parameters = int64_pointer(shared)
    tokens, depth = int64_pointer(parameters[_TOKENS]), parameters[_DEPTH]
    rows = pointer_to(parameters[_ROWS], shared)
    scales = float32_pointer(parameters[_TABLE_SCALES])
    token = take(parameters)
    while token < parameters[_NUM_TOKENS]:
        panel, column = divmod(tokens[token], PANEL)
        source, target = parameters[_TABLE] + panel * parameters[_STRIDE], move(rows, token * depth)
        for i in range(depth):
            number = byte_at(source, (i // 4 * PANEL + column) * 4 + i % 4) - _ZERO_POINT
            write(target, i, np.float32(number) * scales[tokens[token]])
        token = take(parameters)


EMBEDDING_WORKER = Worker(_embed)


def embedding(indices: torch.Tensor, weight: QuantizedWeight, out_dtype: torch.dtype) -> torch.Tensor:
    out = new_tensor((len(indices), weight.in_features), out_dtype)
    parameters = np.array(
        [
            *(0, indices.data_ptr(), weight.data.data_ptr(), weight.scales.data_ptr(), out.data_ptr()),
            *(len(indices), weight.in_features, weight.data.stride(0)),
        ],
        np.int64,
    )
    EMBEDDING_WORKER.run(out_dtype, parameters, torch.get_num_threads() if len(indices) > 8 else 1)
    return out
