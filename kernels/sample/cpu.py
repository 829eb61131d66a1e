"""Sampling on the CPU: a row is read once, scaled into memory that stays in the processor's cache."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch

from quire.kernels.cpu_elements import float32_pointer, float64_pointer, int64_pointer, move, pointer_to, take
from quire.kernels.cpu_probability import (
    BLOCK,
    NUM_BUCKETS,
    exp_block,
    kth_maximum,
    num_blocks_of,
    scale_row,
    select_threshold,
)
from quire.kernels.cpu_workers import KEPT_MEMORY, Worker, row_threads

# A call's parameters: their places in the int64 array that its threads share. Strides are in elements.
(
    TICKET,  # the next row
    THREAD,  # the next thread's number
    LOGITS,
    LOGITS_STRIDE,
    NUM_ROWS,
    VOCAB_SIZE,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    MIN_P,
    UNIFORM,
    OUT,
    SCRATCH,
    SCRATCH_SIZE,  # bytes of each thread
) = range(14)


@numba.njit
def _total_mass(row, maxima, num_blocks, top, threshold, masses, block_masses):  # type: ignore[no-untyped-def]
    total = 0.0
    for block in range(num_blocks):
        mass = 0.0
        if maxima[block] >= threshold:
            mass = exp_block(move(row, block * BLOCK), top, threshold, masses)
        block_masses[block] = mass
        total += mass
    return total


@numba.njit
def _draw(row, maxima, num_blocks, top, threshold, uniform, masses, block_masses):  # type: ignore[no-untyped-def]
    """The first token at which the mass of the tokens up to it exceeds uniform * total."""
    target = uniform * _total_mass(row, maxima, num_blocks, top, threshold, masses, block_masses)
    cumulative = 0.0
    block = 0
    while block < num_blocks - 1 and not cumulative + block_masses[block] > target:
        cumulative += block_masses[block]
        block += 1
    exp_block(move(row, block * BLOCK), top, threshold, masses)
    chosen = 0
    for i in range(BLOCK):
        if masses[i] > 0.0:  # the last of them where rounding has the block's mass exceed their sum
            chosen = block * BLOCK + i
            cumulative += masses[i]
            if cumulative > target:
                break
    return chosen


@numba.njit(inline="always")
def _sample_row(logits, vocab_size, temperature, top_k, top_p, min_p, uniform, scratch):  # type: ignore[no-untyped-def]
    num_blocks = num_blocks_of(vocab_size)
    masses = float64_pointer(scratch)
    weights = move(masses, 2 * BLOCK)
    block_masses = move(weights, NUM_BUCKETS)
    row = float32_pointer(move(block_masses, num_blocks))
    heap = move(row, num_blocks * BLOCK)
    maxima = move(heap, num_blocks * BLOCK)
    if temperature == 0.0:  # only the largest stay, and the draw takes the first of them
        temperature, top_k, top_p, min_p, uniform = np.float32(1.0), 0, np.float32(1.0), np.float32(1.0), 0.0
    top = scale_row(logits, vocab_size, temperature, row, maxima)
    if not -np.inf < top < np.inf:
        return np.int64(0)
    threshold = np.float32(-np.inf)
    if 0 < top_k < vocab_size:
        low = kth_maximum(maxima, num_blocks, top_k, heap)
        threshold = select_threshold(
            row, maxima, num_blocks, top, low, False, np.float64(top_k), masses, weights, heap
        )  # fmt: skip
    if top_p < 1.0:
        total = _total_mass(row, maxima, num_blocks, top, threshold, masses, block_masses)
        # All tokens this small together have less than 1 - top_p: the nucleus is above them.
        # The last term is for rounding.
        smallest = math.log(0.99 * (1.0 - np.float64(top_p)) * total / vocab_size)
        low = max(threshold, np.float32(np.float64(top) + smallest - 5e-7 * abs(np.float64(top))))
        target = np.float64(top_p) * total
        threshold = select_threshold(row, maxima, num_blocks, top, low, True, target, masses, weights, heap)
    if min_p > 0.0:
        threshold = max(threshold, top + np.float32(math.log(np.float64(min_p))))
    return _draw(row, maxima, num_blocks, top, threshold, uniform, masses, block_masses)


def _sample(shared: Any) -> None:
    parameters = int64_pointer(shared)
    thread = take(move(parameters, THREAD))
    scratch = parameters[SCRATCH] + thread * parameters[SCRATCH_SIZE]
    logits, vocab_size = pointer_to(parameters[LOGITS], shared), parameters[VOCAB_SIZE]
    temperature, top_k = float32_pointer(parameters[TEMPERATURE]), int64_pointer(parameters[TOP_K])
    top_p, min_p = float32_pointer(parameters[TOP_P]), float32_pointer(parameters[MIN_P])
    uniform, out = float64_pointer(parameters[UNIFORM]), int64_pointer(parameters[OUT])
    row = take(parameters)
    while row < parameters[NUM_ROWS]:
        out[row] = _sample_row(
            move(logits, row * parameters[LOGITS_STRIDE]), vocab_size,
            temperature[row], top_k[row], top_p[row], min_p[row], uniform[row], scratch,
        )  # fmt: skip
        row = take(parameters)


WORKER = Worker(_sample)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64)
    if num_rows == 0:
        return out
    top_k = top_k.to(torch.int64)
    num_blocks = num_blocks_of(vocab_size)
    scratch_size = 8 * (2 * BLOCK + NUM_BUCKETS + num_blocks) + 4 * (2 * num_blocks * BLOCK + num_blocks)
    scratch_size = -(-scratch_size // 64) * 64
    num_threads = row_threads(logits.numel()) if num_rows > 1 else 1
    scratch = KEPT_MEMORY.address(num_threads * scratch_size)
    parameters = np.array(
        [
            *(0, 0, logits.data_ptr(), logits.stride(0), num_rows, vocab_size),
            *(tensor.data_ptr() for tensor in (temperature, top_k, top_p, min_p, uniform, out)),
            *(scratch, scratch_size),
        ],
        np.int64,
    )
    WORKER.run(logits.dtype, parameters, num_threads)
    return out
