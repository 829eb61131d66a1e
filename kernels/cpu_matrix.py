"""Matrix products with packed weights: the inner loops of the CPU's linear layers, as LLVM IR.

A weight [N, K] is packed into panels of PANEL output features: a panel holds, for one input feature after another (for
bfloat16 one pair after another), the PANEL weights that it is multiplied with. So a panel is read from its first byte
to its last, once for up to MAX_ROWS rows, whose sums stay in registers meanwhile. Each sum is made in the order of the
input features whatever rows stand beside it: a row's result never depends on the batch.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils

from quire.kernels import cpu_lanes as lanes
from quire.kernels.cpu_elements import (
    BFLOAT16,
    F32,
    I32,
    I64,
    Builder,
    Kinds,
    Value,
    emitted,
    has_feature,
    nothing,
    widen,
)
from quire.kernels.cpu_lanes import LANES, at, integer, load, row_at, store

_NUM_VECTORS = 4 if LANES == 16 else 2
PANEL = _NUM_VECTORS * LANES
"""Output features that are computed together."""
MAX_ROWS = 6
"""Rows that share a pass over a panel: with the panel's vectors their sums fill the registers."""

MAX_PASSES_AHEAD = 4
"""Passes over a panel during which another one is brought into the cache, at most: an equal part in each."""
_MIN_ROWS_AHEAD = 3  # with fewer rows a pass waits for its own panel

_HAS_PAIR_PRODUCT = has_feature("avx512bf16")
_VECTOR, _WORDS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


def _pair_products(builder: Builder, total: Value, x: Value, weights: Value) -> Value:
    """total + x0 * w0 + x1 * w1 in each lane, of two bfloat16 in each of the words x and weights."""
    if _HAS_PAIR_PRODUCT:
        pairs = ir.VectorType(ir.BFloatType(), 2 * LANES) if hasattr(ir, "BFloatType") else _WORDS
        arguments = [total, builder.bitcast(x, pairs), builder.bitcast(weights, pairs)]
        return lanes.call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _VECTOR, arguments)
    for half in (_low_half, _high_half):
        total = lanes.multiply_add(builder, half(builder, x), half(builder, weights), total)
    return total


def _low_half(builder: Builder, words: Value) -> Value:
    return builder.bitcast(builder.shl(words, ir.Constant(_WORDS, [16] * LANES)), _VECTOR)


def _high_half(builder: Builder, words: Value) -> Value:
    return builder.bitcast(builder.and_(words, ir.Constant(_WORDS, [0xFFFF0000] * LANES)), _VECTOR)


def _emit_pairs(
    builder: Builder,
    rows: list[Value],
    panel: Value,
    depth: Value,
    sums: list[list[lanes.Sum]],
    ahead: Value,
    ahead_step: Value,
) -> None:
    words = builder.bitcast(panel, I32.as_pointer())
    rows = [builder.bitcast(row, I32.as_pointer()) for row in rows]
    half_step = builder.lshr(ahead_step, integer(1))
    with cgutils.for_range(builder, builder.lshr(depth, integer(1)), intp=I64) as loop:
        line = row_at(builder, words, loop.index, integer(PANEL))
        if len(rows) >= _MIN_ROWS_AHEAD:
            next_line = row_at(builder, ahead, loop.index, ahead_step)
            lanes.prefetch_line(builder, next_line, locality=2)
            lanes.prefetch_line(builder, builder.gep(next_line, [half_step]), locality=2)
        vectors = [_load_words(builder, at(builder, line, i * LANES)) for i in range(_NUM_VECTORS)]
        for row, totals in zip(rows, sums, strict=True):
            pair = lanes.splat(builder, builder.load(at(builder, row, loop.index)))
            for vector, total in zip(vectors, totals, strict=True):
                total.set(builder, _pair_products(builder, total.get(builder), pair, vector))

    with builder.if_then(builder.trunc(depth, ir.IntType(1)), likely=False):
        # The last input feature has no other; its weights are paired with zeros.
        last = builder.lshr(depth, integer(1))
        line = row_at(builder, words, last, integer(PANEL))
        vectors = [_load_words(builder, at(builder, line, i * LANES)) for i in range(_NUM_VECTORS)]
        for row, totals in zip(rows, sums, strict=True):
            half = builder.bitcast(at(builder, row, last), ir.IntType(16).as_pointer())
            pair = lanes.splat(builder, builder.zext(builder.load(half), I32))
            for vector, total in zip(vectors, totals, strict=True):
                total.set(builder, _pair_products(builder, total.get(builder), pair, vector))


def _load_words(builder: Builder, pointer: Value) -> Value:
    return builder.load(builder.bitcast(pointer, _WORDS.as_pointer()), align=4)


def _emit_singles(
    builder: Builder, kind: types.Type, rows: list[Value], panel: Value, depth: Value, sums: list[list[lanes.Sum]]
) -> None:
    with cgutils.for_range(builder, depth, intp=I64) as loop:
        line = row_at(builder, panel, loop.index, integer(PANEL))
        vectors = [load(builder, at(builder, line, i * LANES), kind) for i in range(_NUM_VECTORS)]
        for row, totals in zip(rows, sums, strict=True):
            element = widen(builder, builder.load(at(builder, row, loop.index)), kind)
            factor = lanes.splat(builder, element)
            for vector, total in zip(vectors, totals, strict=True):
                total.add_product(builder, factor, vector)


@emitted(nothing)
def multiply_panel(
    builder: Builder,
    kinds: Kinds,
    x: Value,
    x_stride: Value,
    num_rows: Value,
    panel: Value,
    depth: Value,
    tile: Value,
    ahead: Value,
    ahead_step: Value,
) -> None:
    """tile[row, :] = x[row, :depth] @ panel for up to MAX_ROWS rows; tile is float32 [MAX_ROWS, PANEL].

    Meanwhile `ahead_step` elements at `ahead` are brought into the cache for each pair of input features, at most
    2 * PANEL; 0 for none. That is for bfloat16: reading a panel takes as long as three or four passes over it, and what
    is not asked for early is waited for in the first one. (Into the second level: in the first they would drive out
    the rows.) The memory is to be busy all the while, so as many passes as that bring the next panel, in equal parts.
    """
    kind = kinds[0].dtype
    for count in range(1, MAX_ROWS + 1):
        with builder.if_then(builder.icmp_signed("==", num_rows, integer(count))):
            sums = [[lanes.Sum(builder) for _ in range(_NUM_VECTORS)] for _ in range(count)]
            rows = [row_at(builder, x, row, x_stride) for row in range(count)]
            if kind == BFLOAT16:
                _emit_pairs(builder, rows, panel, depth, sums, ahead, ahead_step)
            else:
                _emit_singles(builder, kind, rows, panel, depth, sums)
            for row, totals in enumerate(sums):
                for i, total in enumerate(totals):
                    store(builder, total.get(builder), at(builder, tile, row * PANEL + i * LANES))


@emitted(lambda: types.CPointer(types.float32))
def new_tile(builder: Builder, kinds: Kinds) -> Value:
    """Room on the stack for a tile, good until the function returns."""
    return cgutils.alloca_once(builder, F32, size=MAX_ROWS * PANEL)
