"""Paged causal attention on the CPU: flash attention over tiles of queries and of unpacked pages."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from quire.kernels import cpu_attention as call
from quire.kernels import cpu_elements as elements
from quire.kernels import cpu_vector as vector
from quire.kernels.cpu_elements import (
    bfloat16_pointer,
    float16_pointer,
    float32_pointer,
    int8_pointer,
    int32_pointer,
    int64_pointer,
    move,
    pointer_to,
)
from quire.kernels.cpu_lanes import LANES, LOWEST, padded
from quire.kernels.cpu_tiles import has_tiles
from quire.kernels.cpu_workers import Worker, new_tensor, scratch
from quire.kernels.paged_prefill.cpu_fields import (
    MAX_ROWS,
    MAX_TOKENS_PER_TILE,
    NUM_THREADS,
    QUERY_START,
    SCRATCH,
    SCRATCH_SIZE,
    TOKENS_PER_TILE,
)
from quire.kernels.paged_prefill.cpu_fields import POSITIONS as _TILE
from quire.kernels.paged_prefill.cpu_tiles import attend_in_tiles, tile_scratch_size

_TILES_PER_THREAD = 2  # at least so many tiles of queries for each thread, if there are enough tokens


@numba.njit
def _unpack(  # type: ignore[no-untyped-def]
    parameters, keys, values, k_scales, v_scales, table, start, first, last, addresses, tile_keys, key_scales,
    tile_values,
):  # fmt: skip
    """The positions [first, last) of the tile at `start`, as float32: keys [D, _TILE] and values [_TILE, padded D].

    Columns of keys at other positions repeat one of these; such values are zero. Keys are not yet multiplied with their
    scales, `key_scales` [_TILE]. Returns 0.0, or NaN if a value is not finite.
    """
    head_dim, block_size = parameters[call.HEAD_DIM], parameters[call.BLOCK_SIZE]
    padded_dim = padded(head_dim)
    taint = np.float32(0.0)
    for column in range(_TILE):
        position = min(max(start + column, first), last - 1)
        block = position // block_size
        block_id, slot = np.int64(table[block]), position - block * block_size
        offset = block_id * parameters[call.BLOCK_STRIDE] + slot * head_dim
        factor = np.float32(1.0)
        if k_scales != 0:
            scale = block_id * parameters[call.SCALES_BLOCK_STRIDE] + slot
            key_scales[column] = elements.read(elements.bfloat16_pointer(k_scales), scale)
            factor = elements.read(elements.bfloat16_pointer(v_scales), scale)
        addresses[column] = elements.address_of(move(keys, offset))
        target = move(tile_values, column * padded_dim)
        if position == start + column:
            taint += vector.unpack_row(move(values, offset), head_dim, factor, target)
        else:
            for i in range(padded_dim):
                target[i] = 0.0
    for column in range(0, _TILE, LANES):
        vector.unpack_transposed(move(addresses, column), keys, head_dim, move(tile_keys, column), _TILE)
    return taint


@numba.njit
def _visible(position, window, start):  # type: ignore[no-untyped-def]
    """The columns [low, high) of the tile at `start` that the query at `position` sees."""
    low = min(max(position - window + 1 - start, 0), _TILE)
    return low, max(low, min(position + 1 - start, _TILE))


@numba.njit
def _softmax(scores, width, num_rows, num_heads, position, window, start, maxima, divisors, factors):  # type: ignore[no-untyped-def]
    """Scores become weights, in the first `width` columns; `factors` become what the sums so far are multiplied by."""
    padded_rows = padded(num_rows)
    for row in range(num_rows):
        line = move(scores, row * _TILE)
        low, high = _visible(position + row // num_heads, window, start)
        for column in range(low):
            line[column] = -np.inf
        for column in range(high, width):
            line[column] = -np.inf
        largest = vector.row_max(line, width)
        largest = largest if largest > maxima[row] else maxima[row]
        factors[row] = maxima[row] - largest
        maxima[row] = largest
    for row in range(num_rows, padded_rows):
        factors[row] = 0.0
    vector.row_exp2(factors, padded_rows, np.float32(0.0))
    for row in range(num_rows):
        total = vector.row_exp2(move(scores, row * _TILE), width, maxima[row])
        divisors[row] = divisors[row] * factors[row] + total


@numba.njit
def _add_values(weights, num_rows, num_heads, position, window, start, tainted, tile_values, padded_dim, sums, factors):  # type: ignore[no-untyped-def]
    """sums[row] = sums[row] * factors[row] + the weighted values of the tile.

    A weight of zero does not hide a NaN or an infinity, so in a tainted tile each row is given what it sees alone.
    """
    if tainted:
        for row in range(num_rows):
            low, high = _visible(position + row // num_heads, window, start)
            vector.add_product_row(
                move(weights, row * _TILE + low), _TILE, move(tile_values, low * padded_dim), padded_dim,
                move(sums, row * padded_dim), padded_dim, high - low, padded_dim, move(factors, row),
            )  # fmt: skip
        return
    for row in range(0, num_rows, vector.ROWS):
        # Weights past what the last row sees are not zeros but were never written.
        last_row = min(row + vector.ROWS, num_rows) - 1
        _, high = _visible(position + last_row // num_heads, window, start)
        vector.add_product_rows(
            move(weights, row * _TILE), _TILE, tile_values, padded_dim,
            move(sums, row * padded_dim), padded_dim, high, padded_dim, move(factors, row),
        )  # fmt: skip


@numba.njit
def _attend_tile(parameters, shared, page, seq, kv_head, first_token, scratch):  # type: ignore[no-untyped-def]
    """The tokens of a sequence from its `first_token`-th new one on, for the query heads of one KV head."""
    num_heads, head_dim = parameters[call.GROUP_SIZE], parameters[call.HEAD_DIM]
    tokens_per_tile, window = parameters[TOKENS_PER_TILE], parameters[call.WINDOW]
    padded_dim, max_rows = padded(head_dim), padded(tokens_per_tile * num_heads)
    tile_keys = float32_pointer(move(scratch, _TILE))
    tile_values = move(tile_keys, padded_dim * _TILE)
    queries = move(tile_values, padded_dim * _TILE)
    sums = move(queries, max_rows * padded_dim)
    scores = move(sums, max_rows * padded_dim)
    maxima = move(scores, max_rows * _TILE)
    divisors, factors = move(maxima, max_rows), move(maxima, 2 * max_rows)
    key_scales = move(factors, max_rows)

    query_start = int32_pointer(parameters[QUERY_START])
    token = np.int64(query_start[seq]) + first_token
    num_tokens = min(tokens_per_tile, np.int64(query_start[seq + 1]) - token)
    num_rows = num_tokens * num_heads
    position = np.int64(int32_pointer(parameters[call.SEQ_LENS])[seq]) - (np.int64(query_start[seq + 1]) - token)
    call.load_queries(parameters, shared, token, num_tokens, kv_head, queries)
    for i in range(max_rows * padded_dim):
        sums[i] = 0.0
    for i in range(num_rows * padded_dim, max_rows * padded_dim):
        queries[i] = 0.0
    for row in range(max_rows):
        maxima[row] = LOWEST
        divisors[row] = 0.0

    table = move(int32_pointer(parameters[call.TABLES]), seq * parameters[call.TABLE_STRIDE])
    keys = move(pointer_to(parameters[call.KEYS], page), kv_head * parameters[call.HEAD_STRIDE])
    values = move(pointer_to(parameters[call.VALUES], page), kv_head * parameters[call.HEAD_STRIDE])
    k_scales = parameters[call.K_SCALES] + 2 * kv_head * parameters[call.SCALES_HEAD_STRIDE]
    v_scales = parameters[call.V_SCALES] + 2 * kv_head * parameters[call.SCALES_HEAD_STRIDE]
    first, last = max(position - window + 1, 0), position + num_tokens
    for start in range(first // _TILE * _TILE, last, _TILE):
        taint = _unpack(
            parameters, keys, values, k_scales, v_scales, table, start, max(start, first), min(start + _TILE, last),
            scratch, tile_keys, key_scales, tile_values,
        )  # fmt: skip
        width = padded(min(_TILE, last - start))
        for row in range(0, num_rows, vector.ROWS):
            vector.multiply_rows(
                move(queries, row * padded_dim), padded_dim, tile_keys, _TILE,
                move(scores, row * _TILE), _TILE, head_dim, width, factors,
            )  # fmt: skip
        if k_scales != 0:
            for row in range(num_rows):
                vector.multiply_row(move(scores, row * _TILE), key_scales, width)
        _softmax(scores, width, num_rows, num_heads, position, window, start, maxima, divisors, factors)
        _add_values(
            scores, num_rows, num_heads, position, window, start, taint != 0.0, tile_values, padded_dim, sums, factors
        )

    call.store_results(parameters, shared, token, num_tokens, kv_head, sums, divisors)


@numba.njit(inline="always")
def _share_out(shared, page, attend):  # type: ignore[no-untyped-def]
    """`shared` points to elements of the query's dtype, `page` to such as the cache holds; `attend` does a unit."""
    parameters = int64_pointer(shared)
    thread = elements.take(move(parameters, call.THREAD))
    scratch = int64_pointer(parameters[SCRATCH] + 8 * thread * parameters[SCRATCH_SIZE])
    query_start, tokens_per_tile = int32_pointer(parameters[QUERY_START]), parameters[TOKENS_PER_TILE]
    num_kv_heads = parameters[call.NUM_KV_HEADS]
    first_unit = 0
    unit = elements.take(parameters)
    for seq in range(parameters[call.NUM_SEQS]):
        num_tiles = -(-np.int64(query_start[seq + 1] - query_start[seq]) // tokens_per_tile)
        while unit < first_unit + num_tiles * num_kv_heads:
            tile, kv_head = divmod(unit - first_unit, num_kv_heads)
            # The last tile sees the most positions: taken first, it does not keep the other threads waiting.
            attend(parameters, shared, page, seq, kv_head, (num_tiles - 1 - tile) * tokens_per_tile, scratch)
            unit = elements.take(parameters)
        first_unit += num_tiles * num_kv_heads


def _attend(shared: Any) -> None:
    _share_out(shared, shared, _attend_tile)


def _attend_codes(shared: Any) -> None:
    _share_out(shared, int8_pointer(shared), _attend_tile)


def _attend_bfloat16(shared: Any) -> None:
    _share_out(shared, bfloat16_pointer(shared), _attend_tile)


def _attend_float16(shared: Any) -> None:
    _share_out(shared, float16_pointer(shared), _attend_tile)


def _attend_in_tiles(shared: Any) -> None:
    _share_out(shared, shared, attend_in_tiles)


def _attend_codes_in_tiles(shared: Any) -> None:
    _share_out(shared, int8_pointer(shared), attend_in_tiles)


@numba.njit
def _scratch_size(padded_dim: int, rows: int) -> int:
    """int64 that a thread needs for tiles of so many rows of queries."""
    num_floats = 2 * padded_dim * _TILE + rows * (2 * padded_dim + _TILE + 3) + _TILE
    size: int = _TILE + -(-num_floats // 16) * 8
    return size


def _prepare(shared: Any) -> None:
    """Choose how many tokens a tile of queries has: enough tiles for all threads, unless they would be tiny."""
    parameters = int64_pointer(shared)
    query_start, num_seqs = int32_pointer(parameters[QUERY_START]), parameters[call.NUM_SEQS]
    longest = np.int64(0)
    for seq in range(num_seqs):
        longest = max(longest, np.int64(query_start[seq + 1] - query_start[seq]))
    largest = parameters[MAX_TOKENS_PER_TILE]
    num_tiles = parameters[NUM_THREADS] * _TILES_PER_THREAD
    wanted = -(-np.int64(query_start[num_seqs]) * parameters[call.NUM_KV_HEADS] // num_tiles)
    most = max(1, min(largest, longest, max(wanted, largest // 4)))
    parameters[TOKENS_PER_TILE] = -(-longest // max(1, -(-longest // most)))  # as even as can be
    parameters[call.THREAD] = 0


WORKER = Worker(_attend, _prepare)
PAGE_WORKERS = {
    torch.int8: Worker(_attend_codes, _prepare),
    torch.bfloat16: Worker(_attend_bfloat16, _prepare),
    torch.float16: Worker(_attend_float16, _prepare),
}
"""For pages of another dtype than the query's."""
TILES_WORKER = Worker(_attend_in_tiles, _prepare)
CODES_TILES_WORKER = Worker(_attend_codes_in_tiles, _prepare)


def paged_prefill(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float,
    max_query_len: int,
    sliding_window: int | None = None,
    out: torch.Tensor | None = None,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    out = new_tensor(tuple(query.shape), query.dtype) if out is None else out
    if query.shape[0] == 0:
        return out
    _, num_heads, head_dim = query.shape
    num_kv_heads, num_threads = k_cache.shape[1], torch.get_num_threads()
    group_size = num_heads // num_kv_heads
    max_tokens_per_tile = max(1, MAX_ROWS // group_size)
    padded_dim, rows = padded.py_func(head_dim), padded.py_func(max_tokens_per_tile * group_size)
    in_tiles = query.dtype == torch.bfloat16 and group_size <= MAX_ROWS and has_tiles()
    scratch_size = tile_scratch_size(head_dim) if in_tiles else _scratch_size.py_func(padded_dim, rows)
    memory = scratch(8 * num_threads * scratch_size)
    common = call.describe(
        query, k_cache, v_cache, block_tables, seq_lens, scale, sliding_window, out, k_scales, v_scales
    )
    own = (query_start.data_ptr(), 0, max_tokens_per_tile, num_threads, memory, scratch_size)
    if in_tiles:
        worker = TILES_WORKER if k_scales is None else CODES_TILES_WORKER
    else:
        worker = WORKER if k_cache.dtype == query.dtype else PAGE_WORKERS[k_cache.dtype]
    worker.run(query.dtype, np.array([*common, *own], np.int64), num_threads)
    return out
