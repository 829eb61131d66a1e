"""Quantized linear layers on the CPU: one kernel quantizes the inputs, a second one multiplies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quire.kernels.cpu_activation import CODES, NO_ACTIVATION, multiply_row
from quire.kernels.cpu_elements import float32_pointer, int64_pointer, move, pointer_to, take, write
from quire.kernels.cpu_epilogue import finish_row
from quire.kernels.cpu_matrix import PANEL
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
from quire.kernels.cpu_workers import Worker, new_tensor

if TYPE_CHECKING:
    from quire.kernels.linear import Activation
    from quire.kernels.quantized_linear import QuantizedWeight

_GROUPS_PER_UNIT = 8
_FACTOR_BYTES = 8  # of a row's group: its scale and the sum of its inputs
_MIN_PRODUCTS = 65536  # multiplications that are worth a second thread
_ZERO_POINT = ZERO_POINTS[8]

# The parameters of both kernels: their places in the int64 array that the threads share. Strides are in elements.
(
    TICKET,  # the next unit of work
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
) = range(20)


def _quantize(shared: Any) -> None:
    parameters = int64_pointer(shared)
    num_rows, group_size, num_groups = parameters[NUM_ROWS], parameters[GROUP_SIZE], parameters[NUM_GROUPS]
    num_chunks = -(-num_groups // _GROUPS_PER_UNIT)
    unit = take(parameters)
    while unit < num_rows * num_chunks:
        row, chunk = divmod(unit, num_chunks)
        x = move(pointer_to(parameters[X], shared), row * parameters[X_STRIDE])
        for group in range(chunk * _GROUPS_PER_UNIT, min((chunk + 1) * _GROUPS_PER_UNIT, num_groups)):
            first, place = group * group_size, group * num_rows + row
            quantize_group(
                move(x, first),
                min(group_size, parameters[IN_FEATURES] - first),
                parameters[INPUTS] + place * group_size * GROUP_BYTES,
                parameters[FACTORS] + place * _FACTOR_BYTES,
            )
        unit = take(parameters)


def _multiply(shared: Any) -> None:
    parameters = int64_pointer(shared)
    num_rows, gated, out_features = parameters[NUM_ROWS], parameters[GATED], parameters[OUT_FEATURES]
    group_size, num_groups, bits = parameters[GROUP_SIZE], parameters[NUM_GROUPS], parameters[BITS]
    features_per_line = 32 // bits
    group_bytes = group_size // features_per_line * PANEL * 4
    features_per_panel = PANEL // 2 if gated else PANEL
    tile = new_tile()
    num_blocks = -(-num_rows // ROWS_PER_TILE)
    unit = take(parameters)
    while unit < parameters[NUM_PANELS] * num_blocks:
        panel, block = divmod(unit, num_blocks)
        first_row = block * ROWS_PER_TILE
        count = min(ROWS_PER_TILE, num_rows - first_row)
        weight = parameters[WEIGHT] + panel * parameters[PANEL_BYTES]
        for i in range(count * PANEL):
            tile[i] = 0.0
        for group in range(num_groups):
            size = min(group_size, parameters[IN_FEATURES] - group * group_size)
            scales = parameters[SCALES] + (panel * num_groups + group) * PANEL * 2
            for row in range(0, count, ROWS_TOGETHER):
                place = group * num_rows + first_row + row
                multiply_group(
                    bits,
                    parameters[INPUTS] + place * group_size * GROUP_BYTES,
                    parameters[FACTORS] + place * _FACTOR_BYTES,
                    min(ROWS_TOGETHER, count - row),
                    group_size,
                    -(-size // features_per_line),
                    weight + group * group_bytes,
                    row == ROWS_TOGETHER and count > 2 * ROWS_TOGETHER,
                    scales,
                    move(tile, row * PANEL),
                )
        first_feature = panel * features_per_panel
        for row in range(count):
            line = move(tile, row * PANEL)
            if bits == 8:
                multiply_row(line, move(float32_pointer(parameters[SCALES]), panel * PANEL), PANEL)
            finish_row(
                shared,
                line,
                parameters[BIAS] + panel * PANEL * 4 if parameters[BIAS] != 0 else 0,
                parameters[ACTIVATION],
                gated,
                parameters[OUT],
                parameters[OUT_IS_FLOAT32],
                (first_row + row) * out_features + first_feature,
                min(features_per_panel, out_features - first_feature),
            )
        unit = take(parameters)


QUANTIZE_WORKER = Worker(_quantize)
MULTIPLY_WORKER = Worker(_multiply)


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
    num_panels = weight.data.shape[0]
    parameters = np.array(
        [
            *(0, x.data_ptr(), x.stride(0), inputs.data_ptr(), factors),
            *(num_rows, depth, group_size, num_groups, weight.bits, weight.data.data_ptr(), weight.scales.data_ptr()),
            *(0 if bias is None else bias.data_ptr(), out.data_ptr(), out_dtype == torch.float32 != x.dtype),
            *(weight.out_features, num_panels, weight.data.stride(0)),
            *(NO_ACTIVATION if activation is None else CODES[activation], weight.gated),
        ],
        np.int64,
    )
    is_small = num_rows * num_panels * PANEL * depth < _MIN_PRODUCTS
    for_products = parameters.copy()  # each kernel counts its own tickets
    QUANTIZE_WORKER.run(x.dtype, parameters, torch.get_num_threads() if num_rows * depth > _MIN_PRODUCTS else 1)
    MULTIPLY_WORKER.run(x.dtype, for_products, 1 if is_small else torch.get_num_threads())
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
