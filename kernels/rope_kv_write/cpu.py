"""Norm, rotation and the write into the pages on the CPU, token by token."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from quire.kernels.cpu_elements import (
    bfloat16_pointer,
    float16_pointer,
    float32_pointer,
    float64_pointer,
    int64_pointer,
    move,
    pointer_to,
    read,
    take,
    write,
)
from quire.kernels.cpu_norm import copy_row, rotate, rotate_scaled, sum_of_squares
from quire.kernels.cpu_workers import ALONE, Worker, row_threads

# A call's parameters: their places in the int64 array that its threads share. Strides are in elements.
(
    TICKET,  # the next token
    QUERY,
    QUERY_STRIDE,
    QUERY_HEAD_STRIDE,
    NUM_HEADS,
    KEY,
    KEY_STRIDE,
    KEY_HEAD_STRIDE,
    NUM_KV_HEADS,
    VALUE,
    VALUE_STRIDE,
    VALUE_HEAD_STRIDE,
    POSITIONS,
    COS_SIN,
    ROTARY_DIM,
    K_CACHE,
    V_CACHE,
    BLOCK_STRIDE,
    HEAD_STRIDE,
    SLOTS,
    BLOCK_SIZE,
    HEAD_DIM,
    NUM_TOKENS,
    QUERY_NORM,  # 0 if there is none, like KEY_NORM
    KEY_NORM,
    EPSILON,  # as float64
) = range(26)


@numba.njit
def _turn(source, target, cos, sin, rotary_dim, head_dim, normalises, weight, epsilon):  # type: ignore[no-untyped-def]
    if normalises:
        factor = np.float32(1.0) / np.sqrt(sum_of_squares(source, head_dim) / np.float32(head_dim) + epsilon)
        rotate_scaled(source, target, cos, sin, rotary_dim // 2, factor, weight)
        for i in range(rotary_dim, head_dim):
            write(target, i, read(source, i) * factor * read(weight, i))
    else:
        rotate(source, target, cos, sin, rotary_dim // 2, np.float32(1.0), weight)
        copy_row(move(source, rotary_dim), move(target, rotary_dim), head_dim - rotary_dim)


def _prepare(shared: Any) -> None:
    parameters = int64_pointer(shared)
    if parameters[NUM_TOKENS] == 1:
        parameters[TICKET] = ALONE


@numba.njit
def _write_tokens(shared, page):  # type: ignore[no-untyped-def]
    """`shared` points to elements of the query's dtype, `page` to such as the cache holds."""
    parameters = int64_pointer(shared)
    head_dim, rotary_dim, block_size = parameters[HEAD_DIM], parameters[ROTARY_DIM], parameters[BLOCK_SIZE]
    positions, slots = int64_pointer(parameters[POSITIONS]), int64_pointer(parameters[SLOTS])
    epsilon, normalises = np.float32(float64_pointer(shared)[EPSILON]), parameters[QUERY_NORM] != 0
    query_norm = pointer_to(parameters[QUERY_NORM], shared)
    key_norm = pointer_to(parameters[KEY_NORM], shared)
    token = take(parameters)
    while token < parameters[NUM_TOKENS]:
        cos = move(float32_pointer(parameters[COS_SIN]), positions[token] * rotary_dim)
        sin = move(cos, rotary_dim // 2)
        query = move(pointer_to(parameters[QUERY], shared), token * parameters[QUERY_STRIDE])
        for head in range(parameters[NUM_HEADS]):
            row = move(query, head * parameters[QUERY_HEAD_STRIDE])
            _turn(row, row, cos, sin, rotary_dim, head_dim, normalises, query_norm, epsilon)
        block, offset = divmod(slots[token], block_size)
        slot = block * parameters[BLOCK_STRIDE] + offset * head_dim
        key = move(pointer_to(parameters[KEY], shared), token * parameters[KEY_STRIDE])
        value = move(pointer_to(parameters[VALUE], shared), token * parameters[VALUE_STRIDE])
        for head in range(parameters[NUM_KV_HEADS]):
            target = slot + head * parameters[HEAD_STRIDE]
            row = move(key, head * parameters[KEY_HEAD_STRIDE])
            cached = move(pointer_to(parameters[K_CACHE], page), target)
            _turn(row, cached, cos, sin, rotary_dim, head_dim, normalises, key_norm, epsilon)
            row = move(value, head * parameters[VALUE_HEAD_STRIDE])
            cached = move(pointer_to(parameters[V_CACHE], page), target)
            copy_row(row, cached, head_dim)
        token = take(parameters)


def _write(shared: Any) -> None:
    _write_tokens(shared, shared)


def _write_bfloat16(shared: Any) -> None:
    _write_tokens(shared, bfloat16_pointer(shared))


def _write_float16(shared: Any) -> None:
    _write_tokens(shared, float16_pointer(shared))


WORKER = Worker(_write, _prepare)
PAGE_WORKERS = {
    torch.bfloat16: Worker(_write_bfloat16, _prepare),
    torch.float16: Worker(_write_float16, _prepare),
}
"""For pages of another dtype than the query's."""


def rope_kv_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
) -> None:
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    parameters = np.array(
        [
            *(0, query.data_ptr(), *query.stride()[:2], num_heads, key.data_ptr(), *key.stride()[:2], num_kv_heads),
            *(value.data_ptr(), *value.stride()[:2], positions.data_ptr(), cos_sin.data_ptr(), cos_sin.shape[1]),
            *(k_cache.data_ptr(), v_cache.data_ptr(), *k_cache.stride()[:2], slot_mapping.data_ptr()),
            *(k_cache.shape[2], head_dim, num_tokens),
            *(0 if norm is None else norm.data_ptr() for norm in (query_norm, key_norm)),
            0,
        ],
        np.int64,
    )
    parameters.view(np.float64)[EPSILON] = eps
    worker = WORKER if k_cache.dtype == query.dtype else PAGE_WORKERS[k_cache.dtype]
    worker.run(query.dtype, parameters, row_threads(num_tokens * (num_heads + num_kv_heads) * head_dim))
