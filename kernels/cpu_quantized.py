"""Products of quantized weights: the inner loops of the CPU's quantized linear layers, as LLVM IR.

Weights are 8 or 4 bits, kept without a sign: w + 128 or w + 8. Inputs are 16 bits, with one scale for each row and
group of inputs, which is more exact than bfloat16. A product of the two is made of two byte by byte: an input is
256 * high + low, and a vector instruction adds up four products of an unsigned and a signed byte in each lane. Sums of
a group are integers, exact in whatever order and by whatever instruction; what the weights have too much of is taken
off by starting at -zero_point * (sum of the inputs). Groups are added in float32, in their order.

A panel of PANEL output features holds for four input features after another (of 4 bits: for eight) PANEL words of four
bytes; in a byte of two weights the low half belongs to the first four features, the high half to the other four.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils

from quire.kernels import cpu_lanes as lanes
from quire.kernels.cpu_elements import BFLOAT16, F32, I32, I64, Builder, Kinds, Value, emitted, has_feature, nothing
from quire.kernels.cpu_lanes import LANES, at, constant, integer, load, row_at, store
from quire.kernels.cpu_matrix import PANEL, panels_together

NUM_VECTORS = PANEL // LANES
ROWS_TOGETHER = 3
"""Rows that share the weights that are in registers: their sums, of which the byte product needs two, fill the rest."""
ROWS_PER_TILE = 48
"""Rows whose sums a tile holds while a panel is read once; with a group's weights they fill the first cache."""
ZERO_POINTS = {8: 128, 4: 8}
GROUP_BYTES = 2
"""Of memory for each input of a group, the last group's padding included."""
MAX_INPUT = 32639
"""Largest magnitude of a quantized input: 127 * 256 + 127."""
SMALLEST = 1e-30
"""Groups whose inputs are all smaller count as zeros: the inverse of their scale would not be finite."""

HAS_BYTE_PRODUCT = has_feature("avx512vnni") if LANES == 16 else has_feature("avxvnni")
_HAS_SHORT_PRODUCT = has_feature("avx512bw") if LANES == 16 else has_feature("avx2")

_BYTE, _SHORT = ir.IntType(8), ir.IntType(16)
_WORDS, _FLOATS = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)
_PAIRS = ir.VectorType(_SHORT, 2 * LANES)
_BYTES, _SHORTS = ir.VectorType(_BYTE, LANES), ir.VectorType(_SHORT, LANES)
_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits of the sum
_ROUND_BITS = 0x4B400000


def _words(value: int) -> Value:
    return ir.Constant(_WORDS, [value] * LANES)


@emitted(nothing)
def quantize_group(builder: Builder, kinds: Kinds, x: Value, count: Value, out: Value, factors: Value) -> None:
    """Quantize x[:count] to the bytes at `out`; at `factors` the scale, and minus the sum of the integers (int32).

    Four inputs take eight bytes: the high bytes, then the low ones; without the byte product they are int16 in the
    order 0, 2, 1, 3. The scale is NaN if an input is NaN or infinite, so that it shows in all that is made of them.
    `out` has room for whole vectors.
    """
    kind = kinds[0].dtype
    largest, check = lanes.Sum(builder), lanes.Sum(builder)

    def look(first: Value, _: int, mask: Value | None) -> None:
        vector = load(builder, at(builder, x, first), kind, mask)
        magnitude = builder.select(builder.fcmp_ordered("<", vector, constant(0.0)), builder.fneg(vector), vector)
        largest.set(builder, lanes.larger(builder, magnitude, largest.get(builder)))
        check.set(builder, builder.fadd(check.get(builder), builder.fmul(vector, constant(0.0))))

    lanes.over_dims(builder, count, 1, look)
    peak = lanes.max_lane(builder, largest.get(builder))
    is_small = builder.fcmp_ordered("<", peak, ir.Constant(F32, SMALLEST))
    inverse = builder.select(is_small, ir.Constant(F32, 0.0), builder.fdiv(ir.Constant(F32, MAX_INPUT), peak))
    scale = builder.select(is_small, ir.Constant(F32, 0.0), builder.fdiv(peak, ir.Constant(F32, MAX_INPUT)))
    factor, total = lanes.splat(builder, inverse), cgutils.alloca_once(builder, _WORDS)
    builder.store(_words(0), total)
    target = builder.inttoptr(out, _BYTE.as_pointer())

    def convert(first: Value, _: int, mask: Value | None) -> None:
        vector = load(builder, at(builder, x, first), kind, mask)
        shifted = builder.fadd(builder.fmul(vector, factor), constant(_ROUND))
        numbers = builder.sub(builder.bitcast(shifted, _WORDS), _words(_ROUND_BITS))
        builder.store(builder.add(builder.load(total), numbers), total)
        pieces = _input_bytes(builder, numbers)
        place = row_at(builder, target, first, integer(GROUP_BYTES))
        builder.store(pieces, builder.bitcast(place, pieces.type.as_pointer()), align=2)

    lanes.over_dims(builder, count, 1, convert)
    # Sums of x * 0 are 0 or NaN.
    scale = builder.fadd(scale, lanes.first_lane(builder, lanes.sum_lanes(builder, [check.get(builder)])))
    builder.store(scale, builder.inttoptr(factors, F32.as_pointer()))
    reduced = lanes.call(builder, f"llvm.vector.reduce.add.v{LANES}i32", I32, [builder.load(total)])
    sum_place = at(builder, builder.inttoptr(factors, I32.as_pointer()), 1)
    builder.store(builder.sub(ir.Constant(I32, 0), reduced), sum_place)


def _input_bytes(builder: Builder, numbers: Value) -> Value:
    """The 2 * LANES bytes of LANES quantized inputs, as the products want them."""
    fours = range(0, LANES, 4)
    if not HAS_BYTE_PRODUCT:
        shorts = builder.trunc(numbers, _SHORTS)
        return lanes.shuffle(builder, shorts, shorts, [first + i for first in fours for i in (0, 2, 1, 3)])
    high = builder.ashr(builder.add(numbers, _words(128)), _words(8))
    low_bytes = builder.trunc(numbers, _BYTES)  # as numbers with a sign they are what the high bytes leave
    order = [side + first + i for first in fours for side in (0, LANES) for i in range(4)]
    return lanes.shuffle(builder, builder.trunc(high, _BYTES), low_bytes, order)


class _Sums:
    """The integer sums of one row and one vector of output features."""

    def __init__(self, builder: Builder, start: Value) -> None:
        starts = [_words(0), start] if HAS_BYTE_PRODUCT else [start]
        self._slots = [cgutils.alloca_once(builder, _WORDS) for _ in starts]
        for slot, value in zip(self._slots, starts, strict=True):
            builder.store(value, slot)

    def add_products(self, builder: Builder, weights: Value, inputs: Value, slot: int = 0) -> None:
        """Of unsigned weights in each lane, four bytes or two int16, with a word of inputs, the same in each lane."""
        total = _add_products(builder, builder.load(self._slots[slot]), weights, inputs)
        builder.store(total, self._slots[slot])

    def get(self, builder: Builder) -> Value:
        *high, low = (builder.load(slot) for slot in self._slots)
        return builder.add(builder.shl(high[0], _words(8)), low) if high else low


def _add_products(builder: Builder, total: Value, weights: Value, inputs: Value) -> Value:
    """total plus, in each lane, four products of an unsigned and a signed byte, or two of int16."""
    if HAS_BYTE_PRODUCT:
        return lanes.call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * LANES}", _WORDS, [total, weights, inputs])
    if _HAS_SHORT_PRODUCT:
        arguments = [builder.bitcast(weights, _PAIRS), builder.bitcast(inputs, _PAIRS)]
        name = "llvm.x86.avx512.pmaddw.d.512" if LANES == 16 else "llvm.x86.avx2.pmadd.wd"
        return builder.add(total, lanes.call(builder, name, _WORDS, arguments))
    sixteen = _words(16)
    low = builder.mul(builder.and_(weights, _words(0xFFFF)), builder.ashr(builder.shl(inputs, sixteen), sixteen))
    high = builder.mul(builder.lshr(weights, sixteen), builder.ashr(inputs, sixteen))
    return builder.add(total, builder.add(low, high))


@emitted(nothing)
def multiply_group(
    builder: Builder,
    kinds: Kinds,
    bits: Value,
    x: Value,
    factors: Value,
    num_rows: Value,
    group_size: Value,
    num_lines: Value,
    weights: Value,
    fetch_next: Value,
    scales: Value,
    num_panels: Value,
    panel_bytes: Value,
    scale_bytes: Value,
    tile: Value,
) -> None:
    """tile[p, row, :] += x[row] @ group of panel p, for up to ROWS_TOGETHER rows and one panel or `panels_together` of
    them; all but the tile are integers and addresses.

    Args:
        x: [num_rows, group_size * GROUP_BYTES] bytes.
        factors: [num_rows, 2]: scale and minus the sum, of `quantize_group`.
        num_lines: the group's lines of PANEL words.
        weights: those lines, of the first panel.
        scales: [PANEL] bfloat16 that the group's sums are multiplied with, if `bits` is 4; of the first panel.
        panel_bytes, scale_bytes: from a panel's weights, or scales, to the next one's.
        tile: [num_panels, num_rows, PANEL] float32.
    """
    prefetches = builder.icmp_signed("!=", fetch_next, integer(0))
    for width in ZERO_POINTS:
        for count in range(1, ROWS_TOGETHER + 1):
            for panel_count in {1, panels_together.py_func(count)}:
                is_case = builder.icmp_signed("==", bits, integer(width))
                is_case = builder.and_(is_case, builder.icmp_signed("==", num_rows, integer(count)))
                is_case = builder.and_(is_case, builder.icmp_signed("==", num_panels, integer(panel_count)))
                panels = range(panel_count)
                with builder.if_then(is_case):
                    _emit_group(
                        builder,
                        width,
                        count,
                        x,
                        factors,
                        group_size,
                        num_lines,
                        [builder.add(weights, builder.mul(panel_bytes, integer(panel))) for panel in panels],
                        prefetches,
                        [builder.add(scales, builder.mul(scale_bytes, integer(panel))) for panel in panels],
                        tile,
                    )


def _emit_group(
    builder: Builder,
    bits: int,
    count: int,
    x: Value,
    factors: Value,
    group_size: Value,
    num_lines: Value,
    weights: list[Value],
    prefetches: Value,
    scales: list[Value],
    tile: Value,
) -> None:
    panels = [builder.inttoptr(address, I32.as_pointer()) for address in weights]
    inputs = builder.inttoptr(x, I32.as_pointer())
    sums_of_inputs = builder.inttoptr(factors, I32.as_pointer())
    zero_point = _words(ZERO_POINTS[bits])
    sums = []
    for row in range(count):
        excess = builder.mul(lanes.splat(builder, builder.load(at(builder, sums_of_inputs, 2 * row + 1))), zero_point)
        sums.append([_Sums(builder, excess) for _ in range(len(panels) * NUM_VECTORS)])
    words_per_row = builder.lshr(group_size, integer(1))
    rows = [row_at(builder, inputs, row, words_per_row) for row in range(count)]
    words_per_line = 8 // bits * 2
    with cgutils.for_range(builder, num_lines, intp=I64) as loop:
        lines = [row_at(builder, panel, loop.index, integer(PANEL)) for panel in panels]
        with builder.if_then(prefetches):
            for word in range(0, PANEL, 16):
                next_words = row_at(builder, lines[0], num_lines, integer(PANEL), integer(word))
                lanes.prefetch_line(builder, next_words, locality=3)
        places = [at(builder, line, i * LANES) for line in lines for i in range(NUM_VECTORS)]
        first = builder.mul(loop.index, integer(words_per_line))
        inputs_at = [at(builder, row, first) for row in rows]
        (_add_bytes if HAS_BYTE_PRODUCT else _add_shorts)(builder, bits, places, inputs_at, sums)
    group_scales = [builder.inttoptr(address, _SHORT.as_pointer()) for address in scales]
    row_scales = builder.inttoptr(factors, F32.as_pointer())
    for row, totals in enumerate(sums):
        scale = lanes.splat(builder, builder.load(at(builder, row_scales, 2 * row)))
        for index, total in enumerate(totals):
            panel, i = divmod(index, NUM_VECTORS)
            value = builder.fmul(builder.sitofp(total.get(builder), _FLOATS), scale)
            if bits == 4:
                value = builder.fmul(value, load(builder, at(builder, group_scales[panel], i * LANES), BFLOAT16))
            place = at(builder, tile, (panel * count + row) * PANEL + i * LANES)
            store(builder, builder.fadd(load(builder, place), value), place)


def _add_bytes(builder: Builder, bits: int, places: list[Value], rows: list[Value], sums: list[list[_Sums]]) -> None:
    """Add a line's products: the high bytes of four inputs, then the low ones, with the same four weights."""
    vectors = [_load_words(builder, place) for place in places]
    for part, unpacked in enumerate(_unpacked(builder, vectors, bits)):
        for row, totals in zip(rows, sums, strict=True):
            pair = [lanes.splat(builder, builder.load(at(builder, row, 2 * part + i))) for i in range(2)]
            for vector, total in zip(unpacked, totals, strict=True):
                for slot, operand in enumerate(pair):
                    total.add_products(builder, vector, operand, slot)


def _add_shorts(builder: Builder, bits: int, places: list[Value], rows: list[Value], sums: list[list[_Sums]]) -> None:
    """Add a line's products, one word of inputs after another: the sums leave registers for no more than that."""
    for word, (shift, mask) in enumerate(_SHORT_PIECES[bits]):
        operands = [lanes.splat(builder, builder.load(at(builder, row, word))) for row in rows]
        for index, place in enumerate(places):
            shorts = builder.bitcast(_load_words(builder, place), _PAIRS)
            if shift:
                shorts = builder.lshr(shorts, ir.Constant(_PAIRS, [shift] * 2 * LANES))
            if mask:
                shorts = builder.and_(shorts, ir.Constant(_PAIRS, [mask] * 2 * LANES))
            weights = builder.bitcast(shorts, _WORDS)
            for operand, totals in zip(operands, sums, strict=True):
                totals[index].add_products(builder, weights, operand)


_SHORT_PIECES = {8: ((0, 0xFF), (8, 0)), 4: ((0, 0xF), (8, 0xF), (4, 0xF), (12, 0))}
"""Of the weights that each word of two inputs is multiplied with: how far to shift int16 to the right, and a mask."""


def _load_words(builder: Builder, pointer: Value) -> Value:
    return builder.load(builder.bitcast(pointer, _WORDS.as_pointer()), align=4)


def _unpacked(builder: Builder, vectors: list[Value], bits: int) -> list[list[Value]]:
    """For each four of a line's input features, its weights as bytes."""
    if bits == 8:
        return [vectors]
    low, four = _words(0x0F0F0F0F), _words(4)
    return [
        [builder.and_(vector, low) for vector in vectors],
        [builder.and_(builder.lshr(vector, four), low) for vector in vectors],
    ]


@emitted(lambda: types.CPointer(types.float32))
def new_tile(builder: Builder, kinds: Kinds) -> Value:
    """Room on the stack for [ROWS_PER_TILE, PANEL], good until the function returns."""
    return cgutils.alloca_once(builder, F32, size=ROWS_PER_TILE * PANEL)


@emitted(lambda address, index: types.int64)
def byte_at(builder: Builder, kinds: Kinds, address: Value, index: Value) -> Value:
    """The unsigned byte at address + index."""
    return builder.zext(builder.load(at(builder, builder.inttoptr(address, _BYTE.as_pointer()), index)), I64)
