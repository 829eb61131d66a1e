"""Elements and addresses inside the CPU kernels: reading float32, float16, bfloat16 and int8 in place.

Numba has neither bfloat16 nor half-precision arithmetic on a CPU, so float16 travels as int16 and bfloat16 as uint16
bit patterns: the type of a pointer says what it points to. What Numba does not offer is emitted as LLVM IR.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

FLOAT32, FLOAT16, BFLOAT16, INT8 = types.float32, types.int16, types.uint16, types.int8

Value = Any  # of llvmlite
Builder = Any
Kinds = tuple[Any, ...]  # Numba's types of the arguments

F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_F16, _I16 = ir.HalfType(), ir.IntType(16)


def emitted(result: Callable[..., types.Type]) -> Callable[[Callable[..., Value]], Any]:
    """A decorator that makes `emit(builder, kinds, *arguments) -> value` a function that kernels can call.

    Integers arrive as int64, floating-point numbers as float32 and pointers as they are; `result(*kinds)` is the type
    of what it returns.
    """

    def decorate(emit: Callable[..., Value]) -> Any:
        @functools.wraps(emit)
        def typed(typing_context: Any, *given: types.Type) -> tuple[Any, Callable[..., Value]]:
            def kind(argument: types.Type) -> types.Type:
                if isinstance(argument, types.Integer):
                    return types.int64
                return types.float32 if isinstance(argument, types.Float) else argument

            kinds = tuple(kind(argument) for argument in given)

            def generate(context: Any, builder: Builder, signature: Any, arguments: tuple[Value, ...]) -> Value:
                value = emit(builder, kinds, *arguments)
                return context.get_dummy_value() if value is None else value

            return result(*kinds)(*kinds), generate

        parameters = list(inspect.signature(emit).parameters.values())
        context = parameters[0].replace(name="typing_context")
        typed.__signature__ = inspect.Signature([context, *parameters[2:]])  # type: ignore[attr-defined]
        return intrinsic(typed)

    return decorate


def nothing(*_: types.Type) -> types.Type:
    return types.void


def _like(scalar: Value, shape: Value) -> Value:
    """The type `scalar`, as a vector if `shape` is one."""
    return ir.VectorType(scalar, shape.count) if isinstance(shape, ir.VectorType) else scalar


def _integer(value: int, shape: Value) -> Value:
    return ir.Constant(shape, [value] * shape.count if isinstance(shape, ir.VectorType) else value)


def _target() -> tuple[str, str]:
    """The architecture and the features that Numba compiles for."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return triple.partition("-")[0], features


def architecture() -> str:
    return _target()[0]


def has_feature(name: str) -> bool:
    return f"+{name}" in _target()[1].split(",")


_CONVERTS_HALF = has_feature("f16c") or architecture() in ("aarch64", "arm64")  # elsewhere LLVM calls what is not there


def widen(builder: Builder, element: Value, kind: types.Type) -> Value:
    """float32 from an element or a vector of elements."""
    if kind == FLOAT32:
        return element
    if kind == FLOAT16:
        if not _CONVERTS_HALF:
            return widen_half_bits(builder, element)
        return builder.fpext(builder.bitcast(element, _like(_F16, element.type)), _like(F32, element.type))
    integers = _like(I32, element.type)
    if kind == INT8:
        return builder.sitofp(builder.sext(element, integers), _like(F32, element.type))
    bits = builder.shl(builder.zext(element, integers), _integer(16, integers))
    return builder.bitcast(bits, _like(F32, element.type))


def narrow(builder: Builder, value: Value, kind: types.Type) -> Value:
    """The element nearest to a float32, ties to even; NaN stays NaN."""
    if kind == FLOAT32:
        return value
    short = _like(_I16, value.type)
    if kind == FLOAT16:
        if not _CONVERTS_HALF:
            return narrow_half_bits(builder, value)
        return builder.bitcast(builder.fptrunc(value, _like(_F16, value.type)), short)
    integers = _like(I32, value.type)
    bits = builder.bitcast(value, integers)
    odd = builder.and_(builder.lshr(bits, _integer(16, integers)), _integer(1, integers))
    rounded = builder.add(bits, builder.add(odd, _integer(0x7FFF, integers)))
    quiet = builder.or_(bits, _integer(0x400000, integers))
    bits = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
    return builder.trunc(builder.lshr(bits, _integer(16, integers)), short)


def widen_half_bits(builder: Builder, element: Value) -> Value:
    """float16 to float32 without the instruction: shift the fields, then correct the exponent by 2 ** 112."""
    integers, wide = _like(I32, element.type), _like(F32, element.type)
    bits = builder.zext(element, integers)
    sign = builder.shl(builder.and_(bits, _integer(0x8000, integers)), _integer(16, integers))
    fields = builder.shl(builder.and_(bits, _integer(0x7FFF, integers)), _integer(13, integers))
    scale = builder.bitcast(_integer((112 + 127) << 23, integers), wide)
    finite = builder.bitcast(builder.fmul(builder.bitcast(fields, wide), scale), integers)
    special = builder.or_(fields, _integer(0x7F800000, integers))
    is_special = builder.icmp_unsigned(">=", fields, _integer(0x7C00 << 13, integers))
    return builder.bitcast(builder.or_(sign, builder.select(is_special, special, finite)), wide)


def narrow_half_bits(builder: Builder, value: Value) -> Value:
    """float32 to float16 without the instruction, ties to even."""
    integers, wide = _like(I32, value.type), value.type
    bits = builder.bitcast(value, integers)
    sign = builder.lshr(builder.and_(bits, _integer(0x80000000, integers)), _integer(16, integers))
    bits = builder.and_(bits, _integer(0x7FFFFFFF, integers))
    odd = builder.and_(builder.lshr(bits, _integer(13, integers)), _integer(1, integers))
    rounded = builder.add(bits, builder.add(odd, _integer(0xFFF - (112 << 23), integers)))
    normal = builder.lshr(rounded, _integer(13, integers))
    # Added to 0.5, whose last place is 2 ** -24, a number below 2 ** -14 is rounded by the addition itself.
    half = _integer(126 << 23, integers)
    total = builder.fadd(builder.bitcast(bits, wide), builder.bitcast(half, wide))
    subnormal = builder.sub(builder.bitcast(total, integers), half)
    result = builder.select(builder.icmp_unsigned("<", bits, _integer(113 << 23, integers)), subnormal, normal)
    is_nan = builder.icmp_unsigned(">", bits, _integer(0x7F800000, integers))
    special = builder.select(is_nan, _integer(0x7E00, integers), _integer(0x7C00, integers))
    result = builder.select(builder.icmp_unsigned(">=", bits, _integer(143 << 23, integers)), special, result)
    return builder.trunc(builder.or_(sign, result), _like(_I16, value.type))


@emitted(lambda pointer, index: types.float32)
def read(builder: Builder, kinds: Kinds, pointer: Value, index: Value) -> Value:
    """pointer[index] as float32."""
    return widen(builder, builder.load(builder.gep(pointer, [index])), kinds[0].dtype)


@emitted(nothing)
def write(builder: Builder, kinds: Kinds, pointer: Value, index: Value, value: Value) -> None:
    """pointer[index] = the float32 `value`, rounded."""
    builder.store(narrow(builder, value, kinds[0].dtype), builder.gep(pointer, [index]))


@emitted(lambda pointer, count: pointer)
def move(builder: Builder, kinds: Kinds, pointer: Value, count: Value) -> Value:
    """`pointer` moved on by `count` elements."""
    return builder.gep(pointer, [count])


@emitted(lambda address, like: like)
def pointer_to(builder: Builder, kinds: Kinds, address: Value, like: Value) -> Value:
    """The pointer to an address, of the type of `like`."""
    return builder.inttoptr(address, like.type)


@emitted(lambda pointer: types.int64)
def address_of(builder: Builder, kinds: Kinds, pointer: Value) -> Value:
    return builder.ptrtoint(pointer, I64)


def _pointer_of(target: types.Type, element: Value) -> Any:
    @emitted(lambda address: types.CPointer(target))
    def cast(builder: Builder, kinds: Kinds, address: Value) -> Value:
        if isinstance(kinds[0], types.CPointer):
            return builder.bitcast(address, element.as_pointer())
        return builder.inttoptr(address, element.as_pointer())

    return cast


# Each makes a pointer of an address or of another pointer.
int8_pointer = _pointer_of(types.int8, ir.IntType(8))
bfloat16_pointer = _pointer_of(BFLOAT16, _I16)
float16_pointer = _pointer_of(FLOAT16, _I16)
float32_pointer = _pointer_of(types.float32, F32)
float64_pointer = _pointer_of(types.float64, ir.DoubleType())
int32_pointer = _pointer_of(types.int32, I32)
int64_pointer = _pointer_of(types.int64, I64)


@emitted(lambda function: types.int64)
def call_for_number(builder: Builder, kinds: Kinds, function: Value) -> Value:
    """What the function at an address returns, which takes nothing and returns an int."""
    function_type = ir.FunctionType(I32, [])
    return builder.sext(builder.call(builder.inttoptr(function, function_type.as_pointer()), []), I64)


@emitted(lambda counter: types.int64)
def take(builder: Builder, kinds: Kinds, counter: Value) -> Value:
    """The int64 at `counter`, which goes up by one; orders memory between threads (acquire and release)."""
    return builder.atomic_rmw("add", counter, ir.Constant(I64, 1), "acq_rel")
