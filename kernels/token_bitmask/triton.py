"""Forbidding tokens by a bitmask as a Triton kernel: it only writes, and only what is forbidden."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit(do_not_specialize=["num_words"], do_not_specialize_on_alignment=["bitmask", "rows"])
def token_bitmask_kernel(
    logits: tl.tensor,
    bitmask: tl.tensor,
    rows: tl.tensor,
    logits_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_words: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    entry = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    word = tl.load(bitmask + entry * num_words + token // 32, mask=token // 32 < num_words, other=0)
    is_forbidden = ((word >> (token % 32)) & 1) == 0
    row = tl.load(rows + entry).to(tl.int64)
    forbidden = tl.full([BLOCK], float("-inf"), tl.float32)
    tl.store(logits + row * logits_stride + token, forbidden, mask=is_forbidden & (token < vocab_size))


def token_bitmask(logits: torch.Tensor, bitmask: torch.Tensor, rows: torch.Tensor) -> None:
    num_entries, num_words = bitmask.shape
    if num_entries == 0:
        return
    vocab_size = logits.shape[1]
    token_bitmask_kernel[(num_entries, triton.cdiv(vocab_size, BLOCK))](
        logits,
        bitmask,
        rows,
        logits.stride(0),
        vocab_size,
        num_words,
        BLOCK=BLOCK,
        num_warps=4,
    )
