"""What the Triton kernels that work on rows of logits share."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 2048
"""Logits that a program looks at together; lane i sees the logits i, i + BLOCK and so on: its group."""

NUM_THREADS = 512  # 4 logits each: with 8 the registers of an H100 do not suffice


@triton.jit
def order_key(values: tl.tensor) -> tl.tensor:
    """Integers in the order of the floats."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_value(key: tl.tensor) -> tl.tensor:
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def scaled_logits(source: tl.tensor, index: tl.tensor, count: tl.tensor, inverse: tl.tensor) -> tl.tensor:
    """The logits at `index`, scaled; minus infinity for NaN and from `count` on, and no -0, which equals 0.

    `inverse` is 1 / temperature in float64. The product, good to 2 ** -52, rounds to the float32 that the quotient
    rounds to: a quotient of float32 numbers is 2 ** -49 or more away from the middle of two.
    """
    values = tl.load(source + index, mask=index < count, other=float("-inf")).to(tl.float64)
    values = (values * inverse).to(tl.float32)
    values = tl.where(values == values, values, float("-inf"))
    return tl.where(values == 0.0, 0.0, values)


@triton.jit
def mass_of(values: tl.tensor, top: tl.tensor, threshold: tl.tensor) -> tl.tensor:
    """exp(values - top) in float64, 0 under the threshold; exactly 1 at the top. The relative error is below 1e-14.

    2 ** whole by its bits and 2 ** fraction as the 16th power of a polynomial: few constants, which stay in registers.
    """
    exponent = (values.to(tl.float64) - top.to(tl.float64)) * 1.4426950408889634
    kept = (values >= threshold) & (exponent > -1000.0)
    exponent = tl.where(kept, exponent, 0.0)
    whole = tl.floor(exponent + 0.5)
    rest = (exponent - whole) * 0.04332169878499658  # ln 2 / 16
    power = 1.0 / 720 + rest * (1.0 / 5040)
    power = 1.0 / 120 + rest * power
    power = 1.0 / 24 + rest * power
    power = 1.0 / 6 + rest * power
    power = 0.5 + rest * power
    power = 1.0 + rest * (1.0 + rest * power)
    power = power * power
    power = power * power
    power = power * power
    power = power * power
    scale = ((whole.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where(kept, power * scale, 0.0)


@triton.jit
def kth_group_key(maxima: tl.tensor, k: tl.tensor) -> tl.tensor:
    """The key of the k-th largest of the groups' maxima."""
    keys = order_key(maxima)
    low = tl.min(keys, 0).to(tl.int64)
    high = tl.max(keys, 0).to(tl.int64) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        is_below = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0) >= k
        low = tl.where(is_below, middle, low)
        high = tl.where(is_below, high, middle)
    return low.to(tl.int32)
