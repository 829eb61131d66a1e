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
from quire.kernels.triton_probability import (
    BLOCK,
    NUM_THREADS,
    key_value,
    kth_group_key,
    mass_of,
    order_key,
    scaled_logits,
)

CAPACITY = 16384
"""Candidates of a row that are kept aside: 8 bytes each."""


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
    high = order_key(top).to(tl.int64) + 1
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
            values = scaled_logits(source, start + lane, count, inverse)
            key = order_key(values)
            weight = (start + lane < count).to(weight_type)
            if IS_MASS:
                weight = mass_of(values, top, float("-inf"))
            zero = tl.zeros([BLOCK], weight_type)
            above_first += tl.where(key >= first.to(tl.int32), weight, zero)
            above_second += tl.where(key >= second.to(tl.int32), weight, zero)
            above_third += tl.where(key >= third.to(tl.int32), weight, zero)
        reaches_first = tl.sum(above_first, 0) >= target
        reaches_second = tl.sum(above_second, 0) >= target
        reaches_third = tl.sum(above_third, 0) >= target
        new_high = tl.where(
            reaches_second, tl.where(reaches_third, high, third), tl.where(reaches_first, second, first)
        )
        low = tl.where(reaches_third, third, tl.where(reaches_second, second, tl.where(reaches_first, first, low)))
        high = new_high
    return low.to(tl.int32)


@triton.jit
def _gather(
    logits: tl.tensor,
    vocab_size: tl.tensor,
    inverse: tl.tensor,
    top: tl.tensor,
    bound: tl.tensor,
    needs_total: tl.tensor,
    candidates: tl.tensor,
    candidate_ids: tl.tensor,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tuple:
    """Keep the first CAPACITY logits >= bound; returns how many there are, and the mass of all logits if needed."""
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    count = 0
    for start in range(0, vocab_size, BLOCK):
        values = scaled_logits(logits, start + lane, vocab_size, inverse)
        kept = values >= bound
        num_kept = tl.sum(kept.to(tl.int32), 0)
        if num_kept > 0:
            place = count + tl.cumsum(kept.to(tl.int32), 0) - 1
            fits = kept & (place < CAPACITY)
            tl.store(candidates + place, values, mask=fits)
            tl.store(candidate_ids + place, start + lane, mask=fits)
        count += num_kept
        if needs_total:
            sums += mass_of(values, top, float("-inf"))
    tl.debug_barrier()
    return count, tl.sum(sums, 0)


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
    for tile in range(tl.cdiv(count, BLOCK)):
        values = scaled_logits(source, tile * BLOCK + lane, count, inverse)
        if tl.max(values, 0) >= threshold:
            masses = tl.where(tiles == tile, tl.sum(mass_of(values, top, threshold), 0), masses)
    cumulative = tl.cumsum(masses, 0)
    target = uniform * tl.max(cumulative, 0)
    first = tl.min(tl.where((cumulative > target) & (masses > 0.0), tiles, NUM_TILES), 0)
    chosen_tile = tl.minimum(first, tl.max(tl.where(masses > 0.0, tiles, 0), 0))
    before = tl.sum(tl.where(tiles < chosen_tile, masses, 0.0), 0)
    place = chosen_tile * BLOCK + lane
    mass = mass_of(scaled_logits(source, place, count, inverse), top, threshold)
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
        maxima = tl.maximum(maxima, scaled_logits(logits, start + lane, vocab_size, inverse))
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
        bound = key_value(kth_group_key(maxima, k))
    bound = tl.where(has_p, tl.where(has_k, bound, nucleus_bound), tl.maximum(bound, threshold))

    count = 0
    total = top.to(tl.float64) * 0.0
    if bound > float("-inf"):
        needs_total = has_p & ((k <= 0) | (k >= vocab_size))
        count, total = _gather(
            logits, vocab_size, inverse, top, bound, needs_total, candidates, candidate_ids, CAPACITY, BLOCK
        )
    is_gathered = (count > 0) & (count <= CAPACITY)
    source = logits
    if is_gathered:
        source = candidates
        inverse = inverse * 0.0 + 1.0
    else:
        count = vocab_size

    if has_k:
        kth = key_value(_narrow(source, count, inverse, top, order_key(bound), k, False, BLOCK))
        bound = tl.maximum(bound, kth)
        threshold = tl.maximum(threshold, kth)
    if has_p:
        if has_k:
            sums = tl.zeros([BLOCK], tl.float64)
            for start in range(0, count, BLOCK):
                sums += mass_of(scaled_logits(source, start + lane, count, inverse), top, bound)
            total = tl.sum(sums, 0)
            bound = tl.maximum(bound, nucleus_bound)
        nucleus = key_value(_narrow(source, count, inverse, top, order_key(bound), p * total, True, BLOCK))
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
