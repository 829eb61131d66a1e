"""Sampling as one Triton kernel: a program takes a row, narrows it down to candidates and searches only among those.

The maxima of BLOCK disjoint groups of logits bound the top_k-th largest from below, and a token that could not matter
even if all were as small as it bounds the nucleus: what is above the bound is gathered, in vocabulary order. Thresholds
are found among the candidates by narrowing an interval of integer keys, which are in the order of the floats. A row
that has more candidates than fit (flat, or top_k above BLOCK) is searched where it lies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.targets import current_target

BLOCK = 2048
CAPACITY = 16384
"""Candidates of a row that are kept aside: 8 bytes each."""

NUM_THREADS = 512  # 4 logits each: with 8 the registers of an H100 do not suffice


@triton.jit
def _key(values: tl.tensor) -> tl.tensor:
    """Integers in the order of the floats."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key: tl.tensor) -> tl.tensor:
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(source: tl.tensor, index: tl.tensor, count: tl.tensor, inverse: tl.tensor) -> tl.tensor:
    """The logits at `index`, scaled; minus infinity for NaN and from `count` on, and no -0, which equals 0.

    `inverse` is 1 / temperature in float64. The product, good to 2 ** -52, rounds to the float32 that the quotient
    rounds to: a quotient of float32 numbers is 2 ** -49 or more away from the middle of two.
    """
    values = tl.load(source + index, mask=index < count, other=float("-inf")).to(tl.float64)
    values = (values * inverse).to(tl.float32)
    values = tl.where(values == values, values, float("-inf"))
    return tl.where(values == 0.0, 0.0, values)


@triton.jit
def _mass(values: tl.tensor, top: tl.tensor, threshold: tl.tensor) -> tl.tensor:
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
def _kth_group(maxima: tl.tensor, k: tl.tensor) -> tl.tensor:
    """The key of the k-th largest of the groups' maxima."""
    keys = _key(maxima)
    low = tl.min(keys, 0).to(tl.int64)
    high = tl.max(keys, 0).to(tl.int64) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        is_below = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), 0) >= k
        low = tl.where(is_below, middle, low)
        high = tl.where(is_below, high, middle)
    return low.to(tl.int32)


@triton.jit
def _narrow(
    source: tl.tensor,
    count: tl.tensor,
    inverse: tl.tensor,
    top: tl.tensor,
    low: tl.tensor,
    target: tl.tensor,
    IS_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The largest key t >= low such that the logits >= t weigh at least `target`; `low` if there is none.

    A weight is exp(logit - top) or 1. Each pass weighs the logits above three keys that quarter the interval.
    """
    weight_type: tl.constexpr = tl.float64 if IS_MASS else tl.int32
    low = low.to(tl.int64)
    high = _key(top).to(tl.int64) + 1
    lane = tl.arange(0, BLOCK)
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        first = low + step
        second = tl.minimum(first + step, high)
        third = tl.minimum(second + step, high)
        above_first = tl.zeros([BLOCK], weight_type)
        above_second = tl.zeros([BLOCK], weight_type)
        above_third = tl.zeros([BLOCK], weight_type)
        for start in range(0, count, BLOCK):
            values = _scaled(source, start + lane, count, inverse)
            key = _key(values)
            weight = (start + lane < count).to(weight_type)
            if IS_MASS:
                weight = _mass(values, top, float("-inf"))
            zero = tl.zeros([BLOCK], weight_type)
            above_first += tl.where(key >= first.to(tl.int32), weight, zero)
            above_second += tl.where(key >= second.to(tl.int32), weight, zero)
            above_third += tl.where(key >= third.to(tl.int32), weight, zero)
        reaches_first = tl.sum(above_first, 0) >= target
        reaches_second = tl.sum(above_second, 0) >= target
        reaches_third = tl.sum(above_third, 0) >= target
        new_high = tl.where(reaches_second, tl.where(reaches_third, high, third), tl.where(reaches_first, second, first))
        low = tl.where(reaches_third, third, tl.where(reaches_second, second, tl.where(reaches_first, first, low)))
        high = new_high
    return low.to(tl.int32)


@triton.jit
def _draw(
    source: tl.tensor,
    count: tl.tensor,
    inverse: tl.tensor,
    top: tl.tensor,
    threshold: tl.tensor,
    uniform: tl.tensor,
    NUM_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The first place at which the mass up to it exceeds uniform * total, 0 if there is no mass.

    A prefix sum in parallel may round down from one place to the next: only a place with mass is ever chosen, the last
    one if rounding hides the right one.
    """
    lane = tl.arange(0, BLOCK)
    tiles = tl.arange(0, NUM_TILES)
    masses = tl.zeros([NUM_TILES], tl.float64)
    for tile in range(0, tl.cdiv(count, BLOCK)):
        values = _scaled(source, tile * BLOCK + lane, count, inverse)
        if tl.max(values, 0) >= threshold:
            masses = tl.where(tiles == tile, tl.sum(_mass(values, top, threshold), 0), masses)
    cumulative = tl.cumsum(masses, 0)
    target = uniform * tl.max(cumulative, 0)
    first = tl.min(tl.where((cumulative > target) & (masses > 0.0), tiles, NUM_TILES), 0)
    chosen_tile = tl.minimum(first, tl.max(tl.where(masses > 0.0, tiles, 0), 0))
    before = tl.sum(tl.where(tiles < chosen_tile, masses, 0.0), 0)
    place = chosen_tile * BLOCK + lane
    mass = _mass(_scaled(source, place, count, inverse), top, threshold)
    is_past = (before + tl.cumsum(mass, 0) > target) & (mass > 0.0)
    first = tl.min(tl.where(is_past, place, NUM_TILES * BLOCK), 0)
    return tl.minimum(first, tl.max(tl.where(mass > 0.0, place, 0), 0))


@triton.jit(do_not_specialize_on_alignment=["temperature", "top_k", "top_p", "min_p", "uniform", "out"])
def sample_kernel(
    logits: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    uniform: tl.tensor,
    out: tl.tensor,
    candidates: tl.tensor,
    candidate_ids: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    NUM_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride.to(tl.int64)
    candidates += row * CAPACITY
    candidate_ids += row * CAPACITY
    divisor = tl.load(temperature + row)
    k = tl.load(top_k + row).to(tl.int64)
    p = tl.load(top_p + row).to(tl.float64)
    min_share = tl.load(min_p + row).to(tl.float64)
    number = tl.load(uniform + row)
    inverse = 1.0 / tl.where(divisor == 0.0, 1.0, divisor).to(tl.float64)
    if divisor == 0.0:  # only the largest stay, and the draw takes the first of them
        k = k * 0
        p = p * 0.0 + 1.0
        min_share = min_share * 0.0 + 1.0
        number = number * 0.0

    lane = tl.arange(0, BLOCK)
    maxima = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        maxima = tl.maximum(maxima, _scaled(logits, start + lane, vocab_size, inverse))
    top = tl.max(maxima, 0)
    if (top == float("-inf")) | (top == float("inf")):
        tl.store(out + row, 0)
        return

    has_k = (k > 0) & (k < vocab_size)
    has_p = p < 1.0
    threshold = top - float("inf")
    if min_share > 0.0:
        threshold = top + tl.log(min_share).to(tl.float32)
    # All tokens this small together have less than 1 - top_p: the nucleus is above them. The last term is for rounding.
    smallest = tl.log(0.99 * tl.maximum(1.0 - p, 1e-9) / vocab_size)
    nucleus_bound = (top.to(tl.float64) + smallest - 5e-7 * tl.abs(top)).to(tl.float32)
    bound = top - float("inf")
    if has_k & (k <= BLOCK):
        bound = _value(_kth_group(maxima, k))
    if has_p:
        bound = tl.where(has_k, bound, nucleus_bound)
    else:
        bound = tl.maximum(bound, threshold)

    total = top.to(tl.float64) * 0.0
    count = 0
    if bound > float("-inf"):
        needs_total = has_p & ((k <= 0) | (k >= vocab_size))
        sums = tl.zeros([BLOCK], tl.float64)
        for start in range(0, vocab_size, BLOCK):
            values = _scaled(logits, start + lane, vocab_size, inverse)
            kept = values >= bound
            num_kept = tl.sum(kept.to(tl.int32), 0)
            if num_kept > 0:
                place = count + tl.cumsum(kept.to(tl.int32), 0) - 1
                fits = kept & (place < CAPACITY)
                tl.store(candidates + place, values, mask=fits)
                tl.store(candidate_ids + place, start + lane, mask=fits)
            count += num_kept
            if needs_total:
                sums += _mass(values, top, float("-inf"))
        total = tl.sum(sums, 0)
        tl.debug_barrier()
    is_gathered = (count > 0) & (count <= CAPACITY)
    source = logits
    if is_gathered:
        source = candidates
        inverse = inverse * 0.0 + 1.0
    else:
        count = vocab_size

    if has_k:
        kth = _value(_narrow(source, count, inverse, top, _key(bound), k, False, BLOCK))
        bound = tl.maximum(bound, kth)
        threshold = tl.maximum(threshold, kth)
    if has_p:
        if has_k:
            sums = tl.zeros([BLOCK], tl.float64)
            for start in range(0, count, BLOCK):
                sums += _mass(_scaled(source, start + lane, count, inverse), top, bound)
            total = tl.sum(sums, 0)
            bound = tl.maximum(bound, nucleus_bound)
        nucleus = _value(_narrow(source, count, inverse, top, _key(bound), p * total, True, BLOCK))
        threshold = tl.maximum(threshold, nucleus)

    place = _draw(source, count, inverse, top, threshold, number, NUM_TILES, BLOCK)
    token_id = tl.load(candidate_ids + place, mask=is_gathered, other=0)
    tl.store(out + row, tl.where(is_gathered, token_id, place).to(tl.int64))


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return out
    candidates = torch.empty((num_rows, CAPACITY), dtype=torch.float32, device=logits.device)
    candidate_ids = torch.empty((num_rows, CAPACITY), dtype=torch.int32, device=logits.device)
    sample_kernel[(num_rows,)](
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        uniform,
        out,
        candidates,
        candidate_ids,
        logits.stride(0),
        vocab_size,
        NUM_TILES=triton.next_power_of_2(triton.cdiv(vocab_size, BLOCK)),
        BLOCK=BLOCK,
        CAPACITY=CAPACITY,
        num_warps=NUM_THREADS // current_target(logits.device).warp_size,
    )
    return out
