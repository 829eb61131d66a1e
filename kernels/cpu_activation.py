"""Activation functions of the CPU kernels, on whole vectors of float32 in place, as LLVM IR.

An element's result depends on nothing but the element. Errors are below 4e-7 of the result, or of 1e-6 beside it where
the result is nearly zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from numba.core import cgutils

from quire.kernels import cpu_lanes as lanes
from quire.kernels.cpu_elements import I64, Builder, Kinds, Value, emitted, nothing
from quire.kernels.cpu_lanes import LANES, at, constant, integer, load, store

NO_ACTIVATION: Final = 0

_LOG2_E = 1.4426950408889634
_SQRT_HALF = 0.7071067811865476
_SQRT_2_OVER_PI = 0.7978845608028654
# erfc(z) = exp(-z * z) * t * (c[0] + t * (c[1] + ...)), t = 1 / (1 + p * z), z >= 0: Abramowitz and Stegun, 7.1.26.
_ERFC_P = 0.3275911
_ERFC = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def _magnitude(builder: Builder, x: Value) -> Value:
    return builder.select(builder.fcmp_ordered("<", x, constant(0.0)), builder.fneg(x), x)


def _sigmoid_fraction(builder: Builder, x: Value, argument: Value) -> tuple[Value, Value]:
    """x * sigmoid(argument) as a fraction, from a power that cannot overflow; the denominator is between 1 and 2."""
    power = lanes.exp2(builder, builder.fmul(_magnitude(builder, argument), constant(-_LOG2_E)))
    numerator = builder.select(builder.fcmp_ordered("<", argument, constant(0.0)), builder.fmul(x, power), x)
    return numerator, builder.fadd(power, constant(1.0))


def _times_sigmoid(builder: Builder, x: Value, argument: Value) -> Value:
    numerator, denominator = _sigmoid_fraction(builder, x, argument)
    return builder.fdiv(numerator, denominator)


def _silu(builder: Builder, x: Value) -> Value:
    return _times_sigmoid(builder, x, x)


def silu_to_bfloat16(builder: Builder, x: Value) -> Value:
    """silu, exact to a few units of the last place of float32, for results that are rounded to bfloat16."""
    numerator, denominator = _sigmoid_fraction(builder, x, x)
    return builder.fmul(numerator, lanes.inverse(builder, denominator))


def _gelu_tanh(builder: Builder, x: Value) -> Value:
    """0.5 * x * (1 + tanh(u)) is x * sigmoid(2 * u)."""
    cube = builder.fmul(builder.fmul(x, x), x)
    inner = lanes.multiply_add(builder, cube, constant(0.044715), x)
    return _times_sigmoid(builder, x, builder.fmul(inner, constant(2.0 * _SQRT_2_OVER_PI)))


def _gelu(builder: Builder, x: Value) -> Value:
    z = builder.fmul(_magnitude(builder, x), constant(_SQRT_HALF))
    t = builder.fdiv(constant(1.0), lanes.multiply_add(builder, z, constant(_ERFC_P), constant(1.0)))
    series = constant(_ERFC[-1])
    for coefficient in (*_ERFC[-2::-1], 0.0):
        series = lanes.multiply_add(builder, series, t, constant(coefficient))
    power = lanes.exp2(builder, builder.fmul(builder.fmul(z, z), constant(-_LOG2_E)))
    half = builder.fmul(builder.fmul(x, constant(0.5)), builder.fmul(series, power))
    return builder.select(builder.fcmp_ordered("<", x, constant(0.0)), half, builder.fsub(x, half))


def _relu(builder: Builder, x: Value) -> Value:
    return builder.select(builder.fcmp_ordered("<", x, constant(0.0)), constant(0.0), x)


_FUNCTIONS: dict[str, Callable[[Builder, Value], Value]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
}
CODES: Final = {name: code for code, name in enumerate(_FUNCTIONS, NO_ACTIVATION + 1)}
"""Number of each function, as `activate` takes it."""


@emitted(nothing)
def activate(builder: Builder, kinds: Kinds, row: Value, count: Value, code: Value) -> None:
    """row[i] = f(row[i]) for `count` (a multiple of LANES) float32, f by its number; NO_ACTIVATION leaves them."""
    for name, function in _FUNCTIONS.items():
        is_it = builder.icmp_signed("==", code, integer(CODES[name]))
        with builder.if_then(is_it):  # noqa: SIM117
            with cgutils.for_range_slice(builder, integer(0), count, integer(LANES), I64) as (index, _):
                target = at(builder, row, index)
                store(builder, function(builder, load(builder, target)), target)


def _elementwise(name: str) -> Callable[..., None]:
    @emitted(nothing)
    def operate(builder: Builder, kinds: Kinds, row: Value, other: Value, count: Value) -> None:
        with cgutils.for_range_slice(builder, integer(0), count, integer(LANES), I64) as (index, _):
            target = at(builder, row, index)
            value = getattr(builder, name)(load(builder, target), load(builder, at(builder, other, index)))
            store(builder, value, target)

    return operate  # type: ignore[no-any-return]


# row[i] = row[i] + other[i], and times, for `count` (a multiple of LANES) float32.
add_row = _elementwise("fadd")
multiply_row = _elementwise("fmul")


@emitted(nothing)
def round_row(builder: Builder, kinds: Kinds, row: Value, target: Value, count: Value) -> None:
    """target[i] = row[i], rounded to target's type, for `count` float32."""

    def block(first: Value, _: int, mask: Value | None) -> None:
        vector = load(builder, at(builder, row, first), mask=mask)
        lanes.store_rounded(builder, vector, at(builder, target, first), kinds[1].dtype, mask)

    lanes.over_dims(builder, count, 1, block)
