"""Paged decode attention on the CPU: pages are read in place, each once for all query heads of its KV head."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from quire.kernels import cpu_attention as call
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
    take,
)
from quire.kernels.cpu_lanes import LANES, padded
from quire.kernels.cpu_workers import Worker, is_recording, new_tensor, scratch

_CHUNK = 128
"""Positions of one softmax, rounded down to whole blocks. The chunks of a sequence are always joined in the order of
their positions, so its result depends neither on the batch nor on the number of threads."""

_UNITS_PER_THREAD = 4  # pieces of work for each thread, to even out lengths and slow cores
_MIN_ELEMENTS = 65536  # elements of keys and values that are worth a second thread: about 15 microseconds

# After the common fields.
(
    NUM_THREADS,
    CHUNK_SIZE,
    CHUNKS_PER_UNIT,
    HEADS_PER_UNIT,  # KV heads
    FIRST_UNITS,  # [S + 1] the first unit of each sequence
    FIRST_PARTIALS,  # [S] the first waiting chunk of each sequence
    FINISHED,  # [S, Hk / HEADS_PER_UNIT] units that are done
    PARTIALS,  # results of chunks that wait for the last unit of their sequence and heads
    SCRATCH,  # of each thread
    SCRATCH_SIZE,
) = range(call.NUM_COMMON, call.NUM_COMMON + 10)


@numba.njit
def _partial_size(num_heads: int, head_dim: int) -> int:
    """float32 in the result of a chunk: sums of values [H, padded D], sums of weights [H], largest scores [H]."""
    size: int = num_heads * (padded(head_dim) + 2)
    return size


@numba.njit
def _chunks(seq_len: int, window: int, chunk_size: int) -> tuple[int, int]:
    """The first chunk that the query sees, and how many."""
    first = max(seq_len - window, 0) // chunk_size
    return first, (seq_len - 1) // chunk_size + 1 - first


def _chunk_size(block_size: int) -> int:
    return max(1, _CHUNK // block_size) * block_size


def _prepare(shared: Any) -> None:
    """Divide the work into units, each a few chunks of one sequence, for all KV heads if there is work enough, or one.

    The heads of a block lie side by side, so it is all of them that make a piece of memory worth beginning to read.
    """
    parameters = int64_pointer(shared)
    num_seqs, num_kv_heads, window = parameters[call.NUM_SEQS], parameters[call.NUM_KV_HEADS], parameters[call.WINDOW]
    num_threads, chunk_size = parameters[NUM_THREADS], parameters[CHUNK_SIZE]
    seq_lens = int32_pointer(parameters[call.SEQ_LENS])
    first_units, first_partials = int64_pointer(parameters[FIRST_UNITS]), int64_pointer(parameters[FIRST_PARTIALS])
    finished = int64_pointer(parameters[FINISHED])
    num_chunks = 0
    for seq in range(num_seqs):
        num_chunks += _chunks(seq_lens[seq], window, chunk_size)[1]
    num_units = num_threads * _UNITS_PER_THREAD if num_threads > 1 else 1
    heads_per_unit = num_kv_heads if num_chunks >= 2 * num_units else 1
    num_groups = num_kv_heads // heads_per_unit
    chunks_per_unit = max(1, num_chunks * num_groups // num_units)
    parameters[CHUNKS_PER_UNIT], parameters[HEADS_PER_UNIT] = chunks_per_unit, heads_per_unit
    parameters[call.THREAD] = 0
    first_units[0] = num_partials = 0
    for seq in range(num_seqs):
        _, num_chunks = _chunks(seq_lens[seq], window, chunk_size)
        first_units[seq + 1] = first_units[seq] + -(-num_chunks // chunks_per_unit) * num_groups
        first_partials[seq] = num_partials
        if num_chunks > chunks_per_unit:
            num_partials += num_chunks * num_groups
        for group in range(num_groups):
            finished[seq * num_groups + group] = 0


@numba.njit
def _block(parameters, cache, table, block):  # type: ignore[no-untyped-def]
    return move(cache, np.int64(table[block]) * parameters[call.BLOCK_STRIDE])


@numba.njit
def _multiply_scales(parameters, scales, block_id, first, last, lines, stride):  # type: ignore[no-untyped-def]
    """lines[head, t] *= the scale of the slot first + t of a block, up to its slot `last`."""
    factors = move(bfloat16_pointer(scales), np.int64(block_id) * parameters[call.SCALES_BLOCK_STRIDE] + first)
    for head in range(parameters[call.GROUP_SIZE]):
        vector.multiply_row(move(lines, head * stride), factors, last - first)


@numba.njit(inline="always")
def _attend_chunk(  # type: ignore[no-untyped-def]
    parameters, keys, values, k_scales, v_scales, table, start, first, last, queries, scores, partial,
    end_block, next_keys, next_table, next_block, next_last_block,
):  # fmt: skip
    """Attention over the positions [first, last) of the chunk at `start`, of a unit that ends before `end_block`.

    While a block of keys is worked on, that of values is on its way into the cache, and meanwhile with this one the
    block of keys that this thread comes to a chunk later: of this unit, or of the next, which has the blocks of
    `next_table` from `next_block` to `next_last_block`. Blocks are too short for the hardware to see a pattern.
    """
    group_size, head_dim = parameters[call.GROUP_SIZE], parameters[call.HEAD_DIM]
    block_size, num_kv_heads = parameters[call.BLOCK_SIZE], parameters[HEADS_PER_UNIT]
    head_stride, scales_stride = parameters[call.HEAD_STRIDE], 2 * parameters[call.SCALES_HEAD_STRIDE]
    padded_dim, stride, num_heads = padded(head_dim), padded(parameters[CHUNK_SIZE]), num_kv_heads * group_size
    first_block, last_block = first // block_size, (last - 1) // block_size
    for block in range(first_block, last_block + 1):
        begin = block * block_size
        low, high = max(first - begin, 0), min(last - begin, block_size)
        block_keys, block_values = _block(parameters, keys, table, block), _block(parameters, values, table, block)
        for head in range(num_kv_heads):
            lines = move(scores, head * group_size * stride + begin - start)
            vector.dot_tokens(
                move(queries, head * group_size * padded_dim), padded_dim, group_size,
                move(block_keys, head * head_stride), head_dim, block_size, low, high,
                lines, stride, move(block_values, head * head_stride),
            )  # fmt: skip
            if k_scales != 0:
                scales = k_scales + head * scales_stride
                _multiply_scales(parameters, scales, table[block], low, high, move(lines, low), stride)

    low, high = (first - start) // LANES * LANES, padded(last - start)
    for i in range(num_heads * padded_dim):
        partial[i] = 0.0
    divisors, largest = move(partial, num_heads * padded_dim), move(partial, num_heads * (padded_dim + 1))
    for head in range(num_heads):
        line = move(scores, head * stride)
        for column in range(low, first - start):
            line[column] = -np.inf
        for column in range(last - start, high):
            line[column] = -np.inf
        largest[head] = vector.row_max(move(line, low), high - low)
        divisors[head] = vector.row_exp2(move(line, low), high - low, largest[head])

    for block in range(first_block, last_block + 1):
        begin = block * block_size
        later = block + parameters[CHUNK_SIZE] // block_size
        if later < end_block:
            ahead = _block(parameters, keys, table, later)
        else:
            ahead = _block(parameters, next_keys, next_table, min(next_block + later - end_block, next_last_block))
        low, high = max(first - begin, 0), min(last - begin, block_size)
        block_values = move(_block(parameters, values, table, block), low * head_dim)
        for head in range(num_kv_heads):
            weights = move(scores, head * group_size * stride + begin - start + low)
            if v_scales != 0:
                scales = v_scales + head * scales_stride
                _multiply_scales(parameters, scales, table[block], low, high, weights, stride)
            vector.add_weighted(
                weights, stride, group_size, move(block_values, head * head_stride), head_dim,
                high - low, move(partial, head * group_size * padded_dim), padded_dim, move(ahead, head * head_stride),
            )  # fmt: skip


@numba.njit
def _join(total, partial, num_heads, head_dim):  # type: ignore[no-untyped-def]
    """Add the result of a later chunk to `total`."""
    padded_dim = padded(head_dim)
    divisors, largest = num_heads * padded_dim, num_heads * (padded_dim + 1)
    for head in range(num_heads):
        old, new = total[largest + head], partial[largest + head]
        joint = old if old > new else new
        old_factor, new_factor = vector.exp2(old - joint), vector.exp2(new - joint)
        total[largest + head] = joint
        total[divisors + head] = total[divisors + head] * old_factor + partial[divisors + head] * new_factor
        for i in range(head * padded_dim, (head + 1) * padded_dim):
            total[i] = total[i] * old_factor + partial[i] * new_factor


@numba.njit(inline="always")
def _blocks(parameters, page, seq, kv_head, part):  # type: ignore[no-untyped-def]
    """Of the `part`-th unit of a sequence from a KV head on: its keys' head, block table, first and last block."""
    block_size, chunk_size = parameters[call.BLOCK_SIZE], parameters[CHUNK_SIZE]
    seq_len = np.int64(int32_pointer(parameters[call.SEQ_LENS])[seq])
    first_chunk, _ = _chunks(seq_len, parameters[call.WINDOW], chunk_size)
    begin = (first_chunk + part * parameters[CHUNKS_PER_UNIT]) * chunk_size
    end = min(begin + parameters[CHUNKS_PER_UNIT] * chunk_size, seq_len)
    begin = max(begin, seq_len - parameters[call.WINDOW])
    keys = move(pointer_to(parameters[call.KEYS], page), kv_head * parameters[call.HEAD_STRIDE])
    table = move(int32_pointer(parameters[call.TABLES]), seq * parameters[call.TABLE_STRIDE])
    return keys, table, begin // block_size, (end - 1) // block_size


@numba.njit(inline="always")
def _attend_unit(  # type: ignore[no-untyped-def]
    parameters, shared, page, seq, kv_head, part, units_per_head, scratch, next_seq, next_kv_head, next_part
):
    """The `part`-th unit of a sequence, from a KV head on. Whoever finishes the last one joins the chunks of all."""
    group_size, head_dim, num_kv_heads = (
        parameters[call.GROUP_SIZE],
        parameters[call.HEAD_DIM],
        parameters[HEADS_PER_UNIT],
    )
    num_heads, padded_dim = num_kv_heads * group_size, padded(head_dim)
    chunk_size, chunks_per_unit = parameters[CHUNK_SIZE], parameters[CHUNKS_PER_UNIT]
    seq_len = np.int64(int32_pointer(parameters[call.SEQ_LENS])[seq])
    first_position = max(seq_len - parameters[call.WINDOW], 0)
    first_chunk, num_chunks = _chunks(seq_len, parameters[call.WINDOW], chunk_size)
    partial_size, divisors = _partial_size(num_heads, head_dim), num_heads * padded_dim
    queries = float32_pointer(scratch)
    scores = move(queries, num_heads * padded_dim)
    total = move(scores, num_heads * padded(chunk_size))
    if units_per_head > 1:
        first_partial = int64_pointer(parameters[FIRST_PARTIALS])[seq] + kv_head // num_kv_heads * num_chunks
        total = move(float32_pointer(parameters[PARTIALS]), first_partial * partial_size)

    keys, table, _, last_block = _blocks(parameters, page, seq, kv_head, part)
    next_keys, next_table, next_block, next_last_block = _blocks(parameters, page, next_seq, next_kv_head, next_part)
    values = move(pointer_to(parameters[call.VALUES], page), kv_head * parameters[call.HEAD_STRIDE])
    k_scales = parameters[call.K_SCALES] + 2 * kv_head * parameters[call.SCALES_HEAD_STRIDE]
    v_scales = parameters[call.V_SCALES] + 2 * kv_head * parameters[call.SCALES_HEAD_STRIDE]
    for head in range(num_kv_heads):
        call.load_queries(parameters, shared, seq, 1, kv_head + head, move(queries, head * group_size * padded_dim))
    for chunk in range(part * chunks_per_unit, min((part + 1) * chunks_per_unit, num_chunks)):
        start = (first_chunk + chunk) * chunk_size
        first, last = max(first_position, start), min(seq_len, start + chunk_size)
        # Alone with its sequence and head, a unit joins as it goes and needs room for two results.
        partial = move(total, (chunk if units_per_head > 1 else min(chunk, 1)) * partial_size)
        _attend_chunk(
            parameters,
            keys,
            values,
            k_scales,
            v_scales,
            table,
            start,
            first,
            last,
            queries,
            scores,
            partial,
            last_block + 1,
            next_keys,
            next_table,
            next_block,
            next_last_block,
        )
        if units_per_head == 1 and chunk > 0:
            _join(total, partial, num_heads, head_dim)
    if units_per_head > 1:
        group = (seq * parameters[call.NUM_KV_HEADS] + kv_head) // num_kv_heads
        finished = move(int64_pointer(parameters[FINISHED]), group)
        if take(finished) < units_per_head - 1:
            return
        for chunk in range(1, num_chunks):
            _join(total, move(total, chunk * partial_size), num_heads, head_dim)
    for head in range(num_kv_heads):
        row = head * group_size
        sums = move(total, row * padded_dim)
        call.store_results(parameters, shared, seq, 1, kv_head + head, sums, move(total, divisors + row))


@numba.njit
def _locate(first_units, num_kv_heads, heads_per_unit, seq, unit):  # type: ignore[no-untyped-def]
    """Sequence (`seq` or a later one), first KV head and part of a unit, and how many units such heads have."""
    while unit >= first_units[seq + 1]:
        seq += 1
    units_per_head = (first_units[seq + 1] - first_units[seq]) * heads_per_unit // num_kv_heads
    group, part = divmod(unit - first_units[seq], units_per_head)
    return seq, group * heads_per_unit, part, units_per_head


@numba.njit(inline="always")
def _share_out(shared, page):  # type: ignore[no-untyped-def]
    """`shared` points to elements of the query's dtype, `page` to such as the cache holds."""
    parameters = int64_pointer(shared)
    thread = take(move(parameters, call.THREAD))
    scratch = int64_pointer(parameters[SCRATCH] + 8 * thread * parameters[SCRATCH_SIZE])
    first_units, num_kv_heads = int64_pointer(parameters[FIRST_UNITS]), parameters[call.NUM_KV_HEADS]
    heads_per_unit, num_seqs = parameters[HEADS_PER_UNIT], parameters[call.NUM_SEQS]
    seq, unit = 0, take(parameters)
    while unit < first_units[num_seqs]:
        seq, kv_head, part, units_per_head = _locate(first_units, num_kv_heads, heads_per_unit, seq, unit)
        following = take(parameters)
        # The last one has none to follow: then it is itself that is looked for, in the cache already.
        later = following if following < first_units[num_seqs] else unit
        after = _locate(first_units, num_kv_heads, heads_per_unit, seq, later)
        _attend_unit(
            parameters, shared, page, seq, kv_head, part, units_per_head, scratch, after[0], after[1], after[2]
        )
        unit = following


def _attend(shared: Any) -> None:
    _share_out(shared, shared)


def _attend_codes(shared: Any) -> None:
    _share_out(shared, int8_pointer(shared))


def _attend_bfloat16(shared: Any) -> None:
    _share_out(shared, bfloat16_pointer(shared))


def _attend_float16(shared: Any) -> None:
    _share_out(shared, float16_pointer(shared))


WORKER = Worker(_attend, _prepare)
PAGE_WORKERS = {
    torch.int8: Worker(_attend_codes, _prepare),
    torch.bfloat16: Worker(_attend_bfloat16, _prepare),
    torch.float16: Worker(_attend_float16, _prepare),
}
"""For pages of another dtype than the query's."""


def paged_decode(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None = None,
    out: torch.Tensor | None = None,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    num_seqs, num_heads, head_dim = query.shape
    out = new_tensor(tuple(query.shape), query.dtype) if out is None else out
    if num_seqs == 0:
        return out
    _, num_kv_heads, block_size, _ = k_cache.shape
    max_num_positions = block_tables.shape[1] * block_size
    is_small = 2 * num_seqs * max_num_positions * num_kv_heads * head_dim <= _MIN_ELEMENTS
    num_threads = 1 if is_small and not is_recording() else torch.get_num_threads()
    chunk_size = _chunk_size(block_size)
    group_size = num_heads // num_kv_heads
    partial_size = _partial_size.py_func(group_size, head_dim)  # for each KV head
    scratch_size = num_heads * (padded.py_func(head_dim) + padded.py_func(chunk_size)) + 2 * num_kv_heads * partial_size
    scratch_size = -(-scratch_size // 16) * 8
    num_planned = 2 * num_seqs + 1 + num_seqs * num_kv_heads
    max_num_partials = num_seqs * num_kv_heads * -(-max_num_positions // chunk_size)
    memory = scratch(8 * (num_threads * scratch_size + num_planned) + 4 * max_num_partials * partial_size)
    first_units = memory + 8 * num_threads * scratch_size
    first_partials = first_units + 8 * (num_seqs + 1)
    finished = first_partials + 8 * num_seqs
    partials = finished + 8 * num_seqs * num_kv_heads
    common = call.describe(
        query, k_cache, v_cache, block_tables, seq_lens, scale, sliding_window, out, k_scales, v_scales
    )
    own = (num_threads, chunk_size, 0, 0, first_units, first_partials, finished, partials, memory, scratch_size)
    worker = WORKER if k_cache.dtype == query.dtype else PAGE_WORKERS[k_cache.dtype]
    worker.run(query.dtype, np.array([*common, *own], np.int64), num_threads)
    return out
