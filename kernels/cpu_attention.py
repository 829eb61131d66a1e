"""What the CPU attention kernels share: the parameters of a call, queries in and results out."""

from __future__ import annotations

import numba
import numpy as np
import torch

from quire.kernels.cpu_elements import float64_pointer, move, pointer_to, read, write
from quire.kernels.cpu_lanes import padded
from quire.kernels.cpu_workers import Parameters

_LOG2_E = 1.4426950408889634

# The fields of a call's parameters: their places in the int64 array that its threads share. Strides are in elements.
(
    TICKET,  # the next unit of work
    THREAD,  # the next thread's number
    QUERY,
    QUERY_STRIDE,
    QUERY_HEAD_STRIDE,
    OUT,
    OUT_STRIDE,
    OUT_HEAD_STRIDE,
    KEYS,
    VALUES,
    BLOCK_STRIDE,
    HEAD_STRIDE,
    K_SCALES,  # 0, like V_SCALES, if the cache has none
    V_SCALES,
    SCALES_BLOCK_STRIDE,
    SCALES_HEAD_STRIDE,
    TABLES,
    TABLE_STRIDE,
    SEQ_LENS,
    NUM_SEQS,
    NUM_KV_HEADS,
    GROUP_SIZE,  # query heads of a KV head
    HEAD_DIM,
    BLOCK_SIZE,
    WINDOW,
    SCALE,  # as float64; log2(e) is multiplied in, for exponentials to the base of two
    NUM_COMMON,
) = range(27)

_NO_WINDOW = 1 << 62


def describe(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    out: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
) -> Parameters:
    """The common fields of a call."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1:3]
    parameters = np.array(
        [
            *(0, 0),
            *(query.data_ptr(), *query.stride()[:2], out.data_ptr(), *out.stride()[:2]),
            *(k_cache.data_ptr(), v_cache.data_ptr(), *k_cache.stride()[:2]),
            *(0 if scales is None else scales.data_ptr() for scales in (k_scales, v_scales)),
            *((0, 0) if k_scales is None else k_scales.stride()[:2]),
            *(block_tables.data_ptr(), block_tables.stride(0), seq_lens.data_ptr(), seq_lens.shape[0]),
            *(num_kv_heads, num_heads // num_kv_heads, head_dim, block_size, sliding_window or _NO_WINDOW, 0),
        ],
        np.int64,
    )
    parameters.view(np.float64)[SCALE] = scale * _LOG2_E
    return parameters


@numba.njit
def load_queries(parameters, shared, token, num_tokens, kv_head, queries):  # type: ignore[no-untyped-def]
    """queries[row] = the scaled query of token row // G and head row % G, as float32, padded with zeros."""
    num_heads, head_dim = parameters[GROUP_SIZE], parameters[HEAD_DIM]
    padded_dim = padded(head_dim)
    scale = np.float32(float64_pointer(shared)[SCALE])
    query = move(pointer_to(parameters[QUERY], shared), token * parameters[QUERY_STRIDE])
    query = move(query, kv_head * num_heads * parameters[QUERY_HEAD_STRIDE])
    for row in range(num_tokens * num_heads):
        offset = row // num_heads * parameters[QUERY_STRIDE] + row % num_heads * parameters[QUERY_HEAD_STRIDE]
        source, target = move(query, offset), move(queries, row * padded_dim)
        for i in range(head_dim):
            target[i] = read(source, i) * scale
        for i in range(head_dim, padded_dim):
            target[i] = 0.0


@numba.njit
def store_results(parameters, shared, token, num_tokens, kv_head, sums, divisors):  # type: ignore[no-untyped-def]
    """The output of token row // G and head row % G = sums[row] / divisors[row]."""
    num_heads, head_dim = parameters[GROUP_SIZE], parameters[HEAD_DIM]
    padded_dim = padded(head_dim)
    out = move(pointer_to(parameters[OUT], shared), token * parameters[OUT_STRIDE])
    out = move(out, kv_head * num_heads * parameters[OUT_HEAD_STRIDE])
    for row in range(num_tokens * num_heads):
        offset = row // num_heads * parameters[OUT_STRIDE] + row % num_heads * parameters[OUT_HEAD_STRIDE]
        source, target, divisor = move(sums, row * padded_dim), move(out, offset), divisors[row]
        for i in range(head_dim):
            write(target, i, source[i] / divisor)
