"""Matrix products with packed weights: the inner loops of the CPU's linear layers, as LLVM IR.

A weight [N, K] is packed into panels of PANEL output features: a panel holds, for one input feature after another (for
bfloat16 one pair after another), the PANEL weights that it is multiplied with. So a panel is read from its first byte
to its last, once for up to MAX_ROWS rows, whose sums stay in registers meanwhile. Each sum is made in the order of the
input features whatever rows stand beside it: a row's result never depends on the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numba
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

MAX_PASSES = 16
"""Over a panel, for a block of rows that is one unit of work."""
MAX_PASSES_AHEAD = 4
"""Passes over a panel during which another one is brought into the cache, at most: an equal part in each."""
_MIN_ROWS_AHEAD = 3  # with fewer rows a pass waits for its own panel

NOT_WIDENED, WIDENING, WIDENED = range(3)
"""What a pass has to do with a part of the panel in float32: nothing, write it on its way, or read it."""
WIDE_DEPTH = 256 if LANES == 8 else 0
"""Input features whose weights are kept in the first cache in float32; 0: unmeasured with AVX-512."""

_STEPS_AT_ONCE = 4  # input features, or pairs of them, before a loop counts on

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


@dataclass(frozen=True, slots=True)
class _Pass:
    """Rows and panels whose sums grow together in registers."""

    rows: list[Value]
    panels: list[Value]
    depth: Value
    sums: list[list[lanes.Sum]]
    """Of each row: the vectors of one panel, then those of the next."""
    ahead: Value
    ahead_step: Value
    wide: Value | None = None
    """Where the panel's weights are kept in float32, if they are."""

    def sums_in(self, builder: Builder, tile: Value) -> list[tuple[lanes.Sum, Value]]:
        """Each sum and its place in the tile."""
        return [
            (total, at(builder, tile, (i // _NUM_VECTORS * len(self.rows) + row) * PANEL + i % _NUM_VECTORS * LANES))
            for row, totals in enumerate(self.sums)
            for i, total in enumerate(totals)
        ]

    def take_up(self, builder: Builder, tile: Value) -> None:
        """Go on with sums that the tile holds."""
        for total, place in self.sums_in(builder, tile):
            total.set(builder, load(builder, place))

    def lines(self, builder: Builder, index: Value) -> list[Value]:
        """Where each of a row's vectors finds the weights of the input feature, or pair of them, at `index`."""
        lines = [row_at(builder, panel, index, integer(PANEL)) for panel in self.panels]
        return [at(builder, line, i * LANES) for line in lines for i in range(_NUM_VECTORS)]

    def add_products(
        self,
        builder: Builder,
        index: Value,
        feature: Value,
        weights: Callable[[Value], Value],
        factor: Callable[[Value], Value],
    ) -> None:
        """Add weights(line) * factor(row) to each sum. The order is one that the registers are enough for."""
        lines = self.lines(builder, index)
        if len(self.panels) > 1 and len(self.rows) <= 2:
            factors = [lanes.splat(builder, factor(row)) for row in self.rows]
            for i, line in enumerate(lines):
                vector = weights(line)
                for splat, totals in zip(factors, self.sums, strict=True):
                    totals[i].add_product(builder, splat, vector)
            return
        for first in range(0, len(lines), _NUM_VECTORS):
            vectors = [weights(line) for line in lines[first : first + _NUM_VECTORS]]
            if self.wide is not None:
                kept = row_at(builder, self.wide, feature, integer(PANEL))
                for i, vector in enumerate(vectors):
                    store(builder, vector, at(builder, kept, i * LANES))
            for row, totals in zip(self.rows, self.sums, strict=True):
                splat = lanes.splat(builder, factor(row))
                for i, vector in enumerate(vectors):
                    totals[first + i].add_product(builder, splat, vector)
            if first + _NUM_VECTORS < len(lines):
                _load_afresh(builder)

    def ask_ahead(self, builder: Builder, first_pair: Value, num_pairs: int) -> None:
        if len(self.rows) < _MIN_ROWS_AHEAD or len(self.panels) > 1:
            return
        part, size = row_at(builder, self.ahead, first_pair, self.ahead_step), self.ahead_step
        num_lines = max(1, num_pairs * 2 * PANEL // 64)
        for line in range(num_lines):
            offset = builder.udiv(builder.mul(size, integer(num_pairs * line)), integer(num_lines))
            lanes.prefetch_line(builder, at(builder, part, offset), locality=2)


def _emit_pairs(builder: Builder, work: _Pass) -> None:
    """bfloat16 rows on bfloat16 weights."""
    rows = [builder.bitcast(row, I32.as_pointer()) for row in work.rows]
    num_pairs = builder.lshr(work.depth, integer(1))

    def add_products(vectors: list[Value], pairs: list[Value]) -> None:
        for pair, totals in zip(pairs, work.sums, strict=True):
            for vector, total in zip(vectors, totals, strict=True):
                total.set(builder, _pair_products(builder, total.get(builder), pair, vector))

    with cgutils.for_range(builder, num_pairs, intp=I64) as loop:
        work.ask_ahead(builder, loop.index, 1)
        vectors = [_load_words(builder, line) for line in work.lines(builder, loop.index)]
        add_products(vectors, [lanes.splat(builder, builder.load(at(builder, row, loop.index))) for row in rows])
    with builder.if_then(builder.trunc(work.depth, ir.IntType(1)), likely=False):
        # The last input feature has no other; its weights are paired with zeros.
        vectors = [_load_words(builder, line) for line in work.lines(builder, num_pairs)]
        halves = [builder.bitcast(at(builder, row, num_pairs), ir.IntType(16).as_pointer()) for row in rows]
        add_products(vectors, [lanes.splat(builder, builder.zext(builder.load(half), I32)) for half in halves])


def _emit_widened_pairs(builder: Builder, work: _Pass) -> None:
    """float32 rows on bfloat16 weights, which are widened on their way: the products that float32 weights have."""
    num_pairs = builder.lshr(work.depth, integer(1))

    def add_products(pair: Value, half: Callable[[Builder, Value], Value], feature: Value) -> None:
        work.add_products(
            builder,
            pair,
            feature,
            lambda line: half(builder, _load_words(builder, line)),
            lambda row: builder.load(at(builder, row, feature)),
        )

    def add_pairs(first_pair: Value, count: int) -> None:
        work.ask_ahead(builder, first_pair, count)
        for index in range(count):
            pair = builder.add(first_pair, integer(index))
            feature = builder.shl(pair, integer(1))
            add_products(pair, _low_half, feature)
            # Weights are loaded again for their other halves: there are too few registers to keep them.
            _load_afresh(builder)
            add_products(pair, _high_half, builder.add(feature, integer(1)))
            _load_afresh(builder)

    _in_groups(builder, num_pairs, _STEPS_AT_ONCE, add_pairs)
    with builder.if_then(builder.trunc(work.depth, ir.IntType(1)), likely=False):
        add_products(num_pairs, _low_half, builder.shl(num_pairs, integer(1)))


def _load_words(builder: Builder, pointer: Value) -> Value:
    return builder.load(builder.bitcast(pointer, _WORDS.as_pointer()), align=4)


def _emit_singles(builder: Builder, work: _Pass, kind: types.Type, weight_kind: types.Type, *, asks: bool) -> None:
    def add_features(first: Value, count: int) -> None:
        if asks and count > 1:
            work.ask_ahead(builder, builder.lshr(first, integer(1)), count // 2)
        for index in range(count):
            feature = builder.add(first, integer(index))
            work.add_products(
                builder,
                feature,
                feature,
                lambda line: load(builder, line, weight_kind),
                lambda row, feature=feature: widen(builder, builder.load(at(builder, row, feature)), kind),  # type: ignore[misc]
            )
            _load_afresh(builder)

    _in_groups(builder, work.depth, _STEPS_AT_ONCE, add_features)


def _in_groups(builder: Builder, count: Value, size: int, body: Callable[[Value, int], None]) -> None:
    """body(first, size) for each whole group of `count`, body(first, 1) for each of the rest.

    What a loop does beside its products takes places in the pipeline, half of which another thread may have: two
    virtual machines often share a core.
    """
    end = builder.and_(count, integer(-size))
    for start, stop, step in ((integer(0), end, size), (end, count, 1)):
        with cgutils.for_range_slice(builder, start, stop, integer(step), I64) as (first, _):
            body(first, step)


def _own_register(builder: Builder, pointer: Value) -> Value:
    """`pointer`, of which LLVM does not know that it follows from another: it is not reckoned again in a loop."""
    return builder.asm(ir.FunctionType(pointer.type, [pointer.type]), "", "=r,0", [pointer], False)


def _load_afresh(builder: Builder) -> None:
    """What is loaded behind this is not taken from before, nor loaded earlier."""
    builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", (), True)


@numba.njit
def panels_together(num_rows):  # type: ignore[no-untyped-def]
    """How many panels a single pass of so few rows should read side by side.

    Their sums fit into the registers, and memory is read faster in several places at once. Where a panel is four cache
    lines wide (AVX-512) one is enough.
    """
    if LANES == 16 or num_rows > 3:
        return 1
    return 4 if num_rows == 1 else 2


@numba.njit
def group_of_panels(group, together, num_panels):  # type: ignore[no-untyped-def]
    """Of panels in groups of `together`: the first of a group, the first behind it, and how many of them are read at
    once: all, or one after another where the last group is short of some."""
    first = group * together
    end = min(first + together, num_panels)
    return first, end, together if end - first == together else 1


def _passes(is_widening: bool) -> list[tuple[int, int, int]]:
    """How many rows and panels one pass may have, and what it may do with the panel in float32."""
    rows = range(1, MAX_ROWS + 1)
    passes = [(count, num, NOT_WIDENED) for count in rows for num in sorted({1, panels_together.py_func(count)})]
    if is_widening and WIDE_DEPTH > 0:
        # One of several that are as even as can be.
        passes += [(count, 1, use) for use in (WIDENING, WIDENED) for count in rows if count >= MAX_ROWS // 2]
    return passes


@emitted(nothing)
def multiply_panels(
    builder: Builder,
    kinds: Kinds,
    x: Value,
    x_stride: Value,
    num_rows: Value,
    panel: Value,
    panel_stride: Value,
    num_panels: Value,
    depth: Value,
    tile: Value,
    ahead: Value,
    ahead_step: Value,
    wide: Value,
    use_of_wide: Value,
    goes_on: Value,
) -> None:
    """tile[p, row, :] = x[row, :depth] @ panel p, for up to MAX_ROWS rows and one panel or `panels_together` of them;
    tile is float32 [num_panels, num_rows, PANEL], of MAX_ROWS * PANEL elements at most.

    Meanwhile `ahead_step` elements at `ahead` are brought into the cache for each pair of input features, at most
    PANEL; 0 for none. That is for bfloat16: reading a panel takes as long as three or four passes over it, and what
    is not asked for early is waited for in the first one. (Into the second level: in the first they would drive out
    the rows.) The memory is to be busy all the while, so as many passes as that bring the next panel, in equal parts.

    float32 rows on weights of 16 bits: one of several passes over a part of a panel may be WIDENING, which keeps the
    weights as float32 [depth, PANEL] in `wide`, and those behind it WIDENED. If it `goes_on`, such a pass adds to the
    sums in the tile. The products and their order are the same.
    """
    kind, weight_kind = kinds[0].dtype, kinds[3].dtype
    for row_count, panel_count, use in _passes(kind != weight_kind):
        is_this = builder.icmp_signed("==", num_rows, integer(row_count))
        is_this = builder.and_(is_this, builder.icmp_signed("==", num_panels, integer(panel_count)))
        is_this = builder.and_(is_this, builder.icmp_signed("==", use_of_wide, integer(use)))
        with builder.if_then(is_this):
            panels = [row_at(builder, panel, index, panel_stride) for index in range(panel_count)]
            rows = [row_at(builder, x, row, x_stride) for row in range(row_count)]
            its_kind = weight_kind
            if use == WIDENED:
                panels, its_kind = [wide], types.float32
            elif weight_kind == BFLOAT16:
                panels = [builder.bitcast(p, I32.as_pointer()) for p in panels]
            work = _Pass(
                rows=rows if kind == BFLOAT16 else [_own_register(builder, row) for row in rows],
                panels=panels,
                depth=depth,
                sums=[[lanes.Sum(builder) for _ in range(panel_count * _NUM_VECTORS)] for _ in range(row_count)],
                ahead=ahead,
                ahead_step=ahead_step,
                wide=wide if use == WIDENING else None,
            )
            if use != NOT_WIDENED:
                with builder.if_then(builder.icmp_signed("!=", goes_on, integer(0))):
                    work.take_up(builder, tile)
            if its_kind != BFLOAT16:
                _emit_singles(builder, work, kind, its_kind, asks=use == WIDENED)
            elif kind == BFLOAT16:
                _emit_pairs(builder, work)
            else:
                _emit_widened_pairs(builder, work)
            for total, place in work.sums_in(builder, tile):
                store(builder, total.get(builder), place)


@emitted(lambda: types.CPointer(types.float32))
def new_tile(builder: Builder, kinds: Kinds) -> Value:
    """Room on the stack for the tiles of MAX_PASSES passes, good until the function returns."""
    return cgutils.alloca_once(builder, F32, size=MAX_PASSES * MAX_ROWS * PANEL)


@emitted(lambda: types.CPointer(types.float32))
def new_wide(builder: Builder, kinds: Kinds) -> Value:
    """Room on the stack for WIDE_DEPTH lines of a panel in float32, good until the function returns."""
    return cgutils.alloca_once(builder, F32, size=max(1, WIDE_DEPTH) * PANEL)
