"""What follows the sums of a linear layer: bias, activation and gate, and rounding into the result."""

from __future__ import annotations

from typing import Any

import numba

from quire.kernels.cpu_activation import NO_ACTIVATION, activate, add_row, multiply_row, round_row
from quire.kernels.cpu_elements import float32_pointer, move, pointer_to
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
