"""Rotary position embedding on the CPU."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from quire.kernels.cpu_elements import float32_pointer, int64_pointer, move, pointer_to, take
from quire.kernels.cpu_norm import rotate
from quire.kernels.cpu_workers import Worker, row_threads

_TOKENS_PER_UNIT = 4

# A call's parameters: their places in the int64 array that its threads share. Strides are in elements.
(
    TICKET,  # the next unit of tokens
    QUERY,
    QUERY_STRIDE,
    QUERY_HEAD_STRIDE,
    NUM_HEADS,
    KEY,
    KEY_STRIDE,
    KEY_HEAD_STRIDE,
    NUM_KV_HEADS,
    POSITIONS,
    COS_SIN,
    NUM_TOKENS,
    ROTARY_DIM,
) = range(13)


@numba.njit
def _rotate_heads(heads, head_stride, num_heads, cos, sin, half):  # type: ignore[no-untyped-def]
    for head in range(num_heads):
        row = move(heads, head * head_stride)
        rotate(row, row, cos, sin, half, np.float32(1.0), row)


def _rotate(shared: Any) -> None:
    parameters = int64_pointer(shared)
    num_tokens, rotary_dim = parameters[NUM_TOKENS], parameters[ROTARY_DIM]
    positions, table = int64_pointer(parameters[POSITIONS]), float32_pointer(parameters[COS_SIN])
    half = rotary_dim // 2
    query, key = pointer_to(parameters[QUERY], shared), pointer_to(parameters[KEY], shared)
    first_token = take(parameters) * _TOKENS_PER_UNIT
    while first_token < num_tokens:
        for token in range(first_token, min(first_token + _TOKENS_PER_UNIT, num_tokens)):
            cos = move(table, positions[token] * rotary_dim)
            sin = move(cos, half)
            queries, keys = move(query, token * parameters[QUERY_STRIDE]), move(key, token * parameters[KEY_STRIDE])
            _rotate_heads(queries, parameters[QUERY_HEAD_STRIDE], parameters[NUM_HEADS], cos, sin, half)
            _rotate_heads(keys, parameters[KEY_HEAD_STRIDE], parameters[NUM_KV_HEADS], cos, sin, half)
        first_token = take(parameters) * _TOKENS_PER_UNIT


WORKER = Worker(_rotate)


def rope(query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    num_tokens, num_heads, _ = query.shape
    num_kv_heads, rotary_dim = key.shape[1], cos_sin.shape[1]
    parameters = np.array(
        [
            *(0, query.data_ptr(), *query.stride()[:2], num_heads, key.data_ptr(), *key.stride()[:2], num_kv_heads),
            *(positions.data_ptr(), cos_sin.data_ptr(), num_tokens, rotary_dim),
        ],
        np.int64,
    )
    WORKER.run(query.dtype, parameters, row_threads(num_tokens * (num_heads + num_kv_heads) * rotary_dim))
