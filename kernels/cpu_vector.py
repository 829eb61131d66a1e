"""The inner loops of the CPU attention kernels, callable from Numba functions.

Each keeps its sums in registers and shares what it loads among several rows. A row's result does not depend on the
rows beside it. Matrices are float32 rows at a stride, padded to whole vectors, except keys and values, which are
elements of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.core import cgutils

from quire.kernels import cpu_lanes as lanes
from quire.kernels.cpu_elements import I64, Builder, Kinds, Value, emitted, nothing
from quire.kernels.cpu_lanes import LANES, NUM_SUMS, at, integer, load, row_at, store

ROWS = 4
"""Rows that `multiply_rows` and `add_product_rows` work on."""

_MAX_HEADS, _MAX_TOKENS = 4, 8  # query heads and tokens that share a pass over keys or values in decode


def _by_heads(builder: Builder, num_heads: Value, body: Callable[[Value, int], None]) -> None:
    """body(first head, how many) over the heads."""
    with cgutils.for_range_slice(builder, integer(0), num_heads, integer(_MAX_HEADS), I64) as (head, _):
        left = builder.sub(num_heads, head)
        for count in range(1, _MAX_HEADS + 1):
            comparison = ">=" if count == _MAX_HEADS else "=="
            with builder.if_then(builder.icmp_signed(comparison, left, integer(count))):
                body(head, count)


def _emit_dots(builder: Builder, kind: types.Type, operands: list[Value], num_heads: int, num_tokens: int) -> None:
    """scores[h, t] = queries[h] . keys[t]."""
    queries, query_stride, keys, head_dim, scores, score_stride = operands
    sums = [[lanes.Sum(builder) for _ in range(num_tokens)] for _ in range(num_heads)]

    def step(dim: Value, _: int, mask: Value | None) -> None:
        rows = [load(builder, row_at(builder, keys, i, head_dim, dim), kind, mask) for i in range(num_tokens)]
        for head in range(num_heads):
            query = load(builder, row_at(builder, queries, head, query_stride, dim))
            for row, total in zip(rows, sums[head], strict=True):
                total.add_product(builder, query, row)

    lanes.over_dims(builder, head_dim, 1, step)
    totals = lanes.sum_lanes(builder, [total.get(builder) for line in sums for total in line])
    for head in range(num_heads):
        line = lanes.shuffle(builder, totals, totals, list(range(head * num_tokens, (head + 1) * num_tokens)))
        store(builder, line, row_at(builder, scores, head, score_stride))


@emitted(nothing)
def dot_tokens(
    builder: Builder,
    kinds: Kinds,
    queries: Value,
    query_stride: Value,
    num_heads: Value,
    keys: Value,
    head_dim: Value,
    block_size: Value,
    first: Value,
    last: Value,
    scores: Value,
    score_stride: Value,
    ahead: Value,
) -> None:
    """scores[h, t] = queries[h] . keys[t] for the tokens [first, last) of a block of keys [block_size, head_dim].

    Scores of tokens next to these may be written too, from whatever the block holds there. The block at `ahead` is
    brought into the cache meanwhile.
    """
    whole = builder.and_(block_size, integer(-_MAX_TOKENS))
    end = builder.select(builder.icmp_signed("<", last, whole), last, whole)

    def emit(head: Value, token: Value, count: int, num_tokens: int) -> None:
        rows = row_at(builder, queries, head, query_stride), query_stride
        block = row_at(builder, keys, token, head_dim), head_dim
        lines = row_at(builder, scores, head, score_stride, token), score_stride
        _emit_dots(builder, kinds[3].dtype, [*rows, *block, *lines], count, num_tokens)

    def by_groups(head: Value, count: int) -> None:
        group = min(_MAX_TOKENS, NUM_SUMS // (1, 2, 4, 4)[count - 1])
        begin = builder.and_(first, integer(-group))
        with cgutils.for_range_slice(builder, begin, end, integer(group), I64) as (token, _):
            next_rows = row_at(builder, ahead, token, head_dim)
            lanes.prefetch(builder, next_rows, builder.mul(head_dim, integer(group)), kinds[3].dtype)
            emit(head, token, count, group)

    _by_heads(builder, num_heads, by_groups)
    rest = builder.select(builder.icmp_signed(">", first, whole), first, whole)
    with cgutils.for_range_slice(builder, rest, last, integer(1), I64) as (token, _):  # noqa: SIM117
        with cgutils.for_range(builder, num_heads, intp=I64) as loop:
            emit(loop.index, token, 1, 1)


@emitted(nothing)
def add_weighted(
    builder: Builder,
    kinds: Kinds,
    weights: Value,
    weight_stride: Value,
    num_heads: Value,
    values: Value,
    head_dim: Value,
    num_tokens: Value,
    totals: Value,
    total_stride: Value,
    ahead: Value,
) -> None:
    """totals[h] += the sum over t of weights[h, t] * values[t]; as many rows at `ahead` are brought into the cache."""

    def add_heads(head: Value, count: int) -> None:
        weight_rows = [row_at(builder, weights, builder.add(head, integer(i)), weight_stride) for i in range(count)]
        total_rows = [row_at(builder, totals, builder.add(head, integer(i)), total_stride) for i in range(count)]

        def block(dim: Value, num_vectors: int, mask: Value | None) -> None:
            sums = [[lanes.Sum(builder) for _ in range(num_vectors)] for _ in range(count)]
            with cgutils.for_range(builder, num_tokens, intp=I64) as loop:
                next_row = row_at(builder, ahead, loop.index, head_dim, dim)
                lanes.prefetch(builder, next_row, integer(num_vectors * LANES), kinds[3].dtype)
                row = row_at(builder, values, loop.index, head_dim, dim)
                vectors = [load(builder, at(builder, row, j * LANES), kinds[3].dtype, mask) for j in range(num_vectors)]
                for weight_row, line in zip(weight_rows, sums, strict=True):
                    weight = lanes.splat(builder, builder.load(at(builder, weight_row, loop.index)))
                    for vector, total in zip(vectors, line, strict=True):
                        total.add_product(builder, weight, vector)
            for total_row, line in zip(total_rows, sums, strict=True):
                for j, total in enumerate(line):
                    target = at(builder, total_row, dim, j * LANES)
                    store(builder, builder.fadd(load(builder, target), total.get(builder)), target)

        lanes.over_dims(builder, head_dim, min(4, NUM_SUMS // (1, 2, 4, 4)[count - 1]), block)

    _by_heads(builder, num_heads, add_heads)


def _product(num_rows: int, accumulate: bool) -> Any:
    @emitted(nothing)
    def product(
        builder: Builder,
        kinds: Kinds,
        a: Value,
        a_stride: Value,
        b: Value,
        b_stride: Value,
        c: Value,
        c_stride: Value,
        depth: Value,
        num_columns: Value,
        factors: Value,
    ) -> None:
        def block(column: Value, num_vectors: int, _: Value | None) -> None:
            targets = [
                [row_at(builder, c, row, c_stride, column, j * LANES) for j in range(num_vectors)]
                for row in range(num_rows)
            ]
            if accumulate:
                scales = [lanes.splat(builder, builder.load(at(builder, factors, row))) for row in range(num_rows)]
                sums = [
                    [lanes.Sum(builder, builder.fmul(load(builder, target), scale)) for target in line]
                    for scale, line in zip(scales, targets, strict=True)
                ]
            else:
                sums = [[lanes.Sum(builder) for _ in line] for line in targets]
            with cgutils.for_range(builder, depth, intp=I64) as loop:
                b_row = row_at(builder, b, loop.index, b_stride, column)
                vectors = [load(builder, at(builder, b_row, j * LANES)) for j in range(num_vectors)]
                for row in range(num_rows):
                    scalar = lanes.splat(builder, builder.load(row_at(builder, a, row, a_stride, loop.index)))
                    for vector, total in zip(vectors, sums[row], strict=True):
                        total.add_product(builder, scalar, vector)
            for line, totals in zip(targets, sums, strict=True):
                for target, total in zip(line, totals, strict=True):
                    store(builder, total.get(builder), target)

        lanes.over_dims(builder, num_columns, min(4, NUM_SUMS // num_rows), block)

    return product


# multiply: c = a @ b. add_product: c = c * factors[row] + a @ b. a is [rows, depth], b [depth, num_columns] and c
# [rows, num_columns]; num_columns is a multiple of LANES.
multiply_rows = _product(ROWS, accumulate=False)
add_product_rows = _product(ROWS, accumulate=True)
add_product_row = _product(1, accumulate=True)


@emitted(nothing)
def unpack_transposed(
    builder: Builder, kinds: Kinds, addresses: Value, like: Value, head_dim: Value, target: Value, target_stride: Value
) -> None:
    """target[d, i] = element d of the row at addresses[i], for LANES rows of elements such as `like` points to."""
    rows = [builder.inttoptr(builder.load(at(builder, addresses, i)), like.type) for i in range(LANES)]

    def block(dim: Value, _: int, mask: Value | None) -> None:
        square = [load(builder, at(builder, row, dim), kinds[1].dtype, mask) for row in rows]
        for i, vector in enumerate(lanes.transpose(builder, square)):
            store(builder, vector, row_at(builder, target, builder.add(dim, integer(i)), target_stride))

    lanes.over_dims(builder, head_dim, 1, block)


@emitted(lambda *_: types.float32)
def unpack_row(builder: Builder, kinds: Kinds, row: Value, head_dim: Value, factor: Value, target: Value) -> Value:
    """target = row * factor, padded with zeros to whole vectors; returns 0.0, or NaN if an element is not finite."""
    taint, factor = lanes.Sum(builder), lanes.splat(builder, factor)

    def block(dim: Value, _: int, mask: Value | None) -> None:
        vector = builder.fmul(load(builder, at(builder, row, dim), kinds[0].dtype, mask), factor)
        store(builder, vector, at(builder, target, dim))
        taint.add_product(builder, vector, lanes.constant(0.0))

    lanes.over_dims(builder, head_dim, 1, block)
    return lanes.first_lane(builder, lanes.sum_lanes(builder, [taint.get(builder)]))


@emitted(nothing)
def multiply_row(builder: Builder, kinds: Kinds, row: Value, factors: Value, count: Value) -> None:
    """row[i] *= factors[i] for `count` float32 and as many elements."""

    def block(first: Value, _: int, mask: Value | None) -> None:
        target = at(builder, row, first)
        vector = load(builder, at(builder, factors, first), kinds[1].dtype, mask)
        products = builder.fmul(load(builder, target, mask=mask), vector)
        if mask is None:
            store(builder, products, target)
        else:
            lanes.store_elements(builder, products, target, mask)

    lanes.over_dims(builder, count, 1, block)


@emitted(lambda *_: types.float32)
def row_max(builder: Builder, kinds: Kinds, row: Value, count: Value) -> Value:
    """The largest of `count` (a multiple of LANES) numbers, at least LOWEST; NaN is passed over."""
    best = lanes.Sum(builder, lanes.constant(lanes.LOWEST))
    with cgutils.for_range_slice(builder, integer(0), count, integer(LANES), I64) as (index, _):
        best.set(builder, lanes.larger(builder, load(builder, at(builder, row, index)), best.get(builder)))
    return lanes.max_lane(builder, best.get(builder))


@emitted(lambda *_: types.float32)
def row_exp2(builder: Builder, kinds: Kinds, row: Value, count: Value, largest: Value) -> Value:
    """row[i] = 2 ** (row[i] - largest) for `count` (a multiple of LANES) numbers; returns their sum.

    row[i] <= largest, or NaN, which stays NaN; -inf gives exactly 0.
    """
    total, largest = lanes.Sum(builder), lanes.splat(builder, largest)
    with cgutils.for_range_slice(builder, integer(0), count, integer(LANES), I64) as (index, _):
        target = at(builder, row, index)
        power = lanes.exp2(builder, builder.fsub(load(builder, target), largest))
        store(builder, power, target)
        total.set(builder, builder.fadd(total.get(builder), power))
    return lanes.first_lane(builder, lanes.sum_lanes(builder, [total.get(builder)]))


@emitted(lambda exponent: types.float32)
def exp2(builder: Builder, kinds: Kinds, exponent: Value) -> Value:
    """2 ** exponent for an exponent <= 0 or NaN."""
    return lanes.first_lane(builder, lanes.exp2(builder, lanes.splat(builder, exponent)))
