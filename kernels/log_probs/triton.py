"""Log probabilities as one Triton kernel: a program reads its row twice.

The K-th largest of the maxima of BLOCK disjoint groups bounds the K-th largest logit from below. Fewer than K groups
have a larger one, so few logits exceed it; of those that equal it the first K suffice. Both are gathered as integers
that order by logit, then by lower id, and taken from the top one by one.
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


@triton.jit
def _rank(values: tl.tensor, token_id: tl.tensor) -> tl.tensor:
    """Distinct integers in descending order of rank; shifting by 32 gives the logit's key back."""
    return (order_key(values).to(tl.int64) << 32) + (0x7FFFFFFF - token_id)


# How many a request asks for must not ask for another compilation.
@triton.jit(
    do_not_specialize=["num_top", "capacity"],
    do_not_specialize_on_alignment=["token_ids", "out", "top_ids", "top_out"],
)
def log_probs_kernel(
    logits: tl.tensor,
    token_ids: tl.tensor,
    out: tl.tensor,
    top_ids: tl.tensor,
    top_out: tl.tensor,
    ranks: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_top: tl.tensor,
    capacity: tl.tensor,
    HAS_TOP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    ranks += row * (capacity + num_top)
    lane = tl.arange(0, BLOCK)
    one = tl.full([], 1.0, tl.float64)
    maxima = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        maxima = tl.maximum(maxima, scaled_logits(logits, start + lane, vocab_size, one))
    top = tl.max(maxima, 0)
    bound = top
    if HAS_TOP:
        bound = key_value(kth_group_key(maxima, num_top))

    sums = tl.zeros([BLOCK], tl.float64)
    num_above = 0
    num_equal = 0
    for start in range(0, vocab_size, BLOCK):
        token_id = start + lane
        values = scaled_logits(logits, token_id, vocab_size, one)
        sums += mass_of(values, top, float("-inf"))
        if HAS_TOP:
            above = (values > bound).to(tl.int32)
            equal = ((values == bound) & (token_id < vocab_size)).to(tl.int32)
            if tl.sum(above + equal, 0) > 0:
                place = num_above + tl.cumsum(above, 0) - 1
                tl.store(ranks + place, _rank(values, token_id), mask=(above > 0) & (place < capacity))
                place = num_equal + tl.cumsum(equal, 0) - 1
                tl.store(ranks + capacity + place, _rank(values, token_id), mask=(equal > 0) & (place < num_top))
                num_above += tl.sum(above, 0)
                num_equal += tl.sum(equal, 0)
    log_total = tl.log(tl.sum(sums, 0))
    if (top == float("-inf")) | (top == float("inf")):
        log_total = log_total * 0.0 + float("nan")
    log_total += top.to(tl.float64)
    logit = scaled_logits(logits, tl.load(token_ids + row), vocab_size, one)
    tl.store(out + row, (logit.to(tl.float64) - log_total).to(tl.float32))

    if HAS_TOP:
        tl.debug_barrier()
        num_equal = tl.minimum(num_equal, num_top)
        previous = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
        for place in range(num_top):
            best = tl.full([BLOCK], -0x8000000000000000, tl.int64)
            for start in range(0, num_above, BLOCK):
                rank = tl.load(ranks + start + lane, mask=start + lane < num_above, other=-0x8000000000000000)
                best = tl.maximum(best, tl.where(rank < previous, rank, -0x8000000000000000))
            rank = tl.load(ranks + capacity + lane, mask=lane < num_equal, other=-0x8000000000000000)
            best = tl.maximum(best, tl.where(rank < previous, rank, -0x8000000000000000))
            previous = tl.max(best, 0)
            token_id = 0x7FFFFFFF - (previous & 0xFFFFFFFF)
            logit = key_value((previous >> 32).to(tl.int32))
            tl.store(top_ids + row * num_top + place, tl.minimum(tl.maximum(token_id, 0), vocab_size - 1))
            tl.store(top_out + row * num_top + place, (logit.to(tl.float64) - log_total).to(tl.float32))


def log_probs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, vocab_size = logits.shape
    device = logits.device
    out = torch.empty(num_rows, dtype=torch.float32, device=device)
    top_ids = torch.empty((num_rows, num_top), dtype=torch.int64, device=device)
    top_out = torch.empty((num_rows, num_top), dtype=torch.float32, device=device)
    if num_rows == 0:
        return out, top_ids, top_out
    capacity = num_top * triton.cdiv(vocab_size, BLOCK)
    ranks = torch.empty((num_rows, capacity + num_top), dtype=torch.int64, device=device)
    log_probs_kernel[(num_rows,)](
        logits,
        token_ids,
        out,
        top_ids,
        top_out,
        ranks,
        logits.stride(0),
        vocab_size,
        num_top,
        capacity,
        HAS_TOP=num_top > 0,
        BLOCK=BLOCK,
        num_warps=NUM_THREADS // current_target(device).warp_size,
    )
    return out, top_ids, top_out
