"""What follows the sums of a linear layer: bias, activation and gate, and rounding into the result."""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils

from quire.kernels import cpu_lanes as lanes
from quire.kernels.cpu_activation import (
    CODES,
    NO_ACTIVATION,
    activate,
    add_row,
    multiply_row,
    round_row,
    silu_to_bfloat16,
)
from quire.kernels.cpu_elements import I64, Builder, Kinds, Value, emitted, float32_pointer, move, nothing, pointer_to
from quire.kernels.cpu_lanes import LANES, at, load, row_at
from quire.kernels.cpu_matrix import PANEL


@numba.njit
def finish_row(
    shared: Any,
    line: Any,
    bias: int,
    activation: int,
    gated: int,
    out: int,
    out_is_float32: int,
    offset: int,
    width: int,
) -> None:
    """Write the first `width` results of a row of a panel to out[offset:], float32 or of the type of `shared`.

    `line` is float32 [PANEL] and is changed; `bias` the address of as many, or 0; if `gated`, the gate's half is first.
    """
    if bias != 0:
        add_row(line, float32_pointer(bias), PANEL)
    if activation != NO_ACTIVATION:
        activate(line, PANEL // 2 if gated else PANEL, activation)
    if gated:
        multiply_row(line, move(line, PANEL // 2), PANEL // 2)
    if out_is_float32:
        round_row(line, move(float32_pointer(out), offset), width)
    else:
        round_row(line, move(pointer_to(out, shared), offset), width)


@numba.njit
def is_common(bias: int, activation: int, gated: int, out_is_float32: int, width: int) -> bool:
    """Whether `finish_common` can finish rows whose results are bfloat16."""
    if bias != 0 or out_is_float32:
        return False
    return (activation == _SILU and width == PANEL // 2) if gated else (activation == NO_ACTIVATION and width == PANEL)


_SILU = CODES["silu"]


@emitted(nothing)
def finish_common(
    builder: Builder, kinds: Kinds, tile: Value, num_rows: Value, gated: Value, out: Value, out_stride: Value
) -> None:
    """As finish_row, for all rows of a panel at once, what most layers ask for: bfloat16, no bias, all of the panel's
    features; and the activation of a gate is silu, others have none. `out` is an address, `out_stride` in bytes."""
    if not lanes.CONVERTS_PAIRS:
        return
    out = builder.inttoptr(out, ir.IntType(8).as_pointer())
    with builder.if_else(builder.icmp_signed("!=", gated, ir.Constant(I64, 0))) as (with_gate, plain):
        with with_gate, cgutils.for_range(builder, num_rows, intp=I64) as loop:
            line = [load(builder, row_at(builder, tile, loop.index, ir.Constant(I64, PANEL), i)) for i in _FIRSTS]
            target = row_at(builder, out, loop.index, out_stride)
            results = [builder.fmul(silu_to_bfloat16(builder, line[i]), line[2 + i]) for i in range(2)]
            lanes.store_bfloat16_pair(builder, results[0], results[1], target)
        with plain, cgutils.for_range(builder, num_rows, intp=I64) as loop:
            line = [load(builder, row_at(builder, tile, loop.index, ir.Constant(I64, PANEL), i)) for i in _FIRSTS]
            target = row_at(builder, out, loop.index, out_stride)
            lanes.store_bfloat16_pair(builder, line[0], line[1], target)
            lanes.store_bfloat16_pair(builder, line[2], line[3], at(builder, target, 4 * LANES))


_FIRSTS = range(0, PANEL, LANES)
