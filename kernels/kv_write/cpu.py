"""Writing keys and values into pages on the CPU."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from quire.kernels.cpu_elements import (
    bfloat16_pointer,
    float16_pointer,
    float32_pointer,
    int8_pointer,
    int64_pointer,
    move,
    pointer_to,
    take,
    write,
)
from quire.kernels.cpu_norm import copy_row
from quire.kernels.cpu_quantization import store_codes
from quire.kernels.cpu_workers import Worker, row_threads

_TOKENS_PER_UNIT = 4

# A call's parameters: their places in the int64 array that its threads share. Strides are in elements.
(
    TICKET,  # the next unit of tokens
    KEY,
    KEY_STRIDE,
    KEY_HEAD_STRIDE,
    VALUE,
    VALUE_STRIDE,
    VALUE_HEAD_STRIDE,
    K_CACHE,
    V_CACHE,
    BLOCK_STRIDE,
    HEAD_STRIDE,
    SLOTS,
    NUM_TOKENS,
    NUM_KV_HEADS,
    HEAD_DIM,
    BLOCK_SIZE,
    K_SCALES,  # 0, like V_SCALES, if the cache has none
    V_SCALES,
    SCALES_BLOCK_STRIDE,
    SCALES_HEAD_STRIDE,
) = range(20)


@numba.njit
def _write_rows(shared, page):  # type: ignore[no-untyped-def]
    """`shared` points to elements of the keys' dtype, `page` to such as the cache holds."""
    parameters = int64_pointer(shared)
    num_tokens, head_dim, block_size = parameters[NUM_TOKENS], parameters[HEAD_DIM], parameters[BLOCK_SIZE]
    slots = int64_pointer(parameters[SLOTS])
    key, value = pointer_to(parameters[KEY], shared), pointer_to(parameters[VALUE], shared)
    k_cache, v_cache = pointer_to(parameters[K_CACHE], page), pointer_to(parameters[V_CACHE], page)
    first_token = take(parameters) * _TOKENS_PER_UNIT
    while first_token < num_tokens:
        for token in range(first_token, min(first_token + _TOKENS_PER_UNIT, num_tokens)):
            block, offset = divmod(slots[token], block_size)
            for head in range(parameters[NUM_KV_HEADS]):
                target = block * parameters[BLOCK_STRIDE] + head * parameters[HEAD_STRIDE] + offset * head_dim
                keys = move(key, token * parameters[KEY_STRIDE] + head * parameters[KEY_HEAD_STRIDE])
                values = move(value, token * parameters[VALUE_STRIDE] + head * parameters[VALUE_HEAD_STRIDE])
                copy_row(keys, move(k_cache, target), head_dim)
                copy_row(values, move(v_cache, target), head_dim)
        first_token = take(parameters) * _TOKENS_PER_UNIT


def _write_codes(shared: Any) -> None:
    parameters = int64_pointer(shared)
    num_tokens, num_kv_heads, head_dim = parameters[NUM_TOKENS], parameters[NUM_KV_HEADS], parameters[HEAD_DIM]
    slots, block_size = int64_pointer(parameters[SLOTS]), parameters[BLOCK_SIZE]
    key, value = pointer_to(parameters[KEY], shared), pointer_to(parameters[VALUE], shared)
    k_cache, v_cache = int8_pointer(parameters[K_CACHE]), int8_pointer(parameters[V_CACHE])
    k_scales, v_scales = bfloat16_pointer(parameters[K_SCALES]), bfloat16_pointer(parameters[V_SCALES])
    first_token = take(parameters) * _TOKENS_PER_UNIT
    while first_token < num_tokens:
        for token in range(first_token, min(first_token + _TOKENS_PER_UNIT, num_tokens)):
            block, offset = divmod(slots[token], block_size)
            for head in range(num_kv_heads):
                target = block * parameters[BLOCK_STRIDE] + head * parameters[HEAD_STRIDE] + offset * head_dim
                scale = block * parameters[SCALES_BLOCK_STRIDE] + head * parameters[SCALES_HEAD_STRIDE] + offset
                keys = move(key, token * parameters[KEY_STRIDE] + head * parameters[KEY_HEAD_STRIDE])
                values = move(value, token * parameters[VALUE_STRIDE] + head * parameters[VALUE_HEAD_STRIDE])
                write(k_scales, scale, store_codes(keys, head_dim, move(k_cache, target)))
                write(v_scales, scale, store_codes(values, head_dim, move(v_cache, target)))
        first_token = take(parameters) * _TOKENS_PER_UNIT


def _write(shared: Any) -> None:
    _write_rows(shared, shared)


def _write_float32(shared: Any) -> None:
    _write_rows(shared, float32_pointer(shared))


def _write_bfloat16(shared: Any) -> None:
    _write_rows(shared, bfloat16_pointer(shared))


def _write_float16(shared: Any) -> None:
    _write_rows(shared, float16_pointer(shared))


WORKER = Worker(_write)
PAGE_WORKERS = {
    torch.int8: Worker(_write_codes),
    torch.float32: Worker(_write_float32),
    torch.bfloat16: Worker(_write_bfloat16),
    torch.float16: Worker(_write_float16),
}
"""For pages of another dtype than the keys'."""


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> None:
    num_tokens, num_kv_heads, head_dim = key.shape
    parameters = np.array(
        [
            *(0, key.data_ptr(), *key.stride()[:2], value.data_ptr(), *value.stride()[:2]),
            *(k_cache.data_ptr(), v_cache.data_ptr(), *k_cache.stride()[:2]),
            *(slot_mapping.data_ptr(), num_tokens, num_kv_heads, head_dim, k_cache.shape[2]),
            *(0 if scales is None else scales.data_ptr() for scales in (k_scales, v_scales)),
            *((0, 0) if k_scales is None else k_scales.stride()[:2]),
        ],
        np.int64,
    )
    worker = WORKER if k_cache.dtype == key.dtype else PAGE_WORKERS[k_cache.dtype]
    worker.run(key.dtype, parameters, row_threads(2 * num_tokens * num_kv_heads * head_dim))
