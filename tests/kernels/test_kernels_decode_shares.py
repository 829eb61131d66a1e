"""Who attends to what in a decode: every tile once, equal shares whatever the lengths, and nothing outside a window."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
import triton_interpreter

MIN_TILES = 4
BLOCK_N = 16

Piece = tuple[int, int, int]  # sequence, first tile, end tile


def list_kernel(
    seq_lens: tl.tensor,
    prefix_lens: tl.tensor,
    pieces: tl.tensor,
    owners: tl.tensor,
    num_seqs: tl.tensor,
    SHARE_OF: tl.constexpr,
    TILES_OF: tl.constexpr,
    SEEN_TILES: tl.constexpr,
    OWNER_OF: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """What each program would attend to, row after row, and whom it takes for the owner of its first and last tile."""
    program = tl.program_id(0)
    first, end, sequence, end_sequence, start, num_tiles, num_used = SHARE_OF(
        program, tl.num_programs(0), TILES_OF(seq_lens, prefix_lens, num_seqs, WINDOW, BLOCK_N, BLOCK_S), MIN_TILES
    )
    if first < end:
        tl.store(owners + program * 2, OWNER_OF(first, num_tiles, num_used))
        tl.store(owners + program * 2 + 1, OWNER_OF(end - 1, num_tiles, num_used))
    at = pieces + program * BLOCK_S * 3
    for _ in range(sequence, end_sequence):
        prefix_len = tl.load(prefix_lens + sequence)
        first_tile, num_seen = SEEN_TILES(tl.load(seq_lens + sequence), prefix_len, WINDOW, BLOCK_N)
        tl.store(at, sequence)
        tl.store(at + 1, first_tile + tl.maximum(first - start, 0))
        tl.store(at + 2, first_tile + tl.minimum(end - start, num_seen))
        at += 3
        start += num_seen
        sequence += 1


def shares(
    seq_lens: list[int], num_programs: int, window: int | None, module: Any, prefix_lens: list[int] | None = None
) -> list[list[Piece]]:
    """The pieces of each program, empty ones left out, as the functions of `module` say."""
    num_seqs = len(seq_lens)
    block_s = max(16, 1 << (num_seqs - 1).bit_length())
    pieces = torch.full((num_programs, block_s, 3), -1, dtype=torch.int32)
    owners = torch.full((num_programs, 2), -1, dtype=torch.int32)
    functions = (module.share_of, module.tiles_of_sequences, module.seen_tiles, module.owner_of)
    lens = torch.tensor(seq_lens + [7] * (block_s - num_seqs), dtype=torch.int32)
    prefixes = torch.tensor((prefix_lens or [0] * num_seqs) + [0] * (block_s - num_seqs), dtype=torch.int32)
    launch = triton_interpreter.jit(list_kernel)[(num_programs,)]
    launch(lens, prefixes, pieces, owners, num_seqs, *functions, window, MIN_TILES, BLOCK_N, block_s)
    listed = [[(s, b, e) for s, b, e in rows if s >= 0 and b < e] for rows in pieces.tolist()]
    assert owners.tolist() == [[program] * 2 if rows else [-1] * 2 for program, rows in enumerate(listed)]
    return listed


def expected_shares(
    seq_lens: list[int], num_programs: int, window: int | None, prefix_lens: list[int] | None
) -> list[list[tuple[int, int]]]:
    """The tiles (sequence, tile) of each program: all that hold a visible position, cut as evenly as integers allow."""
    tiles = []
    for sequence, seq_len in enumerate(seq_lens):
        first = 0 if window is None else max(seq_len - window, 0)
        first = max(first, prefix_lens[sequence] if prefix_lens else 0)
        seen = range(first, seq_len)
        tiles += [(sequence, tile) for tile in sorted({position // BLOCK_N for position in seen})]
    used = max(1, min(num_programs, -(-len(tiles) // MIN_TILES)))
    cuts = [program * len(tiles) // used for program in range(used + 1)] + [len(tiles)] * (num_programs - used)
    return [tiles[cuts[program] : cuts[program + 1]] for program in range(num_programs)]


def check_shares(
    seq_lens: list[int], num_programs: int, window: int | None, module: Any, prefix_lens: list[int] | None = None
) -> None:
    found = [
        [(sequence, tile) for sequence, begin, end in pieces for tile in range(begin, end)]
        for pieces in shares(seq_lens, num_programs, window, module, prefix_lens)
    ]
    assert found == expected_shares(seq_lens, num_programs, window, prefix_lens)
    covered = [tile for tiles in found for tile in tiles]
    assert len(covered) == len(set(covered))
    loads = [len(tiles) for tiles in found if tiles]
    assert not loads or max(loads) - min(loads) <= 1


@pytest.fixture
def module(triton_device: torch.device) -> Any:
    if triton_device.type != "cpu":
        pytest.skip("lists what interpreted functions say")
    return importlib.import_module("quire.kernels.paged_decode.triton")


@pytest.mark.parametrize("seed", range(40))
def test_every_tile_once_and_equal_shares(seed: int, module: Any) -> None:
    """Lengths of all kinds: skewed, padded with rows of length 0 anywhere, and nothing at all."""
    rng = random.Random(seed)
    longest = rng.choice([1, 40, 3000])
    seq_lens = [int(longest / rng.randint(1, 60)) if rng.random() < 0.8 else 0 for _ in range(rng.randint(1, 40))]
    seq_lens[rng.randrange(len(seq_lens))] = longest * rng.randint(0, 2)
    check_shares(seq_lens, rng.choice([1, 2, 7, 33]), rng.choice([None, 1, 16, 100, 1000]), module)


@pytest.mark.parametrize("seed", range(10))
def test_what_lies_behind_prefixes(seed: int, module: Any) -> None:
    """Prefixes that end inside tiles, that are all of a sequence, and none."""
    rng = random.Random(seed)
    seq_lens = [rng.randint(0, 300) for _ in range(rng.randint(1, 40))]
    prefix_lens = [rng.choice([0, length, rng.randint(0, length)]) for length in seq_lens]
    check_shares(seq_lens, rng.choice([1, 7, 33]), rng.choice([None, 100]), module, prefix_lens)


def test_no_tiles_at_all(module: Any) -> None:
    check_shares([0, 0, 0], 5, None, module)


def test_a_window_bounds_the_work(module: Any) -> None:
    """However long the sequences, 64 positions lie in 5 tiles of 16 at most."""
    found = shares([100_000 + 7 * i for i in range(10)], 8, 64, module)
    assert sum(end - begin for pieces in found for _, begin, end in pieces) <= 50


FAULTS_IN_SHARES = [
    ("is_before = ends <= first", "is_before = ends - tiles <= first"),
    ("(ends - tiles < end)", "(ends < end)"),
    ("tl.minimum(program + 1, num_used)", "tl.minimum(program, num_used)"),
    ("tl.minimum(num_programs, tl.cdiv(num_tiles, MIN_TILES))", "num_programs"),
    ("* num_used - 1)", "* num_used)"),
]
FAULTS_IN_TILES = [
    ("tl.maximum(seq_len - WINDOW, 0)", "tl.cdiv(tl.maximum(seq_len - WINDOW, 0), BLOCK_N) * BLOCK_N"),
    ("mask=sequence < num_seqs, other=0)\n    prefix", "mask=sequence < num_seqs, other=1)\n    prefix"),
    ("tl.maximum(first_position, prefix_len)", "first_position + prefix_len"),
    ("tl.where(first_position < seq_len, tl.cdiv(seq_len, BLOCK_N) - first, 0)", "tl.cdiv(seq_len, BLOCK_N) - first"),
]


@pytest.mark.parametrize(("old", "new"), FAULTS_IN_SHARES + FAULTS_IN_TILES)
def test_faults_are_caught(old: str, new: str, module: Any, tmp_path: Path) -> None:
    def check_all(module: Any) -> None:
        check_shares([90, 0, 33, 16, 700, 0], 7, None, module)
        check_shares([20, 100, 64], 33, 70, module)
        check_shares([20, 100, 77, 64], 7, 70, module, [20, 20, 77, 5])

    check_all(module)
    parts = (FAULTS_IN_SHARES, FAULTS_IN_TILES)
    in_shares, in_tiles = ([(old, new)] if (old, new) in part else [] for part in parts)
    shares_variant = triton_interpreter.load_variant_of("quire.kernels.triton_shares", tmp_path, in_shares)
    variant = triton_interpreter.load_variant_of(
        "quire.kernels.paged_decode.triton", tmp_path, in_tiles, [shares_variant]
    )
    with pytest.raises(AssertionError):
        check_all(variant)
