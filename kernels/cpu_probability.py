"""Rows of logits on the CPU: in blocks with their maxima, as float64 masses, and the selection of a threshold.

A block whose maximum lies under a threshold is never looked at again, so what a filter costs goes with what it keeps.
A row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from quire.kernels import cpu_lanes as lanes
from quire.kernels.cpu_elements import I32, I64, Builder, Kinds, Value, emitted, int32_pointer, move, read
from quire.kernels.cpu_lanes import LANES, LOWEST, at, integer, load, store

BLOCK = 64
"""Logits that share a maximum."""

NUM_BUCKETS = 1024

_F64 = ir.DoubleType()
_VECTOR64, _INTEGERS64 = ir.VectorType(_F64, LANES), ir.VectorType(I64, LANES)
_ROUND64 = 6755399441055744.0  # 1.5 * 2**52: adding it leaves the nearest integer in the low bits of the sum
_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
_DEGREE = 12  # of the Taylor polynomial of exp on [-ln 2 / 2, ln 2 / 2]: relative error 2e-16


@numba.njit
def num_blocks_of(count: int) -> int:
    return -(-count // BLOCK)


def _constant64(value: float) -> Value:
    return ir.Constant(_VECTOR64, [value] * LANES)


def _multiply_add64(builder: Builder, x: Value, y: Value, z: Value) -> Value:
    function_type = ir.FunctionType(_VECTOR64, [_VECTOR64] * 3)
    name = f"llvm.fmuladd.v{LANES}f64"
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [x, y, z])


def _exp64(builder: Builder, exponent: Value) -> Value:
    """exp in float64 for exponents <= 0; exactly 1 for 0, and 0 below -708, where float64 has no normal number."""
    tiny = builder.fcmp_ordered("<", exponent, _constant64(-708.0))
    exponent = builder.select(tiny, _constant64(-708.0), exponent)
    shifted = _multiply_add64(builder, exponent, _constant64(math.log2(math.e)), _constant64(_ROUND64))
    whole = builder.fsub(shifted, _constant64(_ROUND64))
    rest = _multiply_add64(builder, whole, _constant64(-_LN2_HIGH), exponent)
    rest = _multiply_add64(builder, whole, _constant64(-_LN2_LOW), rest)
    power = _constant64(1.0 / math.factorial(_DEGREE))
    for degree in range(_DEGREE - 1, -1, -1):
        power = _multiply_add64(builder, power, rest, _constant64(1.0 / math.factorial(degree)))
    bits = builder.shl(builder.bitcast(shifted, _INTEGERS64), ir.Constant(_INTEGERS64, [52] * LANES))
    bits = builder.add(bits, ir.Constant(_INTEGERS64, [1023 << 52] * LANES))
    power = builder.fmul(power, builder.bitcast(bits, _VECTOR64))
    return builder.select(tiny, _constant64(0.0), power)


def _sum64(builder: Builder, vector: Value) -> Value:
    size = LANES
    while size > 1:
        size //= 2
        low = lanes.shuffle(builder, vector, vector, list(range(size)))
        high = lanes.shuffle(builder, vector, vector, list(range(size, 2 * size)))
        vector = builder.fadd(low, high)
    return lanes.first_lane(builder, vector)


@emitted(lambda *_: types.float32)
def scale_row(
    builder: Builder, kinds: Kinds, source: Value, count: Value, divisor: Value, target: Value, maxima: Value
) -> Value:
    """target = source / divisor, with minus infinity for NaN and up to a whole block; maxima[b] is that of block b.

    Returns the largest of all.
    """
    divisors, lowest = lanes.splat(builder, divisor), lanes.constant(-math.inf)
    largest = lanes.Sum(builder, lowest)
    lane_indices = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))

    def block(first: Value, is_whole: bool) -> None:
        best = lowest
        for offset in range(0, BLOCK, LANES):
            index = builder.add(first, integer(offset))
            mask = None
            if not is_whole:
                mask = builder.icmp_signed("<", lane_indices, lanes.splat(builder, builder.sub(count, index)))
            vector = builder.fdiv(load(builder, at(builder, source, index), mask=mask), divisors)
            if mask is not None:
                vector = builder.select(mask, vector, lowest)
            vector = lanes.larger(builder, vector, lowest)
            store(builder, vector, at(builder, target, index))
            best = lanes.larger(builder, vector, best)
        largest.set(builder, lanes.larger(builder, best, largest.get(builder)))
        builder.store(lanes.max_lane(builder, best), at(builder, maxima, builder.sdiv(first, integer(BLOCK))))

    whole = builder.and_(count, integer(-BLOCK))
    with cgutils.for_range_slice(builder, integer(0), whole, integer(BLOCK), I64) as (first, _):
        block(first, True)
    with builder.if_then(builder.icmp_signed("<", whole, count)):
        block(whole, False)
    return lanes.max_lane(builder, largest.get(builder))


@emitted(lambda *_: types.float64)
def exp_block(builder: Builder, kinds: Kinds, block: Value, top: Value, threshold: Value, masses: Value) -> Value:
    """masses[i] = exp(block[i] - top) in float64, 0 where block[i] < threshold; returns their sum. block[i] <= top."""
    thresholds = lanes.splat(builder, threshold)
    tops = builder.fpext(lanes.splat(builder, top), _VECTOR64)
    total = _constant64(0.0)
    for offset in range(0, BLOCK, LANES):
        vector = load(builder, at(builder, block, offset))
        mass = _exp64(builder, builder.fsub(builder.fpext(vector, _VECTOR64), tops))
        mass = builder.select(builder.fcmp_ordered(">=", vector, thresholds), mass, _constant64(0.0))
        target = builder.bitcast(at(builder, masses, offset), _VECTOR64.as_pointer())
        builder.store(mass, target, align=8)
        total = builder.fadd(total, mass)
    return _sum64(builder, total)


@emitted(lambda *_: types.int64)
def bucket_block(
    builder: Builder, kinds: Kinds, block: Value, top: Value, scale: Value, low: Value, buckets: Value
) -> Value:
    """buckets[i] = int32 of (top - block[i]) * scale, at most NUM_BUCKETS - 1; returns bit i where block[i] >= low."""
    integers = ir.VectorType(I32, LANES)
    tops, scales, lows = (lanes.splat(builder, scalar) for scalar in (top, scale, low))
    last = lanes.constant(NUM_BUCKETS - 1.0)
    kept_bits = integer(0)
    for offset in range(0, BLOCK, LANES):
        vector = load(builder, at(builder, block, offset))
        place = builder.fmul(builder.fsub(tops, vector), scales)
        place = builder.select(builder.fcmp_ordered("<", place, last), place, last)
        store(builder, builder.fptosi(place, integers), at(builder, buckets, offset))
        kept = builder.bitcast(builder.fcmp_ordered(">=", vector, lows), ir.IntType(LANES))
        kept_bits = builder.or_(kept_bits, builder.shl(builder.zext(kept, I64), integer(offset)))
    return kept_bits


@emitted(lambda *_: types.int64)
def _lowest_bit(builder: Builder, kinds: Kinds, bits: Value) -> Value:
    """The place of the lowest bit that is set; there must be one."""
    return builder.cttz(bits, ir.Constant(ir.IntType(1), 1))


@numba.njit
def _sift_down(heap, start, size):  # type: ignore[no-untyped-def]
    value = heap[start]
    parent = start
    while 2 * parent + 1 < size:
        child = 2 * parent + 1
        if child + 1 < size and heap[child + 1] > heap[child]:
            child += 1
        if not heap[child] > value:
            break
        heap[parent] = heap[child]
        parent = child
    heap[parent] = value


@numba.njit
def heapify(heap, size):  # type: ignore[no-untyped-def]
    """Put the largest of `size` numbers first and keep it there under `pop`."""
    for start in range(size // 2 - 1, -1, -1):
        _sift_down(heap, start, size)


@numba.njit
def pop(heap, size):  # type: ignore[no-untyped-def]
    """The largest of `size` numbers, which become one fewer."""
    largest = heap[0]
    heap[0] = heap[size - 1]
    _sift_down(heap, 0, size - 1)
    return largest


@numba.njit
def kth_maximum(maxima, num_blocks, k, heap):  # type: ignore[no-untyped-def]
    """A lower bound of the k-th largest logit: k blocks have one as large. LOWEST if there are fewer blocks."""
    if k > num_blocks:
        return np.float32(LOWEST)
    for block in range(num_blocks):
        heap[block] = maxima[block]
    heapify(heap, num_blocks)
    for size in range(num_blocks, num_blocks - k + 1, -1):
        pop(heap, size)
    return max(read(heap, 0), np.float32(LOWEST))


@numba.njit
def select_threshold(row, maxima, num_blocks, top, low, is_mass, target, masses, weights, heap):  # type: ignore[no-untyped-def]
    """The largest logit t >= low such that the logits >= t have at least `target` of weight; `low` if there is none.

    A weight is exp(logit - top) if `is_mass`, else 1. A histogram finds the bucket that t lies in, a heap orders that
    bucket alone. `masses` has room for two blocks, `weights` for NUM_BUCKETS numbers, `heap` for the row.
    """
    scale = np.float32(NUM_BUCKETS - 1) / max(min(top - low, np.float32(64.0)), np.float32(1e-6))
    buckets = int32_pointer(move(masses, BLOCK))
    for bucket in range(NUM_BUCKETS):
        weights[bucket] = 0.0
    for i in range(BLOCK):
        masses[i] = 1.0
    for block in range(num_blocks):
        if maxima[block] >= low:
            kept = bucket_block(move(row, block * BLOCK), top, scale, low, buckets)
            if is_mass:
                exp_block(move(row, block * BLOCK), top, low, masses)
            while kept != 0:
                i = _lowest_bit(kept)
                kept &= kept - 1
                weights[buckets[i]] += masses[i]
    weight = 0.0
    boundary = 0
    while boundary < NUM_BUCKETS - 1 and weight + weights[boundary] < target:
        weight += weights[boundary]
        boundary += 1
    size = 0
    for block in range(num_blocks):
        if maxima[block] >= low:
            kept = bucket_block(move(row, block * BLOCK), top, scale, low, buckets)
            while kept != 0:
                i = _lowest_bit(kept)
                kept &= kept - 1
                if buckets[i] == boundary:
                    heap[size] = row[block * BLOCK + i]
                    size += 1
    heapify(heap, size)
    threshold = low
    one = 1.0
    while size > 0 and weight < target:
        largest = pop(heap, size)
        if is_mass and largest != threshold:
            one = math.exp(np.float64(largest) - np.float64(top))
        threshold = largest
        weight += one
        size -= 1
    return threshold if weight >= target else low
