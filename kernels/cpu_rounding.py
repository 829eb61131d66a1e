"""Weights to 4 bits: for each group the scale with the least squared error among several that clip more or less."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from quire.kernels.cpu_elements import float32_pointer, int64_pointer, move, take
from quire.kernels.cpu_workers import Worker

_NUM_CLIPPINGS = 9
_FIRST_CLIPPING, _CLIPPING_STEP = 0.75, 0.05  # of the scale that the largest magnitude asks for

# The parameters: their places in the int64 array that the threads share.
_WEIGHT, _SCALES, _NUM_ROWS, _DEPTH, _GROUP_SIZE = range(1, 6)

# Weights are finite, and in which order their squares are added decides at most between scales that are equally good.
_fast = numba.njit(fastmath=True)


@_fast
def _to_step(value: Any, inverse: Any) -> Any:
    return min(max(np.rint(value * inverse), np.float32(-8)), np.float32(7))


@_fast
def _largest(group: Any, size: int) -> Any:
    """The element of the largest magnitude."""
    low = high = group[0]
    for i in range(1, size):
        low, high = min(low, group[i]), max(high, group[i])
    return low if -low > high else high


@_fast
def _products(group: Any, size: int, inverse: Any) -> Any:
    """The sum of the weights times their steps, and that of the squared steps."""
    along, squares = np.float32(0), np.float32(0)
    for i in range(size):
        step = _to_step(group[i], inverse)
        along += group[i] * step
        squares += step * step
    return along, squares


@_fast
def _round_group(group: Any, size: int) -> Any:
    """group[:size] becomes its steps plus 8; returns the scale.

    The largest magnitude is taken as negative, since the steps reach further there: the scale has the sign for that.
    For given steps q the best scale is w.q / q.q, which leaves a squared error of w.w - (w.q)^2 / q.q.
    """
    best_gain, best_scale, best_inverse = np.float32(0), np.float32(0), np.float32(0)
    largest = _largest(group, size)
    if abs(largest) > np.float32(1e-30):
        for clipping in range(_NUM_CLIPPINGS):
            share = np.float32(_FIRST_CLIPPING + clipping * _CLIPPING_STEP)
            inverse = np.float32(-8) / (largest * share)
            along, squares = _products(group, size, inverse)
            gain = along / squares * along
            if gain > best_gain:
                best_gain, best_scale, best_inverse = gain, along / squares, inverse
    for i in range(size):
        group[i] = _to_step(group[i], best_inverse) + np.float32(8)
    return best_scale


def _round(shared: Any) -> None:
    parameters = int64_pointer(shared)
    depth, group_size = parameters[_DEPTH], parameters[_GROUP_SIZE]
    num_groups = -(-depth // group_size)
    scales = float32_pointer(parameters[_SCALES])
    row = take(parameters)
    while row < parameters[_NUM_ROWS]:
        weights = move(float32_pointer(parameters[_WEIGHT]), row * depth)
        for group in range(num_groups):
            first = group * group_size
            scales[row * num_groups + group] = _round_group(move(weights, first), min(group_size, depth - first))
        row = take(parameters)


WORKER = Worker(_round)


def round_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Scales [N, G] of a contiguous float32 weight [N, K], whose elements become steps from 0 to 15."""
    num_rows, depth = weight.shape
    scales = torch.empty((num_rows, -(-depth // group_size)))
    parameters = np.array([0, weight.data_ptr(), scales.data_ptr(), num_rows, depth, group_size], np.int64)
    WORKER.run(torch.float32, parameters, torch.get_num_threads())
    return scales
