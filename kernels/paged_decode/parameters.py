"""How a paged decode is launched on a GPU: tiles that fit it, and programs that are all there at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton

from quire.kernels import launch_tables
from quire.kernels.targets import Target

MAX_HEADS_PER_PROGRAM = 32
MIN_TILES = 4
"""A program takes at least so many tiles, if there are any more: pieces must be merged, which costs something too."""
RESIDENT_PROGRAMS = 2
"""Programs that a multiprocessor is sure to run at once: an equal share is of no use to one that must wait."""
NUM_WARPS = 4


@dataclass(frozen=True, slots=True)
class DecodeParameters:
    """`block_m` rows hold `heads_per_program` heads; `block_n` positions are one tile; `num_shares` programs work for
    the same heads, on equal shares of the tiles of all sequences."""

    heads_per_program: int
    block_m: int
    block_n: int
    block_d: int
    num_shares: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread, on NVIDIA's; unbounded, the compiler would rather spill some


def pieces_bytes(parameters: DecodeParameters, num_heads: int, num_seqs: int, head_dim: int) -> int:
    """What the pieces take until they are merged: float32 results, and a logarithm for each."""
    return 4 * num_heads * (num_seqs + parameters.num_shares) * (head_dim + 1)


def decode_parameters(
    dtype: torch.dtype,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    num_seqs: int,
    max_seq_len: int,
    window: int | None,
    target: Target,
    pages: torch.dtype | None = None,
) -> DecodeParameters:
    """Tiles that fit the target's shared memory, and as many shares as its multiprocessors run programs at once.

    Only small batches of short sequences get fewer. All of it follows from shapes, which a captured graph keeps. What
    was measured on the target for these `pages` (by default of `dtype`) goes before what is reasoned here.
    """
    measured = launch_tables.measured("paged_decode", launch_tables.case(dtype, head_dim, pages or dtype), target)
    return plan(dtype, head_dim, num_heads, num_kv_heads, num_seqs, max_seq_len, window, target, measured)


def plan(
    dtype: torch.dtype,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    num_seqs: int,
    max_seq_len: int,
    window: int | None,
    target: Target,
    measured: Mapping[str, int],
) -> DecodeParameters:
    """As decode_parameters, with those of `launch_tables.FIELDS` that are given in `measured`."""
    group_size = num_heads // num_kv_heads
    programs_per_group = triton.cdiv(group_size, MAX_HEADS_PER_PROGRAM)
    heads_per_program = triton.cdiv(group_size, programs_per_group)
    block_d = max(16, triton.next_power_of_2(head_dim))
    is_nvidia = target.vendor == "cuda"
    tile_bytes = 16_384 if is_nvidia and dtype != torch.float32 else 8_192
    block_n = measured.get("block_n", max(16, min(64, tile_bytes // (block_d * dtype.itemsize))))
    num_warps = measured.get("num_warps", NUM_WARPS)
    resident_programs = measured.get("resident_programs", RESIDENT_PROGRAMS)
    visible = max_seq_len if window is None else min(window + block_n - 1, max_seq_len)
    useful = triton.cdiv(num_seqs * triton.cdiv(visible, block_n), MIN_TILES)
    resident = resident_programs * target.num_multiprocessors // (num_kv_heads * programs_per_group)
    return DecodeParameters(
        heads_per_program=heads_per_program,
        block_m=max(16, triton.next_power_of_2(heads_per_program)),
        block_n=block_n,
        block_d=block_d,
        num_shares=max(1, min(resident, useful)),
        num_warps=num_warps,
        num_stages=measured.get("num_stages", 3 if is_nvidia else 2),
        max_registers=min(255, 65_536 // (resident_programs * num_warps * target.warp_size)) if is_nvidia else None,
    )
