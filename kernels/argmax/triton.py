"""The most probable token as Triton kernels: few rows are shared out among programs, and each is read once.

A logit and its place are one integer that orders by logit, then by lower place, so that largest of parts, of a row and
of ties is one maximum. NaN is above all other logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.targets import current_target
from quire.kernels.triton_probability import order_key

BLOCK = 4096
MAX_PARTS = 64
NOTHING = tl.constexpr(-0x8000000000000000)


@triton.jit
def _token_id(best: tl.tensor) -> tl.tensor:
    """The place of a largest logit; -1 if that is not finite."""
    key = best >> 32
    is_finite = (key < 0x7F800000) & (key > -0x7F800001)  # the keys of the infinities
    return tl.where(is_finite, 0x7FFFFFFF - (best & 0xFFFFFFFF), -1)


@triton.jit(do_not_specialize=["part_size"], do_not_specialize_on_alignment=["out"])
def argmax_kernel(
    logits: tl.tensor,
    out: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    part_size: tl.tensor,
    NUM_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out: token ids [R] or, of several parts, each part's best as an integer, [R, NUM_PARTS]."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    logits += row * logits_stride
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], NOTHING, tl.int64)
    for start in range(part * part_size, tl.minimum((part + 1) * part_size, vocab_size), BLOCK):
        place = start + lane
        values = tl.load(logits + place, mask=place < vocab_size, other=float("-inf"))
        values = tl.where(values == 0.0, 0.0, values)  # no -0, which equals 0
        key = tl.where(values == values, order_key(values), 0x7FFFFFFF)
        rank = (key.to(tl.int64) << 32) + (0x7FFFFFFF - place)
        best = tl.maximum(best, rank)
    result = tl.max(best, 0)
    if NUM_PARTS == 1:
        result = _token_id(result)
    tl.store(out + row * NUM_PARTS + part, result)


@triton.jit(do_not_specialize_on_alignment=["out"])
def best_part_kernel(parts: tl.tensor, out: tl.tensor, NUM_PARTS: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    best = tl.max(tl.load(parts + row * NUM_PARTS + tl.arange(0, NUM_PARTS)), 0)
    tl.store(out + row, _token_id(best))


def number_of_parts(num_rows: int, vocab_size: int, num_multiprocessors: int) -> int:
    """A power of two: two programs for each multiprocessor, none with less than a block to read."""
    wanted = min(2 * num_multiprocessors // num_rows, vocab_size // BLOCK, MAX_PARTS)
    return 1 << max(wanted.bit_length() - 1, 0)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return out
    num_parts = number_of_parts(num_rows, vocab_size, current_target(logits.device).num_multiprocessors)
    parts = out if num_parts == 1 else torch.empty((num_rows, num_parts), dtype=torch.int64, device=logits.device)
    part_size = triton.cdiv(triton.cdiv(vocab_size, BLOCK), num_parts) * BLOCK
    argmax_kernel[(num_rows, num_parts)](
        logits,
        parts,
        logits.stride(0),
        vocab_size,
        part_size,
        NUM_PARTS=num_parts,
        BLOCK=BLOCK,
        num_warps=8,
    )
    if num_parts > 1:
        best_part_kernel[(num_rows,)](parts, out, NUM_PARTS=num_parts, num_warps=1)
    return out
