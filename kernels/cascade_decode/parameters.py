"""How a cascade decode is launched on a GPU, and what it holds meanwhile."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton

from quire.kernels.paged_decode.parameters import DecodeParameters, decode_parameters
from quire.kernels.paged_decode.parameters import pieces_bytes as decode_pieces_bytes
from quire.kernels.paged_prefill.parameters import (
    PrefillParameters,
    num_query_tiles,
    num_shares_of,
    prefill_parameters,
    resident_programs,
)
from quire.kernels.paged_prefill.parameters import pieces_bytes as prefill_pieces_bytes
from quire.kernels.targets import Target


def prefix_parameters(
    dtype: torch.dtype,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    num_seqs: int,
    num_groups: int,
    max_seq_len: int,
    target: Target,
    pages: torch.dtype,
) -> PrefillParameters:
    """Tiles that a group of usual size fills, and shares for as many programs as the device runs at once.

    One group of `num_groups` is taken to be those that share nothing.
    """
    group_size = num_heads // num_kv_heads
    num_rows = triton.cdiv(num_seqs, max(1, num_groups - 1))
    parameters = prefill_parameters(dtype, head_dim, group_size, num_rows, target, pages)
    num_head_sets = num_kv_heads * triton.cdiv(group_size, parameters.heads_per_program)
    num_items = num_query_tiles(parameters, num_seqs, num_groups)
    return replace(parameters, num_shares=num_shares_of(parameters, num_items, num_head_sets, max_seq_len, target))


def rest_parameters(
    dtype: torch.dtype,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    num_seqs: int,
    max_seq_len: int,
    target: Target,
    pages: torch.dtype,
) -> DecodeParameters:
    """Of what each sequence has behind its prefix: as a decode, in shorter tiles on AMD's, which would spill there."""
    heads = (dtype, head_dim, num_heads, num_kv_heads)
    parameters = decode_parameters(*heads, num_seqs, max_seq_len, None, target, pages)
    return replace(parameters, block_n=min(parameters.block_n, 32)) if target.vendor == "hip" else parameters


def pieces_bytes_at_most(
    dtype: torch.dtype,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    num_seqs: int,
    num_groups: int,
    max_seq_len: int,
    target: Target,
    pages: torch.dtype,
) -> int:
    """What attention of one layer holds in pieces at most: of so many decodes in so many groups, and of a prefill."""
    heads = (dtype, head_dim, num_heads, num_kv_heads)
    decode = decode_parameters(*heads, num_seqs, max_seq_len, None, target, pages)
    prefixes, prefills = [0], [0]
    for number in (2, num_groups):
        prefix = prefix_parameters(*heads, num_seqs, number, max_seq_len, target, pages)
        num_head_sets = num_heads // prefix.heads_per_program
        num_items = num_query_tiles(prefix, num_seqs, number)
        prefixes.append(prefill_pieces_bytes(prefix, num_items, num_head_sets, head_dim))
        # A prefill is in pieces only if it has fewer tiles than that.
        num_items = 2 * resident_programs(prefix, target) // num_head_sets
        prefills.append(prefill_pieces_bytes(prefix, num_items, num_head_sets, head_dim))
    return decode_pieces_bytes(decode, num_heads, num_seqs, head_dim) + max(prefixes) + max(prefills)
