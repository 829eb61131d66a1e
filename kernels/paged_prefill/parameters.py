"""How a paged prefill is launched on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from quire.kernels import launch_tables
from quire.kernels.quantization import LARGEST_CODE
from quire.kernels.targets import Target

MAX_HEADS_PER_PROGRAM = 16
CODE_UNITS = 64
"""Weights times scales of int8 values are multiplied by this and results divided: about half the largest value of a
token, they neither overflow float16 nor vanish in it. A power of two, so it costs no bit."""
MIN_TILES = 8
"""A program takes at least so many tiles of keys if queries are computed in pieces and there are any more: a piece is
written and read in float32, which takes about as long as eight tiles."""
SHARES_PER_PROGRAM = 2
"""Shares for each program that the device runs at once: items cut them, so that pieces differ in length, and the last
ones should be short."""

GLUON_LAUNCH = {64: (128, 8), 128: (128, 5), 256: (64, 4)}
"""By head dim, positions of a tile and slots of the ring of the kernel in Gluon: reasoned; they fit, nothing spills."""


@dataclass(frozen=True, slots=True)
class PrefillParameters:
    """How a prefill is launched. `block_m` rows are tokens times heads; `block_n` positions are one tile.

    With `num_shares`, the keys of all query tiles are cut into so many equal shares; without, a program takes a query
    tile.
    """

    heads_per_program: int
    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    num_shares: int | None = None
    max_registers: int | None = None  # of a thread, on NVIDIA's; unbounded, the compiler would rather spill some
    num_slots: int | None = None  # of the ring of tiles: with them, the kernel is the one in Gluon

    @property
    def tokens_per_tile(self) -> int:
        return self.block_m // self.heads_per_program


def prefill_parameters(
    dtype: torch.dtype,
    head_dim: int,
    group_size: int,
    max_query_len: int,
    target: Target,
    pages: torch.dtype | None = None,
) -> PrefillParameters:
    """The largest tiles that spill no register on the targets that the tests compile for.

    For all but a few rows, what was measured on the target for these `pages` (by default of `dtype`) goes before them.

    Rows of 64 and more let Hopper use its wgmma; GPUs without such instructions hold the tiles in registers. float32
    multiplies without tensor cores, so its tiles are small: it is there to compare with, not to be fast.
    """
    programs_per_group = triton.cdiv(group_size, MAX_HEADS_PER_PROGRAM)
    heads_per_program = triton.cdiv(group_size, programs_per_group)
    block_d = max(16, triton.next_power_of_2(head_dim))
    is_short = max_query_len * heads_per_program <= 64
    has_large_mma = target.vendor == "hip" or target.arch in (90, 100, 103)
    num_stages = 2 if target.vendor == "cuda" else 1
    if dtype == torch.float32:
        block_m, block_n, num_warps, num_stages = (32 if block_d <= 64 else 16), 16, 4, 1
    elif block_d > 128:
        block_m, block_n, num_warps = 64, (64 if target.shared_memory >= 166_000 else 32), 8
    elif is_short or (not has_large_mma and block_d > 64):
        block_m, block_n, num_warps = 64, 64, 4
    else:
        is_wide = target.vendor == "cuda" and has_large_mma and block_d <= 64
        block_m, block_n, num_warps = 128, (128 if is_wide else 64), 8
    if pages in LARGEST_CODE and block_n > 16 and not (target.arch == 90 and block_d <= 128):
        # Codes on their way to query's dtype take registers.
        block_n //= 4 if target.vendor == "hip" and block_d == 128 else 2
    reasoned = PrefillParameters(
        heads_per_program=heads_per_program,
        block_m=block_m,
        block_n=block_n,
        block_d=block_d,
        num_warps=num_warps,
        num_stages=num_stages,
        max_registers=255 if target.vendor == "cuda" else None,
    )
    if is_short:
        return reasoned
    case = launch_tables.case(dtype, head_dim, pages or dtype)
    return replace(reasoned, **launch_tables.measured("paged_prefill", case, target))


def warp_specialized(
    parameters: PrefillParameters,
    query: torch.Tensor,
    k_cache: torch.Tensor,
    max_query_len: int,
    sliding_window: int | None,
    target: Target,
) -> PrefillParameters | None:
    """Parameters for the kernel in Gluon; None where it cannot compute this, or was not measured to be faster.

    It was never run on a GPU before benchmarks/gpu_tune.py runs it, so it is chosen where a launch table has it only.
    """
    launch = launch_tables.measured(
        "gluon_prefill", launch_tables.case(query.dtype, query.shape[2], k_cache.dtype), target
    )
    if not launch or not fits_gluon(parameters, query, k_cache, max_query_len, sliding_window, target):
        return None
    return gluon_parameters(parameters, **launch)


def fits_gluon(
    parameters: PrefillParameters,
    query: torch.Tensor,
    k_cache: torch.Tensor,
    max_query_len: int,
    sliding_window: int | None,
    target: Target,
) -> bool:
    """Whether the kernel in Gluon computes this: Hopper, whole panels of 16-bit dimensions, pages of 16 tokens or more
    (the warps that load have no registers for more pages of a tile), no window, and rows enough for its tiles."""
    block_size = k_cache.shape[2]
    return (
        target.arch == 90
        and query.dtype in (torch.bfloat16, torch.float16)
        and k_cache.dtype == query.dtype
        and query.shape[2] in GLUON_LAUNCH
        and block_size >= 16
        and block_size & (block_size - 1) == 0
        and all(stride % 8 == 0 for stride in k_cache.stride()[:2])
        and sliding_window is None
        and max_query_len * parameters.heads_per_program > 64
    )


def gluon_parameters(parameters: PrefillParameters, block_n: int, num_slots: int) -> PrefillParameters:
    """`parameters` for the kernel in Gluon: its tiles have 128 rows, and three groups of warps share all registers."""
    return replace(
        parameters, block_m=128, block_n=block_n, num_warps=4, num_stages=1, max_registers=168, num_slots=num_slots
    )


def num_piece_shares(
    parameters: PrefillParameters,
    num_tokens: int,
    num_seqs: int,
    num_head_sets: int,
    max_seq_len: int,
    target: Target,
) -> int | None:
    """Into how many shares the keys of all query tiles should be cut, for each of the sets of heads that one computes.

    None if a program for each query tile keeps all multiprocessors busy, or if sequences are too short to be cut. It
    follows from shapes; the sequences themselves may be shorter.
    """
    num_items = num_query_tiles(parameters, num_tokens, num_seqs)
    is_busy = num_items * num_head_sets >= 2 * resident_programs(parameters, target)
    if is_busy or triton.cdiv(max_seq_len, parameters.block_n) < 2 * MIN_TILES:
        return None
    return num_shares_of(parameters, num_items, num_head_sets, max_seq_len, target)


def num_shares_of(
    parameters: PrefillParameters, num_items: int, num_head_sets: int, max_seq_len: int, target: Target
) -> int:
    """As many as fill the device, but no more than there is work for."""
    useful = triton.cdiv(num_items * triton.cdiv(max_seq_len, parameters.block_n), MIN_TILES)
    wanted = SHARES_PER_PROGRAM * resident_programs(parameters, target) // num_head_sets
    return max(1, min(wanted, int(useful)))


def num_query_tiles(parameters: PrefillParameters, num_tokens: int, num_seqs: int) -> int:
    """As many as there are at most, however the tokens are divided among sequences."""
    return num_tokens // parameters.tokens_per_tile + num_seqs


def resident_programs(parameters: PrefillParameters, target: Target) -> int:
    """How many the device runs at once: one of eight warps takes most registers of a multiprocessor, of four half."""
    return target.num_multiprocessors * (1 if parameters.num_warps > 4 else 2)


def pieces_bytes(parameters: PrefillParameters, num_items: int, num_head_sets: int, head_dim: int) -> int:
    """What the pieces take until they are merged: float32 results, and a logarithm for each row."""
    num_slots = num_head_sets * (num_items + (parameters.num_shares or 0))
    return 4 * num_slots * parameters.block_m * (head_dim + 1)


def bits_of(num_seqs: int) -> int:
    """Steps in which a program finds its sequence among so many; few values, since each is another compilation."""
    return next(bits for bits in (4, 9, 16, 31) if num_seqs <= 2**bits)
