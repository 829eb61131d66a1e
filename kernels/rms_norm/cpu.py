"""RMS norm on the CPU: one pass for the sum of squares, one for the result."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quire.kernels.cpu_elements import float64_pointer, int64_pointer, move, pointer_to, take
from quire.kernels.cpu_norm import add_to_row, scale_row, sum_of_squares
from quire.kernels.cpu_workers import ALONE, Worker, new_tensor, row_threads

_ROWS_PER_UNIT = 8

# A call's parameters: their places in the int64 array that its threads share. Strides are in elements.
(
    TICKET,  # the next unit of rows
    X,
    X_STRIDE,
    X_HEAD_STRIDE,
    NUM_HEADS,
    RESIDUAL,  # 0 if there is none
    RESIDUAL_STRIDE,
    OUT,
    WEIGHT,
    NUM_ROWS,
    DIM,
    EPSILON,  # as float64
) = range(12)


def _prepare(shared: Any) -> None:
    parameters = int64_pointer(shared)
    if parameters[NUM_ROWS] <= _ROWS_PER_UNIT:
        parameters[TICKET] = ALONE


def _normalise(shared: Any) -> None:
    parameters = int64_pointer(shared)
    num_rows, dim, num_heads = parameters[NUM_ROWS], parameters[DIM], parameters[NUM_HEADS]
    epsilon = np.float32(float64_pointer(shared)[EPSILON])
    weight = pointer_to(parameters[WEIGHT], shared)
    first_row = take(parameters) * _ROWS_PER_UNIT
    while first_row < num_rows:
        for row in range(first_row, min(first_row + _ROWS_PER_UNIT, num_rows)):
            token, head = divmod(row, num_heads)
            source = pointer_to(parameters[X], shared)
            source = move(source, token * parameters[X_STRIDE] + head * parameters[X_HEAD_STRIDE])
            if parameters[RESIDUAL] != 0:
                residual = move(pointer_to(parameters[RESIDUAL], shared), row * parameters[RESIDUAL_STRIDE])
                add_to_row(residual, source, dim)
                source = residual
            out = move(pointer_to(parameters[OUT], shared), row * dim)
            factor = np.float32(1.0) / np.sqrt(sum_of_squares(source, dim) / np.float32(dim) + epsilon)
            scale_row(source, factor, weight, out, dim)
        first_row = take(parameters) * _ROWS_PER_UNIT


WORKER = Worker(_normalise, _prepare)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> torch.Tensor:
    out = new_tensor(tuple(x.shape), x.dtype)
    dim = x.shape[-1]
    if x.dim() == 3:
        num_heads, head_stride = x.shape[1], x.stride(1)
    else:
        num_heads, head_stride = 1, 0
    num_rows = x.shape[0] * num_heads
    residual_fields = (0, 0) if residual is None else (residual.data_ptr(), residual.stride(0))
    parameters = np.array(
        [
            *(0, x.data_ptr(), x.stride(0), head_stride, num_heads, *residual_fields),
            *(out.data_ptr(), weight.data_ptr(), num_rows, dim, 0),
        ],
        np.int64,
    )
    parameters.view(np.float64)[EPSILON] = eps
    WORKER.run(x.dtype, parameters, row_threads(num_rows * dim))
    return out
