"""Log probabilities on the CPU: one pass over a row, then only the blocks that can hold one of the largest."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch

from quire.kernels.cpu_elements import float32_pointer, float64_pointer, int64_pointer, move, pointer_to, take
from quire.kernels.cpu_lanes import LOWEST
from quire.kernels.cpu_probability import BLOCK, exp_block, kth_maximum, num_blocks_of, scale_row
from quire.kernels.cpu_workers import KEPT_MEMORY, Worker, row_threads

# A call's parameters: their places in the int64 array that its threads share. Strides are in elements.
(
    TICKET,  # the next row
    THREAD,  # the next thread's number
    LOGITS,
    LOGITS_STRIDE,
    NUM_ROWS,
    VOCAB_SIZE,
    TOKEN_IDS,
    NUM_TOP,
    OUT,
    TOP_IDS,
    TOP_OUT,
    SCRATCH,
    SCRATCH_SIZE,  # bytes of each thread
) = range(13)


@numba.njit
def _log_total(row, maxima, num_blocks, top, masses):  # type: ignore[no-untyped-def]
    total = 0.0
    for block in range(num_blocks):
        total += exp_block(move(row, block * BLOCK), top, np.float32(-np.inf), masses)
    return math.log(total)


@numba.njit
def _keep_largest(row, maxima, vocab_size, num_top, heap, values, ids):  # type: ignore[no-untyped-def]
    """The `num_top` largest logits, in descending order; of equal ones those of lower id."""
    num_blocks = num_blocks_of(vocab_size)
    bound = kth_maximum(maxima, num_blocks, num_top, heap)
    if bound == np.float32(LOWEST):
        bound = np.float32(-np.inf)
    count = 0
    for block in range(num_blocks):
        if maxima[block] >= bound:
            for token in range(block * BLOCK, min(block * BLOCK + BLOCK, vocab_size)):
                logit = row[token]
                if logit >= bound and (count < num_top or logit > values[num_top - 1]):
                    count = min(count + 1, num_top)
                    place = count - 1
                    while place > 0 and values[place - 1] < logit:
                        values[place], ids[place] = values[place - 1], ids[place - 1]
                        place -= 1
                    values[place], ids[place] = logit, token


def _log_probs(shared: Any) -> None:
    parameters = int64_pointer(shared)
    thread = take(move(parameters, THREAD))
    vocab_size, num_top = parameters[VOCAB_SIZE], parameters[NUM_TOP]
    num_blocks = num_blocks_of(vocab_size)
    masses = float64_pointer(parameters[SCRATCH] + thread * parameters[SCRATCH_SIZE])
    row = float32_pointer(move(masses, BLOCK))
    maxima = move(row, num_blocks * BLOCK)
    heap = move(maxima, num_blocks)
    number = take(parameters)
    while number < parameters[NUM_ROWS]:
        logits = move(pointer_to(parameters[LOGITS], shared), number * parameters[LOGITS_STRIDE])
        top_ids = move(int64_pointer(parameters[TOP_IDS]), number * num_top)
        top_out = move(float32_pointer(parameters[TOP_OUT]), number * num_top)
        top = scale_row(logits, vocab_size, np.float32(1.0), row, maxima)
        log_total = np.nan
        if -np.inf < top < np.inf:
            log_total = _log_total(row, maxima, num_blocks, top, masses)
        log_total += np.float64(top)
        if num_top > 0:
            _keep_largest(row, maxima, vocab_size, num_top, heap, top_out, top_ids)
        for place in range(num_top):
            top_out[place] = np.float32(np.float64(top_out[place]) - log_total)
        token_id = int64_pointer(parameters[TOKEN_IDS])[number]
        float32_pointer(parameters[OUT])[number] = np.float32(np.float64(row[token_id]) - log_total)
        number = take(parameters)


WORKER = Worker(_log_probs)


def log_probs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, dtype=torch.float32)
    top_ids = torch.empty((num_rows, num_top), dtype=torch.int64)
    top_out = torch.empty((num_rows, num_top), dtype=torch.float32)
    if num_rows == 0:
        return out, top_ids, top_out
    num_blocks = num_blocks_of(vocab_size)
    scratch_size = -(-(8 * BLOCK + 4 * num_blocks * (BLOCK + 2)) // 64) * 64
    num_threads = row_threads(logits.numel()) if num_rows > 1 else 1
    scratch = KEPT_MEMORY.address(num_threads * scratch_size)
    parameters = np.array(
        [
            *(0, 0, logits.data_ptr(), logits.stride(0), num_rows, vocab_size, token_ids.data_ptr(), num_top),
            *(out.data_ptr(), top_ids.data_ptr(), top_out.data_ptr(), scratch, scratch_size),
        ],
        np.int64,
    )
    WORKER.run(logits.dtype, parameters, num_threads)
    return out, top_ids, top_out
