"""int8 codes on the CPU: one vector of a token becomes codes and a scale, as `quantization.quantize` defines them."""

from __future__ import annotations

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from quire.kernels import cpu_lanes as lanes
from quire.kernels.cpu_elements import F32, I32, Builder, Kinds, Value, emitted
from quire.kernels.cpu_lanes import LANES, at, load
from quire.kernels.quantization import LARGEST_CODE, SMALLEST_RANGE

_INTEGERS = ir.VectorType(I32, LANES)
_MAGNITUDE_BITS = 0x7FFFFFFF


@emitted(lambda *_: types.float32)
def store_codes(builder: Builder, kinds: Kinds, row: Value, head_dim: Value, codes: Value) -> Value:
    """codes[i] = row[i] in units of the scale, which is returned."""
    # Magnitudes are compared by their bits: in that order NaN is above all numbers.
    best = cgutils.alloca_once(builder, _INTEGERS)
    builder.store(ir.Constant(_INTEGERS, [0] * LANES), best)

    def compare(dim: Value, _: int, mask: Value | None) -> None:
        bits = builder.bitcast(load(builder, at(builder, row, dim), kinds[0].dtype, mask), _INTEGERS)
        bits = builder.and_(bits, ir.Constant(_INTEGERS, [_MAGNITUDE_BITS] * LANES))
        before = builder.load(best)
        builder.store(builder.select(builder.icmp_signed(">", bits, before), bits, before), best)

    lanes.over_dims(builder, head_dim, 1, compare)
    smallest = builder.bitcast(ir.Constant(F32, SMALLEST_RANGE), I32)
    bits = lanes.call(builder, f"llvm.vector.reduce.smax.v{LANES}i32", I32, [builder.load(best)])
    largest = builder.bitcast(builder.select(builder.icmp_signed(">", bits, smallest), bits, smallest), F32)
    bits = builder.bitcast(builder.fmul(largest, ir.Constant(F32, 1 / LARGEST_CODE[torch.int8])), I32)
    quiet = ir.Constant(I32, 0x7FC00000)
    bits = builder.select(builder.icmp_signed("<", bits, quiet), bits, quiet)
    bits = builder.and_(builder.add(bits, ir.Constant(I32, 0xFFFF)), ir.Constant(I32, -0x10000))
    scale = builder.bitcast(bits, F32)
    inverse = lanes.splat(builder, builder.fdiv(ir.Constant(F32, 1.0), scale))

    def convert(dim: Value, _: int, mask: Value | None) -> None:
        numbers = builder.fmul(load(builder, at(builder, row, dim), kinds[0].dtype, mask), inverse)
        shifted = builder.fadd(numbers, lanes.constant(lanes.ROUND))
        vector = builder.trunc(builder.bitcast(shifted, _INTEGERS), ir.VectorType(ir.IntType(8), LANES))
        lanes.store_elements(builder, vector, at(builder, codes, dim), mask)

    lanes.over_dims(builder, head_dim, 1, convert)
    return scale
