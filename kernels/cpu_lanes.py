"""The vector vocabulary of the CPU kernels: LANES float32 at a time, as LLVM IR.

LLVM's loop vectoriser neither blocks for registers nor uses the full width of AVX-512, so the inner loops are emitted
in these terms. They are plain IR, which LLVM fits to any CPU: only the speed depends on the machine. No fast-math flag
is set, so NaN and infinity go through as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils

from quire.kernels.cpu_elements import F32, I32, I64, Builder, Value, has_feature, narrow, widen

LANES = 16 if has_feature("avx512f") else 8
NUM_SUMS = LANES  # vectors that stay in registers as sums: half of the 32 of AVX-512, of the 16 of AVX2
LOWEST = -3.4028234663852886e38

_VECTOR, _INTEGERS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)

# 2 ** f = 1 + f * (c[0] + f * (c[1] + ...)) on [-0.5, 0.5], relative error 2e-9 before rounding.
_EXP2 = (
    *(0.6931471824645996, 0.24022647738456726, 0.055503323674201965),
    *(0.00961843691766262, 0.0013398873852565885, 0.00015353361959569156),
)
ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits of the sum


@numba.njit
def padded(count: int) -> int:
    """`count` rounded up to whole vectors."""
    return -(-count // LANES) * LANES


def integer(value: int) -> Value:
    return ir.Constant(I64, value)


def constant(value: float) -> Value:
    return ir.Constant(_VECTOR, [value] * LANES)


def first_lane(builder: Builder, vector: Value) -> Value:
    return builder.extract_element(vector, ir.Constant(I32, 0))


def shuffle(builder: Builder, x: Value, y: Value, lanes: list[int]) -> Value:
    """Lane i is lane lanes[i] of x and y put together."""
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def splat(builder: Builder, scalar: Value) -> Value:
    undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    single = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return shuffle(builder, single, single, [0] * LANES)


def call(builder: Builder, name: str, result: Value, arguments: list[Value]) -> Value:
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def multiply_add(builder: Builder, x: Value, y: Value, z: Value) -> Value:
    return call(builder, f"llvm.fmuladd.v{LANES}f32", _VECTOR, [x, y, z])


def at(builder: Builder, pointer: Value, *offsets: Value | int) -> Value:
    """`pointer` moved on by the sum of `offsets`, in elements."""
    for offset in offsets:
        pointer = builder.gep(pointer, [integer(offset) if isinstance(offset, int) else offset])
    return pointer


def row_at(builder: Builder, pointer: Value, row: Value | int, stride: Value, *offsets: Value | int) -> Value:
    index = integer(row) if isinstance(row, int) else row
    return at(builder, pointer, builder.mul(index, stride), *offsets)


def load(builder: Builder, pointer: Value, kind: types.Type = types.float32, mask: Value | None = None) -> Value:
    """LANES elements widened to float32; those outside `mask` are not read and come as zero."""
    vector_type = ir.VectorType(pointer.type.pointee, LANES)
    vector_pointer = builder.bitcast(pointer, vector_type.as_pointer())
    size = kind.bitwidth // 8
    if mask is None:
        return widen(builder, builder.load(vector_pointer, align=size), kind)
    name = f"llvm.masked.load.v{LANES}{'f32' if kind == types.float32 else f'i{kind.bitwidth}'}.p0"
    arguments = [vector_pointer, ir.Constant(I32, size), mask, ir.Constant(vector_type, None)]
    return widen(builder, call(builder, name, vector_type, arguments), kind)


def store(builder: Builder, vector: Value, pointer: Value) -> None:
    builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer()), align=4)


def store_elements(builder: Builder, vector: Value, pointer: Value, mask: Value | None) -> None:
    """Store LANES float32 or integers; memory outside `mask` is not touched."""
    element = vector.type.element
    size, name = (4, "f32") if element == F32 else (element.width // 8, str(element))
    vector_pointer = builder.bitcast(pointer, vector.type.as_pointer())
    if mask is None:
        builder.store(vector, vector_pointer, align=size)
        return
    arguments = [vector, vector_pointer, ir.Constant(I32, size), mask]
    call(builder, f"llvm.masked.store.v{LANES}{name}.p0", ir.VoidType(), arguments)


def rounded(builder: Builder, vector: Value, kind: types.Type) -> Value:
    """float32 with the values that elements of `kind` would have."""
    return widen(builder, narrow(builder, vector, kind), kind)


def store_rounded(builder: Builder, vector: Value, pointer: Value, kind: types.Type, mask: Value | None) -> None:
    """Store LANES float32 as elements of `kind`; memory outside `mask` is not touched."""
    store_elements(builder, narrow(builder, vector, kind), pointer, mask)


CONVERTS_PAIRS = LANES == 16 and has_feature("avx512bf16")
"""Whether the processor rounds two vectors to bfloat16 in one instruction."""


def store_bfloat16_pair(builder: Builder, first: Value, second: Value, pointer: Value) -> None:
    """Store two vectors one behind the other, rounded to bfloat16; what is below 2 ** -126 becomes zero."""
    pair = ir.VectorType(ir.IntType(16), 2 * LANES)
    rounded_pair = call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", pair, [second, first])
    builder.store(rounded_pair, builder.bitcast(pointer, pair.as_pointer()), align=2)


def inverse(builder: Builder, x: Value) -> Value:
    """1 / x to two units of the last place, for normal x; a division takes four times as long."""
    if LANES != 16:
        return builder.fdiv(constant(1.0), x)
    everywhere = ir.Constant(ir.IntType(16), -1)
    estimate = call(builder, "llvm.x86.avx512.rcp14.ps.512", _VECTOR, [x, constant(0.0), everywhere])
    error = multiply_add(builder, builder.fneg(x), estimate, constant(1.0))
    return multiply_add(builder, estimate, error, estimate)


def prefetch(builder: Builder, pointer: Value, count: Value, kind: types.Type) -> None:
    """Have the lines of `count` elements brought into the cache's second level; any address will do."""
    line = integer(64 * 8 // kind.bitwidth)
    with cgutils.for_range_slice(builder, integer(0), count, line, I64) as (index, _):
        prefetch_line(builder, at(builder, pointer, index), locality=2)


def prefetch_line(builder: Builder, pointer: Value, locality: int) -> None:
    """Have the line at `pointer` brought into the cache: with `locality` 3 all levels, 2 not the first."""
    address = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    read, keep, data = (ir.Constant(I32, option) for option in (0, locality, 1))
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [address, read, keep, data])


class Sum:
    """A vector that grows in a loop. LLVM keeps it in a register."""

    def __init__(self, builder: Builder, start: Value | None = None) -> None:
        self._slot = cgutils.alloca_once(builder, _VECTOR)
        builder.store(constant(0.0) if start is None else start, self._slot)

    def get(self, builder: Builder) -> Value:
        return builder.load(self._slot)

    def set(self, builder: Builder, value: Value) -> None:
        builder.store(value, self._slot)

    def add_product(self, builder: Builder, x: Value, y: Value) -> None:
        self.set(builder, multiply_add(builder, x, y, self.get(builder)))


def over_dims(
    builder: Builder, size: Value, num_vectors: int, body: Callable[[Value, int, Value | None], None]
) -> None:
    """body(first element, vectors, mask) over `size` elements: `num_vectors` (a power of two) at a time while there
    are so many, then half as many and so on, then the masked rest."""
    start = integer(0)
    while num_vectors:
        block = num_vectors * LANES
        end = builder.and_(size, integer(-block))
        with cgutils.for_range_slice(builder, start, end, integer(block), I64) as (first, _):
            body(first, num_vectors, None)
        start, num_vectors = end, num_vectors // 2
    rest = builder.sub(size, start)
    with builder.if_then(builder.icmp_signed(">", rest, integer(0)), likely=False):
        lane_indices = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))
        body(start, 1, builder.icmp_signed("<", lane_indices, splat(builder, rest)))


def sum_lanes(builder: Builder, vectors: list[Value]) -> Value:
    """The vector whose lane i is the sum of the lanes of vectors[i]; there are at most LANES."""
    count, size = 1 << (len(vectors) - 1).bit_length(), LANES
    vectors = vectors + [constant(0.0)] * (count - len(vectors))

    def fold(x: Value, y: Value, low: list[int]) -> Value:
        low = low + low[:1] * (LANES - len(low))
        high = [lane + size // 2 for lane in low]
        return builder.fadd(shuffle(builder, x, y, low), shuffle(builder, x, y, high))

    while size > LANES // count:
        firsts = [side + group for side in (0, LANES) for group in range(0, LANES, size)]
        low = [first + lane for first in firsts for lane in range(size // 2)]
        vectors = [fold(x, y, low) for x, y in zip(vectors[0::2], vectors[1::2], strict=True)]
        size //= 2
    while size > 1:
        low = [index * size + lane for index in range(count) for lane in range(size // 2)]
        vectors = [fold(vectors[0], vectors[0], low)]
        size //= 2
    return vectors[0]


def larger(builder: Builder, x: Value, y: Value) -> Value:
    """The larger of x and y, and y where x is NaN."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def max_lane(builder: Builder, vector: Value) -> Value:
    distance = LANES // 2
    while distance:
        other = shuffle(builder, vector, vector, [(lane + distance) % LANES for lane in range(LANES)])
        vector = larger(builder, other, vector)
        distance //= 2
    return first_lane(builder, vector)


def transpose(builder: Builder, rows: list[Value]) -> list[Value]:
    """LANES vectors as a square matrix, transposed: bit by bit, the row index changes places with the lane index."""
    distance = 1
    while distance < LANES:
        low = [lane if not lane & distance else LANES + lane - distance for lane in range(LANES)]
        high = [lane + distance if not lane & distance else LANES + lane for lane in range(LANES)]
        for row in range(LANES):
            if not row & distance:
                x, y = rows[row], rows[row + distance]
                rows[row] = shuffle(builder, x, y, low)
                rows[row + distance] = shuffle(builder, x, y, high)
        distance *= 2
    return rows


def exp2(builder: Builder, exponent: Value) -> Value:
    """2 ** exponent for exponents <= 0 or NaN: 2 ** round(x) by its bits, the rest by a polynomial.

    Below 2 ** -126 it is 0, so exactly 0 for -inf; 2 ** 0 is exactly 1.
    """
    tiny = builder.fcmp_ordered("<", exponent, constant(-126.0))
    if LANES == 16:  # AVX-512 scales by a power of two in one instruction
        whole = call(builder, f"llvm.roundeven.v{LANES}f32", _VECTOR, [exponent])
        power = _exp2_of_fraction(builder, builder.fsub(exponent, whole))
        everywhere, as_is = ir.Constant(ir.IntType(16), -1), ir.Constant(I32, 4)
        arguments = [power, whole, constant(0.0), everywhere, as_is]
        power = call(builder, "llvm.x86.avx512.mask.scalef.ps.512", _VECTOR, arguments)
        return builder.select(tiny, constant(0.0), power)
    exponent = builder.select(tiny, constant(-126.0), exponent)
    shifted = builder.fadd(exponent, constant(ROUND))
    power = _exp2_of_fraction(builder, builder.fsub(exponent, builder.fsub(shifted, constant(ROUND))))
    bits = builder.shl(builder.bitcast(shifted, _INTEGERS), ir.Constant(_INTEGERS, [23] * LANES))
    bits = builder.add(bits, ir.Constant(_INTEGERS, [127 << 23] * LANES))
    power = builder.fmul(power, builder.bitcast(bits, _VECTOR))
    return builder.select(tiny, constant(0.0), power)


def _exp2_of_fraction(builder: Builder, fraction: Value) -> Value:
    power = constant(_EXP2[-1])
    for coefficient in (*_EXP2[-2::-1], 1.0):
        power = multiply_add(builder, power, fraction, constant(coefficient))
    return power
