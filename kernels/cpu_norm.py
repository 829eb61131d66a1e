"""Norms and rotations of rows on the CPU: whole vectors at a time, as LLVM IR. Computed in float32, stored rounded."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils

from quire.kernels import cpu_lanes as lanes
from quire.kernels.cpu_elements import I64, Builder, Kinds, Value, emitted, nothing
from quire.kernels.cpu_lanes import LANES, at, load, store_rounded

_NUM_SUMS = 4  # an addition waits for the one before it


@emitted(lambda *_: types.float32)
def sum_of_squares(builder: Builder, kinds: Kinds, row: Value, count: Value) -> Value:
    """The sum of row[i] ** 2 for `count` elements."""
    sums = [lanes.Sum(builder) for _ in range(_NUM_SUMS)]

    def block(first: Value, num_vectors: int, mask: Value | None) -> None:
        for i in range(num_vectors):
            vector = load(builder, at(builder, row, first, i * LANES), kinds[0].dtype, mask)
            sums[i].add_product(builder, vector, vector)

    lanes.over_dims(builder, count, _NUM_SUMS, block)
    total = sums[0].get(builder)
    for other in sums[1:]:
        total = builder.fadd(total, other.get(builder))
    return lanes.first_lane(builder, lanes.sum_lanes(builder, [total]))


@emitted(nothing)
def add_to_row(builder: Builder, kinds: Kinds, row: Value, other: Value, count: Value) -> None:
    """row[i] += other[i] for `count` elements of one type."""
    kind = kinds[0].dtype

    def block(first: Value, _: int, mask: Value | None) -> None:
        target = at(builder, row, first)
        total = builder.fadd(load(builder, at(builder, other, first), kind, mask), load(builder, target, kind, mask))
        store_rounded(builder, total, target, kind, mask)

    lanes.over_dims(builder, count, 1, block)


@emitted(nothing)
def scale_row(
    builder: Builder, kinds: Kinds, row: Value, factor: Value, weight: Value, out: Value, count: Value
) -> None:
    """out[i] = row[i] * factor, rounded, times weight[i], for `count` elements of one type."""
    kind, factor = kinds[0].dtype, lanes.splat(builder, factor)

    def block(first: Value, _: int, mask: Value | None) -> None:
        scaled = builder.fmul(load(builder, at(builder, row, first), kind, mask), factor)
        scaled = lanes.rounded(builder, scaled, kind)
        product = builder.fmul(scaled, load(builder, at(builder, weight, first), kind, mask))
        store_rounded(builder, product, at(builder, out, first), kind, mask)

    lanes.over_dims(builder, count, 1, block)


@emitted(nothing)
def copy_row(builder: Builder, kinds: Kinds, row: Value, target: Value, count: Value) -> None:
    """target[i] = row[i] for `count` elements, rounded if they are of another type."""
    kind, target_kind = kinds[0].dtype, kinds[1].dtype
    if kind == target_kind:
        with cgutils.for_range(builder, count, intp=I64) as loop:
            builder.store(builder.load(at(builder, row, loop.index)), at(builder, target, loop.index))
        return

    def block(first: Value, _: int, mask: Value | None) -> None:
        vector = load(builder, at(builder, row, first), kind, mask)
        store_rounded(builder, vector, at(builder, target, first), target_kind, mask)

    lanes.over_dims(builder, count, 1, block)


def _rotation(is_scaled: bool) -> Any:
    @emitted(nothing)
    def rotate(
        builder: Builder,
        kinds: Kinds,
        row: Value,
        target: Value,
        cos: Value,
        sin: Value,
        half: Value,
        factor: Value,
        weight: Value,
    ) -> None:
        kind, target_kind, factor = kinds[0].dtype, kinds[1].dtype, lanes.splat(builder, factor)

        def take(first: Value, mask: Value | None) -> Value:
            vector = load(builder, at(builder, row, first), kind, mask)
            if not is_scaled:
                return vector
            weights = load(builder, at(builder, weight, first), kind, mask)
            return builder.fmul(builder.fmul(vector, factor), weights)

        def block(first: Value, _: int, mask: Value | None) -> None:
            second = builder.add(first, half)
            x, y = take(first, mask), take(second, mask)
            c, s = (load(builder, at(builder, table, first), mask=mask) for table in (cos, sin))
            turned = builder.fsub(builder.fmul(x, c), builder.fmul(y, s))
            store_rounded(builder, turned, at(builder, target, first), target_kind, mask)
            turned = builder.fadd(builder.fmul(y, c), builder.fmul(x, s))
            store_rounded(builder, turned, at(builder, target, second), target_kind, mask)

        lanes.over_dims(builder, half, 1, block)

    return rotate


# target[i], target[half + i] = the pair (row[i], row[half + i]) turned by the angle i, for `half` pairs; target may be
# the row, or of another type. `rotate_scaled` first multiplies the row by factor and weight; `rotate` makes nothing of
# them.
rotate, rotate_scaled = _rotation(False), _rotation(True)
