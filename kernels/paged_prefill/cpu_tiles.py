"""Paged causal attention on the CPU, in bfloat16, by a processor that has tile registers."""

from __future__ import annotations

import numba
import numpy as np

from quire.kernels import cpu_attention as call
from quire.kernels import cpu_elements as elements
from quire.kernels import cpu_tile_attention as tiles
from quire.kernels.cpu_elements import (
    bfloat16_pointer,
    float32_pointer,
    float64_pointer,
    int32_pointer,
    int64_pointer,
    move,
    pointer_to,
)
from quire.kernels.cpu_lanes import LOWEST
from quire.kernels.cpu_tile_attention import DEPTH, ROWS
from quire.kernels.cpu_tiles import configure_tiles, release_tiles
from quire.kernels.paged_prefill.cpu_fields import MAX_ROWS, POSITIONS, QUERY_START, TOKENS_PER_TILE

# What a thread has in its scratch memory, in bytes from its beginning; behind it what depends on the head's size.
_SCORES = 0  # float32 [POSITIONS, ROWS]
_WEIGHTS = _SCORES + 4 * POSITIONS * ROWS  # bfloat16 [2, POSITIONS / 2, ROWS, 2]
_MAXIMA = _WEIGHTS + 4 * POSITIONS * ROWS  # float32 [MAX_ROWS], and the divisors
_DIVISORS = _MAXIMA + 4 * MAX_ROWS
_FACTORS = _DIVISORS + 4 * MAX_ROWS  # float32 [ROWS]
_LIMITS = _FACTORS + 4 * ROWS  # int32 [2, ROWS]
_K_SCALES = _LIMITS + 8 * ROWS  # float32 [POSITIONS], and the values'
_V_SCALES = _K_SCALES + 4 * POSITIONS
_APART = _V_SCALES + 4 * POSITIONS  # float32 [POSITIONS]: the scale of values that are added one by one, others 0
_ADDRESSES = _APART + 4 * POSITIONS  # int64 [ROWS]
_FIXED = _ADDRESSES + 8 * ROWS
_KEYS = 2 * POSITIONS  # bfloat16 for each dimension: [POSITIONS, padded_dim]
_VALUES = 2 * POSITIONS  # [POSITIONS, padded_dim], and [padded_dim, POSITIONS]
_QUERIES = 2 * MAX_ROWS  # [MAX_ROWS / ROWS, padded_dim, ROWS]
_SUMS = 4 * MAX_ROWS  # float32 [MAX_ROWS / ROWS, padded_dim, ROWS]


def tile_scratch_size(head_dim: int) -> int:
    """int64 that a thread needs: a multiple of a cache line."""
    return (_FIXED + -(-head_dim // DEPTH) * DEPTH * (_KEYS + 2 * _VALUES + _QUERIES + _SUMS)) // 8


@numba.njit
def _row_address(parameters, address, stride, head_stride, token, kv_head, row):  # type: ignore[no-untyped-def]
    """Of token row // G from `token` on, and head row % G of those of a KV head, in bfloat16."""
    num_heads = parameters[call.GROUP_SIZE]
    head = kv_head * num_heads + row % num_heads
    return address + 2 * ((token + row // num_heads) * parameters[stride] + head * parameters[head_stride])


@numba.njit
def _load_queries(parameters, token, kv_head, num_rows, padded_dim, rows, queries):  # type: ignore[no-untyped-def]
    head_dim = parameters[call.HEAD_DIM]
    for first in range(0, num_rows, ROWS):
        for i in range(ROWS):
            row = min(first + i, num_rows - 1)  # there is always a row to compute
            address = _row_address(
                parameters, parameters[call.QUERY], call.QUERY_STRIDE, call.QUERY_HEAD_STRIDE, token, kv_head, row
            )
            tiles.copy_row(bfloat16_pointer(address), head_dim, padded_dim, rows + 2 * i * padded_dim)
        tiles.pack_queries(rows, padded_dim, queries + 2 * first * padded_dim)


@numba.njit
def _load_positions(parameters, page, kv_head, table, start, first, last, padded_dim, scratch, keys, values, packed):  # type: ignore[no-untyped-def]
    """Keys and values of the positions [first, last) of the tile at `start`, others zero, and their scales.

    Returns whether all values are finite.
    """
    head_dim, block_size = parameters[call.HEAD_DIM], parameters[call.BLOCK_SIZE]
    all_keys = move(pointer_to(parameters[call.KEYS], page), kv_head * parameters[call.HEAD_STRIDE])
    all_values = move(pointer_to(parameters[call.VALUES], page), kv_head * parameters[call.HEAD_STRIDE])
    k_scales, v_scales = float32_pointer(scratch + _K_SCALES), float32_pointer(scratch + _V_SCALES)
    has_scales = parameters[call.K_SCALES] != 0
    taint = np.float32(0.0)
    block = start // block_size
    slot = start - block * block_size
    for column in range(POSITIONS):
        key, value = keys + 2 * column * padded_dim, values + 2 * column * padded_dim
        k_scales[column] = v_scales[column] = np.float32(1.0)
        if start + column < first or start + column >= last:
            tiles.copy_row(all_keys, 0, padded_dim, key)
            tiles.copy_row(all_values, 0, padded_dim, value)
        else:
            block_id = np.int64(table[block])
            offset = block_id * parameters[call.BLOCK_STRIDE] + slot * head_dim
            tiles.copy_row(move(all_keys, offset), head_dim, padded_dim, key)
            tiles.copy_row(move(all_values, offset), head_dim, padded_dim, value)
            if has_scales:
                place = block_id * parameters[call.SCALES_BLOCK_STRIDE] + slot
                place += kv_head * parameters[call.SCALES_HEAD_STRIDE]
                k_scales[column] = elements.read(bfloat16_pointer(parameters[call.K_SCALES]), place)
                v_scales[column] = elements.read(bfloat16_pointer(parameters[call.V_SCALES]), place)
                taint += v_scales[column] * np.float32(0.0)
        slot += 1
        if slot == block_size:
            block, slot = block + 1, 0
    return taint + tiles.pack_values(values, padded_dim, packed) == 0.0


@numba.njit
def _set_apart(padded_dim, scratch, values, packed):  # type: ignore[no-untyped-def]
    """Take the positions that have a value which is not finite out of the packed values."""
    v_scales, apart = float32_pointer(scratch + _V_SCALES), float32_pointer(scratch + _APART)
    columns = bfloat16_pointer(packed)
    for column in range(POSITIONS):
        row, taint = bfloat16_pointer(values + 2 * column * padded_dim), np.float32(0.0)
        for i in range(padded_dim):
            taint += elements.read(row, i) * v_scales[column] * np.float32(0.0)
        apart[column] = np.float32(0.0)
        if taint != 0.0:
            apart[column] = v_scales[column]
            v_scales[column] = 1.0
            for i in range(padded_dim):
                elements.write(columns, i * POSITIONS + column, np.float32(0.0))


@numba.njit
def _add_apart(padded_dim, scratch, values, sums):  # type: ignore[no-untyped-def]
    """Add the values that were set apart to the sums of the rows that see them: a weight of zero does not hide them."""
    apart, limits = float32_pointer(scratch + _APART), int32_pointer(scratch + _LIMITS)
    weights, totals = bfloat16_pointer(scratch + _WEIGHTS), float32_pointer(sums)
    for column in range(POSITIONS):
        if apart[column] == 0.0:
            continue
        row = bfloat16_pointer(values + 2 * column * padded_dim)
        for i in range(ROWS):
            if limits[i] <= column < limits[ROWS + i]:
                place = (column // 2 * ROWS + i) * 2 + column % 2
                weight = elements.read(weights, place) + elements.read(weights, POSITIONS * ROWS + place)
                for dim in range(padded_dim):
                    totals[dim * ROWS + i] += weight * (elements.read(row, dim) * apart[column])


@numba.njit
def _limit_rows(position, first_row, num_rows, num_heads, window, start, limits):  # type: ignore[no-untyped-def]
    """limits[:, i] = the columns of the tile at `start` that row first_row + i sees; whether any sees any."""
    sees = False
    for i in range(ROWS):
        own = position + min(first_row + i, num_rows - 1) // num_heads
        low = min(max(own - window + 1 - start, 0), POSITIONS)
        high = max(low, min(own + 1 - start, POSITIONS))
        limits[i], limits[ROWS + i] = low, high
        sees = sees or low < high
    return sees


@numba.njit
def attend_in_tiles(parameters, shared, page, seq, kv_head, first_token, scratch):  # type: ignore[no-untyped-def]
    """The tokens of a sequence from its `first_token`-th new one on, for the query heads of one KV head."""
    num_heads, window = parameters[call.GROUP_SIZE], parameters[call.WINDOW]
    padded_dim = -(-parameters[call.HEAD_DIM] // DEPTH) * DEPTH
    scratch = elements.address_of(scratch)
    keys = scratch + _FIXED
    values = keys + _KEYS * padded_dim
    packed = values + _VALUES * padded_dim
    queries = packed + _VALUES * padded_dim
    sums = queries + _QUERIES * padded_dim
    limits = int32_pointer(scratch + _LIMITS)

    query_start = int32_pointer(parameters[QUERY_START])
    token = np.int64(query_start[seq]) + first_token
    num_tokens = min(parameters[TOKENS_PER_TILE], np.int64(query_start[seq + 1]) - token)
    num_rows = num_tokens * num_heads
    position = np.int64(int32_pointer(parameters[call.SEQ_LENS])[seq]) - (np.int64(query_start[seq + 1]) - token)
    scale, has_scales = np.float32(float64_pointer(shared)[call.SCALE]), parameters[call.K_SCALES] != 0
    _load_queries(parameters, token, kv_head, num_rows, padded_dim, keys, queries)
    weights, factors, v_scales = scratch + _WEIGHTS, scratch + _FACTORS, scratch + _V_SCALES if has_scales else 0
    totals, best = float32_pointer(sums), float32_pointer(scratch + _MAXIMA)
    for i in range(-(-num_rows // ROWS) * ROWS * padded_dim):
        totals[i] = 0.0
    for row in range(MAX_ROWS):
        best[row] = LOWEST
        best[MAX_ROWS + row] = 0.0  # the divisor

    table = move(int32_pointer(parameters[call.TABLES]), seq * parameters[call.TABLE_STRIDE])
    first, last = max(position - window + 1, 0), position + num_tokens
    configure_tiles(ROWS, ROWS)
    for start in range(first // POSITIONS * POSITIONS, last, POSITIONS):
        finite = _load_positions(
            parameters, page, kv_head, table, start, first, last, padded_dim, scratch, keys, values, packed
        )
        if not finite:
            _set_apart(padded_dim, scratch, values, packed)
        # All rows see all positions: the first row the last one, the last row the first one.
        whole = finite and start + POSITIONS - 1 <= position and start > last - 1 - window
        waiting = -1  # rows whose weights are there: their values are added while the next rows' scores are softened
        for row in range(0, num_rows, ROWS):
            if not whole and not _limit_rows(position, row, num_rows, num_heads, window, start, limits):
                continue
            tiles.score_rows(keys, padded_dim, queries + 2 * row * padded_dim, scratch + _SCORES)
            if waiting >= 0:
                tiles.add_values(packed, padded_dim, weights, factors, sums + 4 * waiting * padded_dim)
            if has_scales:
                tiles.multiply_scores(scratch + _SCORES, scratch + _K_SCALES)
            if not whole:
                tiles.limit_scores(scratch + _SCORES, scratch + _LIMITS)
            maxima, divisors = scratch + _MAXIMA + 4 * row, scratch + _DIVISORS + 4 * row
            tiles.soften(scratch + _SCORES, scale, v_scales, maxima, divisors, factors, weights)
            waiting = row
            if not finite:
                tiles.add_values(packed, padded_dim, weights, factors, sums + 4 * row * padded_dim)
                _add_apart(padded_dim, scratch, values, sums + 4 * row * padded_dim)
                waiting = -1
        if waiting >= 0:
            tiles.add_values(packed, padded_dim, weights, factors, sums + 4 * waiting * padded_dim)
    release_tiles()

    addresses = int64_pointer(scratch + _ADDRESSES)
    for first_row in range(0, num_rows, ROWS):
        count = min(ROWS, num_rows - first_row)
        for i in range(count):
            addresses[i] = _row_address(
                parameters, parameters[call.OUT], call.OUT_STRIDE, call.OUT_HEAD_STRIDE, token, kv_head, first_row + i
            )
        group_sums, divisors = sums + 4 * first_row * padded_dim, scratch + _DIVISORS + 4 * first_row
        tiles.store_rows(group_sums, divisors, scratch + _ADDRESSES, count, parameters[call.HEAD_DIM])
