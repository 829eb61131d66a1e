"""The inner loops of prefill attention in tile registers (AMX): 64 positions of keys and values, 16 rows of queries.

Everything is the other way round than on paper. Keys are multiplied with queries, not queries with keys: a tile of
keys is read as it lies, and the scores of a position are one vector, a lane for each row, so that a softmax needs
neither a sum nor a maximum across lanes. Weights of two positions side by side are what the product with the values
asks for, so only values are transposed, once for all rows that see them.

Weights are split into two bfloat16, of which the second is what the first has left out: their sum is off by less than
2 ** -16 of a weight, as against 2 ** -9 of one bfloat16 alone, and the result is as good as one made in float32.

Addresses and counts are integers. A row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils

from quire.kernels import cpu_lanes as lanes
from quire.kernels.cpu_elements import BFLOAT16, F32, I32, I64, Builder, Kinds, Value, emitted, nothing
from quire.kernels.cpu_lanes import LANES, at, constant, integer, load, row_at, store
from quire.kernels.cpu_tiles import HAS_TILES, instruction

POSITIONS = 64
"""Of a tile of keys and values."""
ROWS = 16
"""Rows that are computed together: the lanes of a vector."""
DEPTH = 32
"""Dimensions of a product of tiles; heads are padded to a multiple of it."""

_BYTE, _SHORT = ir.IntType(8), ir.IntType(16)
_LINE = 64  # bytes of a row of a tile
_TILE = ROWS * _LINE
_WORDS, _VECTOR = ir.VectorType(I32, ROWS), ir.VectorType(F32, ROWS)
_TOGETHER = 4  # positions whose maxima are independent
_CAN = HAS_TILES and LANES == ROWS


def _bytes_at(builder: Builder, address: Value) -> Value:
    return builder.inttoptr(address, _BYTE.as_pointer())


def _floats_at(builder: Builder, address: Value) -> Value:
    return builder.inttoptr(address, F32.as_pointer())


def _words(value: int) -> Value:
    return ir.Constant(_WORDS, [value] * ROWS)


def _load_words(builder: Builder, pointer: Value) -> Value:
    return builder.load(builder.bitcast(pointer, _WORDS.as_pointer()), align=4)


def _store_words(builder: Builder, words: Value, pointer: Value) -> None:
    builder.store(words, builder.bitcast(pointer, _WORDS.as_pointer()), align=4)


@emitted(nothing)
def copy_row(builder: Builder, kinds: Kinds, row: Value, head_dim: Value, padded_dim: Value, target: Value) -> None:
    """The `head_dim` elements of a row as bfloat16 at an address, padded with zeros; codes of int8 are exact in it."""
    target, kind = builder.inttoptr(target, _SHORT.as_pointer()), kinds[0].dtype
    size = DEPTH if kind == BFLOAT16 else LANES
    whole = builder.and_(head_dim, integer(-size))
    with cgutils.for_range_slice(builder, integer(0), whole, integer(size), I64) as (dim, _):
        source, place = at(builder, row, dim), at(builder, target, dim)
        if kind == BFLOAT16:
            vector = ir.VectorType(_SHORT, size).as_pointer()
            elements = builder.load(builder.bitcast(source, vector), align=2)
            builder.store(elements, builder.bitcast(place, vector), align=2)
        else:
            lanes.store_rounded(builder, load(builder, source, kind), place, BFLOAT16, None)
    with builder.if_then(builder.icmp_signed("<", whole, padded_dim), likely=False):

        def block(dim: Value, _: int, mask: Value | None) -> None:
            vector = load(builder, at(builder, row, whole, dim), kind, mask)
            lanes.store_rounded(builder, vector, at(builder, target, whole, dim), BFLOAT16, None)

        rest = builder.sub(head_dim, whole)
        lanes.over_dims(builder, rest, 1, block)
        done = builder.and_(builder.add(rest, integer(LANES - 1)), integer(-LANES))
        with cgutils.for_range_slice(builder, builder.add(whole, done), padded_dim, integer(LANES), I64) as (dim, _):
            lanes.store_rounded(builder, constant(0.0), at(builder, target, dim), BFLOAT16, None)


@emitted(nothing)
def pack_queries(builder: Builder, kinds: Kinds, rows: Value, padded_dim: Value, target: Value) -> None:
    """ROWS rows of bfloat16 become tiles of pairs of dimensions: [padded_dim / DEPTH, DEPTH / 2, ROWS, 2]."""
    if not _CAN:
        return
    rows, target = _bytes_at(builder, rows), _bytes_at(builder, target)
    stride = builder.shl(padded_dim, integer(1))
    with cgutils.for_range(builder, builder.lshr(padded_dim, integer(5)), intp=I64) as loop:
        column = builder.mul(loop.index, integer(_LINE))
        square = [_load_words(builder, row_at(builder, rows, row, stride, column)) for row in range(ROWS)]
        tile = row_at(builder, target, loop.index, integer(_TILE))
        for i, pairs in enumerate(lanes.transpose(builder, square)):
            _store_words(builder, pairs, at(builder, tile, i * _LINE))


@emitted(lambda *_: types.float32)
def pack_values(builder: Builder, kinds: Kinds, rows: Value, padded_dim: Value, target: Value) -> Value:
    """POSITIONS rows of bfloat16 become [padded_dim, POSITIONS]; returns 0.0, or NaN if one is not finite."""
    if not _CAN:
        return ir.Constant(F32, 0.0)
    taint = lanes.Sum(builder)
    rows, target = (builder.inttoptr(address, _SHORT.as_pointer()) for address in (rows, target))
    shorts = ir.VectorType(_SHORT, ROWS)

    def half(row: Value | int, dim: Value, part: Value) -> Value:
        pointer = row_at(builder, rows, builder.add(part, integer(row)), padded_dim, dim)
        bits = builder.zext(builder.load(builder.bitcast(pointer, shorts.as_pointer()), align=2), _WORDS)
        high = builder.shl(bits, _words(16))
        taint.add_product(builder, builder.bitcast(high, _VECTOR), constant(0.0))
        return bits, high

    for part in (0, POSITIONS // 2):
        with cgutils.for_range_slice(builder, integer(0), padded_dim, integer(ROWS), I64) as (dim, _):
            square = []
            for pair in range(POSITIONS // 4):
                first, second = (half(2 * pair + i, dim, integer(part)) for i in range(2))
                square.append(builder.or_(first[0], second[1]))
            for i, words in enumerate(lanes.transpose(builder, square)):
                place = row_at(builder, target, builder.add(dim, integer(i)), integer(POSITIONS), integer(part))
                _store_words(builder, words, place)
    return lanes.first_lane(builder, lanes.sum_lanes(builder, [taint.get(builder)]))


@emitted(nothing)
def score_rows(builder: Builder, kinds: Kinds, keys: Value, padded_dim: Value, queries: Value, scores: Value) -> None:
    """scores[position, row] = keys[position] . queries[row], float32 [POSITIONS, ROWS].

    `keys` is bfloat16 [POSITIONS, padded_dim], `queries` comes from pack_queries.
    """
    if not _CAN:
        return
    keys, queries, scores = (_bytes_at(builder, address) for address in (keys, queries, scores))
    stride, line = builder.shl(padded_dim, integer(1)), integer(_LINE)
    for part in range(4):
        instruction(builder, "tilezero", part)
    with cgutils.for_range(builder, builder.lshr(padded_dim, integer(5)), intp=I64) as loop:
        instruction(builder, "tileloadd64", 4, row_at(builder, queries, loop.index, integer(_TILE)), line)
        column = builder.mul(loop.index, line)
        for part in range(4):
            register = 5 + part % 3
            rows = row_at(builder, keys, part * ROWS, stride, column)
            instruction(builder, "tileloadd64", register, rows, stride)
            instruction(builder, "tdpbf16ps", part, register, 4)
    for part in range(4):
        instruction(builder, "tilestored64", part, at(builder, scores, part * _TILE), line)


def _over_positions(builder: Builder, scores: Value, body: Callable[[Value, Value, int], None]) -> None:
    """body(position, its scores' place, i) over all positions, _TOGETHER of them side by side: the i-th of these."""
    with cgutils.for_range_slice(builder, integer(0), integer(POSITIONS), integer(_TOGETHER), I64) as (first, _):
        for i in range(_TOGETHER):
            position = builder.add(first, integer(i))
            body(position, row_at(builder, scores, position, integer(ROWS)), i)


@emitted(nothing)
def limit_scores(builder: Builder, kinds: Kinds, scores: Value, limits: Value) -> None:
    """scores[position, row] = -inf, unless limits[0, row] <= position < limits[1, row]; limits are int32 [2, ROWS]."""
    if not _CAN:
        return
    bounds = builder.inttoptr(limits, I32.as_pointer())
    low, high = (_load_words(builder, at(builder, bounds, i * ROWS)) for i in range(2))

    def limit(position: Value, place: Value, _: int) -> None:
        index = lanes.splat(builder, builder.trunc(position, I32))
        seen = builder.and_(builder.icmp_signed(">=", index, low), builder.icmp_signed("<", index, high))
        store(builder, builder.select(seen, load(builder, place), constant(float("-inf"))), place)

    _over_positions(builder, _floats_at(builder, scores), limit)


@emitted(nothing)
def multiply_scores(builder: Builder, kinds: Kinds, scores: Value, factors: Value) -> None:
    """scores[position, :] *= factors[position]."""
    if not _CAN:
        return
    factors = _floats_at(builder, factors)

    def multiply(position: Value, place: Value, _: int) -> None:
        factor = lanes.splat(builder, builder.load(at(builder, factors, position)))
        store(builder, builder.fmul(load(builder, place), factor), place)

    _over_positions(builder, _floats_at(builder, scores), multiply)


@emitted(nothing)
def soften(
    builder: Builder,
    kinds: Kinds,
    scores: Value,
    scale: Value,
    v_scales: Value,
    maxima: Value,
    divisors: Value,
    factors: Value,
    weights: Value,
) -> None:
    """Weights of `scores`, float32 [POSITIONS, ROWS], as bfloat16 [2, POSITIONS / 2, ROWS, 2]: in the second half what
    the first leaves out.

    Args:
        scale: what scores are multiplied with, positive. Their exponentials are to the base of two.
        v_scales: float32 [POSITIONS] that weights are multiplied with when they are stored; 0 for none.
        maxima, divisors: float32 [ROWS], of the positions so far, these included once it returns.
        factors: float32 [ROWS]: set to what sums so far are to be multiplied with.
    """
    if not _CAN:
        return
    scores, maxima, divisors, factors = (_floats_at(builder, each) for each in (scores, maxima, divisors, factors))
    previous = load(builder, maxima)
    best = [lanes.Sum(builder, constant(lanes.LOWEST)) for _ in range(_TOGETHER)]
    _over_positions(
        builder,
        scores,
        lambda _, place, i: best[i].set(builder, lanes.larger(builder, load(builder, place), best[i].get(builder))),
    )
    largest = best[0].get(builder)
    for line in best[1:]:
        largest = lanes.larger(builder, line.get(builder), largest)
    factor = lanes.splat(builder, scale)
    largest = lanes.larger(builder, builder.fmul(largest, factor), previous)
    rest = lanes.exp2(builder, builder.fsub(previous, largest))
    store(builder, largest, maxima)
    store(builder, rest, factors)

    totals = [lanes.Sum(builder) for _ in range(2)]
    high_weights = builder.inttoptr(weights, I32.as_pointer())
    low_weights = at(builder, high_weights, POSITIONS // 2 * ROWS)
    upper, sixteen, below = _words(0xFFFF0000), _words(16), builder.fneg(largest)

    def over_pairs(own_factor: Callable[[Value], Value] | None) -> None:
        with cgutils.for_range_slice(builder, integer(0), integer(POSITIONS), integer(2), I64) as (first, _):
            rounded, left = [], []
            for i, total in enumerate(totals):
                position = builder.add(first, integer(i))
                score = load(builder, row_at(builder, scores, position, integer(ROWS)))
                weight = lanes.exp2(builder, lanes.multiply_add(builder, score, factor, below))
                total.set(builder, builder.fadd(total.get(builder), weight))
                if own_factor is not None:
                    weight = builder.fmul(weight, own_factor(position))
                bits = builder.and_(builder.bitcast(weight, _WORDS), upper)
                rounded.append(bits)
                left.append(builder.bitcast(builder.fsub(weight, builder.bitcast(bits, _VECTOR)), _WORDS))
            pair = builder.lshr(first, integer(1))
            words = builder.or_(builder.lshr(rounded[0], sixteen), rounded[1])
            _store_words(builder, words, row_at(builder, high_weights, pair, integer(ROWS)))
            words = builder.or_(builder.lshr(left[0], sixteen), builder.and_(left[1], upper))
            _store_words(builder, words, row_at(builder, low_weights, pair, integer(ROWS)))

    with builder.if_else(builder.icmp_signed("==", v_scales, integer(0))) as (without, scaled):
        with without:
            over_pairs(None)
        with scaled:
            each = _floats_at(builder, v_scales)
            over_pairs(lambda position: lanes.splat(builder, builder.load(at(builder, each, position))))
    total = builder.fadd(totals[0].get(builder), totals[1].get(builder))
    store(builder, lanes.multiply_add(builder, load(builder, divisors), rest, total), divisors)


@emitted(nothing)
def add_values(
    builder: Builder, kinds: Kinds, values: Value, padded_dim: Value, weights: Value, factors: Value, sums: Value
) -> None:
    """sums[dim, row] = sums[dim, row] * factors[row] + the sum over positions of values[dim, position] * weight.

    `values` comes from pack_values, `weights` from soften; sums are float32 [padded_dim, ROWS].
    """
    if not _CAN:
        return
    factor = load(builder, _floats_at(builder, factors))
    values, weights, sums = (_bytes_at(builder, address) for address in (values, weights, sums))
    line, stride = integer(_LINE), integer(2 * POSITIONS)
    changed = builder.fcmp_unordered("!=", factor, constant(1.0))
    changes = builder.icmp_unsigned("!=", builder.bitcast(changed, ir.IntType(ROWS)), ir.Constant(ir.IntType(ROWS), 0))
    with builder.if_then(changes):  # noqa: SIM117
        with cgutils.for_range(builder, padded_dim, intp=I64) as loop:
            place = builder.bitcast(row_at(builder, sums, loop.index, line), F32.as_pointer())
            store(builder, builder.fmul(load(builder, place), factor), place)

    def add_tiles(first_dim: Value, count: int) -> None:
        """To 16 sums of each of `count` tiles; two weights and two tiles of values at a time are in registers."""
        places = [row_at(builder, sums, first_dim, line, integer(i * _TILE)) for i in range(count)]
        rows = [row_at(builder, values, first_dim, stride, integer(i * ROWS * 2 * POSITIONS)) for i in range(count)]
        for i, place in enumerate(places):
            instruction(builder, "tileloadd64", i, place, line)
        for half in range(2):  # of the positions
            for part in range(2):  # weights, and what they have left out
                instruction(builder, "tileloadd64", 4 + part, at(builder, weights, (2 * part + half) * _TILE), line)
            for i in range(0, count, 2):
                for j in range(2):
                    instruction(builder, "tileloadd64", 6 + j, at(builder, rows[i + j], half * _LINE), stride)
                for part in range(2):
                    for j in range(2):
                        instruction(builder, "tdpbf16ps", i + j, 6 + j, 4 + part)
        for i, place in enumerate(places):
            instruction(builder, "tilestored64", i, place, line)

    whole = builder.and_(padded_dim, integer(-4 * ROWS))
    with cgutils.for_range_slice(builder, integer(0), whole, integer(4 * ROWS), I64) as (dim, _):
        add_tiles(dim, 4)
    with builder.if_then(builder.icmp_signed("<", whole, padded_dim)):
        add_tiles(whole, 2)


@emitted(nothing)
def store_rows(
    builder: Builder,
    kinds: Kinds,
    sums: Value,
    divisors: Value,
    addresses: Value,
    num_rows: Value,
    head_dim: Value,
) -> None:
    """The row at addresses[i] = sums[:, i] / divisors[i], in bfloat16, for the first `num_rows` rows."""
    if not _CAN:
        return
    sums, divisors = (_floats_at(builder, address) for address in (sums, divisors))
    addresses = builder.inttoptr(addresses, I64.as_pointer())
    inverse = builder.fdiv(constant(1.0), load(builder, divisors))

    def block(dim: Value, _: int, mask: Value | None) -> None:
        square = [
            builder.fmul(load(builder, row_at(builder, sums, builder.add(dim, integer(i)), integer(ROWS))), inverse)
            for i in range(ROWS)
        ]
        for row, vector in enumerate(lanes.transpose(builder, square)):
            with builder.if_then(builder.icmp_signed("<", integer(row), num_rows)):
                address = builder.load(at(builder, addresses, row))
                target = at(builder, builder.inttoptr(address, _SHORT.as_pointer()), dim)
                lanes.store_rounded(builder, vector, target, BFLOAT16, mask)

    lanes.over_dims(builder, head_dim, 1, block)
