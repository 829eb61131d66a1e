"""The most probable token on the CPU: one pass over each row."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from quire.kernels import cpu_lanes as lanes
from quire.kernels.cpu_elements import (
    I32,
    I64,
    Builder,
    Kinds,
    Value,
    emitted,
    float32_pointer,
    int64_pointer,
    move,
    take,
)
from quire.kernels.cpu_lanes import LANES, at, integer, load
from quire.kernels.cpu_workers import Worker, new_tensor, row_threads

# A call's parameters: their places in the int64 array that its threads share.
TICKET, LOGITS, STRIDE, NUM_ROWS, VOCAB_SIZE, OUT = range(6)

_INDICES = ir.VectorType(I32, LANES)


@emitted(lambda *_: types.int64)
def _best_of_vectors(builder: Builder, kinds: Kinds, row: Value, count: Value, values: Value, places: Value) -> Value:
    """The largest number of each lane and where it is, of `count` (a multiple of LANES) numbers; -1 if any is NaN.

    values: float32 [LANES]; places: int64 [LANES], the first of those that tie within a lane.
    """
    best = lanes.Sum(builder, lanes.constant(-np.inf))
    where = cgutils.alloca_once_value(builder, ir.Constant(_INDICES, [0] * LANES))
    nan_mask = ir.VectorType(ir.IntType(1), LANES)
    tainted = cgutils.alloca_once_value(builder, ir.Constant(nan_mask, [0] * LANES))
    first = ir.Constant(_INDICES, list(range(LANES)))
    with cgutils.for_range_slice(builder, integer(0), count, integer(LANES), I64) as (index, _):
        vector = load(builder, at(builder, row, index))
        is_larger = builder.fcmp_ordered(">", vector, best.get(builder))
        best.set(builder, builder.select(is_larger, vector, best.get(builder)))
        here = builder.add(lanes.splat(builder, builder.trunc(index, I32)), first)
        builder.store(builder.select(is_larger, here, builder.load(where)), where)
        is_nan = builder.fcmp_unordered("uno", vector, vector)
        builder.store(builder.or_(builder.load(tainted), is_nan), tainted)
    lanes.store(builder, best.get(builder), values)
    for lane in range(LANES):
        place = builder.extract_element(builder.load(where), ir.Constant(I32, lane))
        builder.store(builder.sext(place, I64), at(builder, places, lane))
    bits = builder.bitcast(builder.load(tainted), ir.IntType(LANES))
    return builder.select(builder.icmp_unsigned("==", bits, bits.type(0)), integer(0), integer(-1))


@emitted(lambda: types.CPointer(types.float32))
def _new_values(builder: Builder, kinds: Kinds) -> Value:
    return cgutils.alloca_once(builder, ir.FloatType(), size=LANES)


@emitted(lambda: types.CPointer(types.int64))
def _new_places(builder: Builder, kinds: Kinds) -> Value:
    return cgutils.alloca_once(builder, I64, size=LANES)


def _find(shared: Any) -> None:
    parameters = int64_pointer(shared)
    vocab_size, out = parameters[VOCAB_SIZE], int64_pointer(parameters[OUT])
    whole = vocab_size // LANES * LANES
    values, places = _new_values(), _new_places()
    row = take(parameters)
    while row < parameters[NUM_ROWS]:
        logits = move(float32_pointer(parameters[LOGITS]), row * parameters[STRIDE])
        is_nan = _best_of_vectors(logits, whole, values, places) < 0
        best, place = np.float32(-np.inf), 0
        for lane in range(LANES):
            if values[lane] > best or (values[lane] == best and places[lane] < place):
                best, place = values[lane], places[lane]
        for index in range(whole, vocab_size):
            is_nan = is_nan or logits[index] != logits[index]
            if logits[index] > best:
                best, place = logits[index], index
        out[row] = -1 if is_nan or not -np.inf < best < np.inf else place
        row = take(parameters)


WORKER = Worker(_find)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    num_rows, vocab_size = logits.shape
    out = new_tensor((num_rows,), torch.int64)
    parameters = np.array([0, logits.data_ptr(), logits.stride(0), num_rows, vocab_size, out.data_ptr()], np.int64)
    WORKER.run(torch.float32, parameters, row_threads(logits.numel()) if num_rows > 1 else 1)
    return out
