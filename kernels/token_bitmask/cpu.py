"""Forbidding tokens by a bitmask on the CPU: masked stores, with the bits as the mask."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir

from quire.kernels import cpu_lanes as lanes
from quire.kernels.cpu_elements import (
    Builder,
    Kinds,
    Value,
    emitted,
    int32_pointer,
    int64_pointer,
    move,
    nothing,
    pointer_to,
    take,
)
from quire.kernels.cpu_lanes import LANES
from quire.kernels.cpu_workers import Worker, row_threads

# A call's parameters: their places in the int64 array that its threads share. Strides are in elements.
(
    TICKET,  # the next entry
    LOGITS,
    LOGITS_STRIDE,
    VOCAB_SIZE,
    BITMASK,
    NUM_WORDS,
    ROWS,
    NUM_ENTRIES,
) = range(8)


@emitted(nothing)
def _forbid(builder: Builder, kinds: Kinds, logits: Value, forbidden: Value) -> None:
    """logits[i] = minus infinity where bit i of `forbidden` is set, i < 32; the others are not touched."""
    lane_bits = ir.IntType(LANES)
    for offset in range(0, 32, LANES):
        bits = builder.trunc(builder.lshr(forbidden, lanes.integer(offset)), lane_bits)
        mask = builder.bitcast(bits, ir.VectorType(ir.IntType(1), LANES))
        lanes.store_elements(builder, lanes.constant(-math.inf), lanes.at(builder, logits, offset), mask)


def _mask(shared: Any) -> None:
    parameters = int64_pointer(shared)
    vocab_size, num_words = parameters[VOCAB_SIZE], parameters[NUM_WORDS]
    rows = int64_pointer(parameters[ROWS])
    all_bits = np.int64(0xFFFFFFFF)
    entry = take(parameters)
    while entry < parameters[NUM_ENTRIES]:
        logits = move(pointer_to(parameters[LOGITS], shared), rows[entry] * parameters[LOGITS_STRIDE])
        words = move(int32_pointer(parameters[BITMASK]), entry * num_words)
        for word in range(-(-vocab_size // 32)):
            forbidden = all_bits
            if word < num_words:
                forbidden = np.int64(words[word]) & all_bits ^ all_bits
            if 32 * word + 32 > vocab_size:
                forbidden &= (np.int64(1) << (vocab_size - 32 * word)) - 1
            if forbidden != 0:
                _forbid(move(logits, 32 * word), forbidden)
        entry = take(parameters)


WORKER = Worker(_mask)


def token_bitmask(logits: torch.Tensor, bitmask: torch.Tensor, rows: torch.Tensor) -> None:
    num_entries, num_words = bitmask.shape
    rows = rows.to(torch.int64)
    parameters = np.array(
        [
            *(0, logits.data_ptr(), logits.stride(0), logits.shape[1]),
            *(bitmask.data_ptr(), num_words, rows.data_ptr(), num_entries),
        ],
        np.int64,
    )
    WORKER.run(logits.dtype, parameters, row_threads(num_entries * logits.shape[1]) if num_entries > 1 else 1)
