"""The parameters of a call of prefill attention on the CPU, after the common ones: their places in the int64 array."""

from __future__ import annotations

from quire.kernels.cpu_attention import NUM_COMMON

QUERY_START, TOKENS_PER_TILE, MAX_TOKENS_PER_TILE, NUM_THREADS, SCRATCH, SCRATCH_SIZE = range(
    NUM_COMMON, NUM_COMMON + 6
)

MAX_ROWS = 128
"""Rows of a tile of queries; a row is one token and one query head."""
POSITIONS = 64
"""Of a tile of keys and values. Tiles begin at multiples of it wherever a chunk of a prompt begins, so a token's result
depends neither on the chunks nor on the batch."""
