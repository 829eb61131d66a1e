"""Cascade decode as three Triton kernels: prefixes for all rows of a group at once, what is behind them, and the merge.

The prefix's kernel is that of a prefill in pieces, whose queries are the rows of the groups: the tiles of all groups
are cut into equal shares. What is behind the prefixes is shared out as in a decode that begins there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from quire.kernels.cascade_decode.parameters import prefix_parameters, rest_parameters
from quire.kernels.paged_decode.parameters import DecodeParameters
from quire.kernels.paged_decode.triton import add_pieces_of_sequence, launch_split
from quire.kernels.paged_prefill.parameters import PrefillParameters, bits_of
from quire.kernels.paged_prefill.triton_pieces import add_pieces_of_item, launch_partial
from quire.kernels.paged_prefill.triton_tiles import locate
from quire.kernels.targets import current_target

if TYPE_CHECKING:
    from quire.kernels.cascade_decode import PrefixGroups


# Numbers that change from step to step must not ask for another compilation.
@triton.jit(
    do_not_specialize=["num_groups", "num_items", "num_prefix_shares", "num_seqs", "num_shares"],
    do_not_specialize_on_alignment=["rows", "group_start", "prefix_lens", "seq_lens"],
)
def merge_prefix_kernel(
    prefix_out: tl.tensor,
    prefix_lse: tl.tensor,
    prefix_shares: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    shares: tl.tensor,
    rows: tl.tensor,
    group_start: tl.tensor,
    prefix_lens: tl.tensor,
    seq_lens: tl.tensor,
    out: tl.tensor,
    num_groups: tl.tensor,
    num_items: tl.tensor,
    num_prefix_shares: tl.tensor,
    num_seqs: tl.tensor,
    num_shares: tl.tensor,
    OUT_STRIDE_SEQ: tl.constexpr,
    OUT_STRIDE_HEAD: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEADS_PER_PROGRAM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Merge the pieces of one head of one member of a group. A padding row becomes zeros."""
    rows_per_tile: tl.constexpr = BLOCK_M // HEADS_PER_PROGRAM
    item, row_in_tile = tl.program_id(0) // rows_per_tile, tl.program_id(0) % rows_per_tile
    head = tl.program_id(1).to(tl.int64)
    _, start, num_members, prefix_len, first_member = locate(
        item, group_start, prefix_lens, num_groups, rows_per_tile, BITS
    )
    if first_member + row_in_tile >= num_members:
        return
    sequence = tl.load(rows + start + first_member + row_in_tile).to(tl.int64)
    seq_len = tl.load(seq_lens + sequence)
    dim = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    out_at = out + sequence * OUT_STRIDE_SEQ + head * OUT_STRIDE_HEAD + dim
    if seq_len == 0:  # nobody noted anything for it
        tl.store(out_at, tl.zeros([BLOCK_D], out.dtype.element_ty), mask=dim < HEAD_DIM)
        return
    first_share, num_pieces = 0, 0
    if prefix_len < seq_len:
        first_share = tl.load(shares + sequence * 2)
        num_pieces = tl.load(shares + sequence * 2 + 1)
    if (prefix_len == 0) & (num_pieces == 1):
        return

    highest = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    if prefix_len > 0:
        highest, total, acc = add_pieces_of_item(
            *(highest, total, acc, prefix_out, prefix_lse, prefix_shares, num_prefix_shares, item, num_items),
            *(row_in_tile, head, GROUP_SIZE, HEADS_PER_PROGRAM, HEAD_DIM, BLOCK_M, BLOCK_P, BLOCK_D),
        )
    highest, total, acc = add_pieces_of_sequence(
        *(highest, total, acc, partial_out, partial_lse, first_share, num_pieces, num_shares),
        *(sequence, num_seqs, head, HEAD_DIM, BLOCK_P, BLOCK_D),
    )
    tl.store(out_at, (acc / total).to(out.dtype.element_ty), mask=dim < HEAD_DIM)


def cascade_decode(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    groups: PrefixGroups,
    scale: float,
    out: torch.Tensor | None = None,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    num_seqs, num_heads, head_dim = query.shape
    if num_seqs == 0:
        return out
    num_kv_heads, block_size = k_cache.shape[1:3]
    target, max_seq_len = current_target(query.device), block_tables.shape[1] * block_size
    heads = (query.dtype, head_dim, num_heads, num_kv_heads, num_seqs)
    launch(
        *(query, k_cache, v_cache, block_tables, seq_lens, groups, scale, out, k_scales, v_scales),
        prefix_parameters(*heads, len(groups.prefix_lens), max_seq_len, target, k_cache.dtype),
        rest_parameters(*heads, max_seq_len, target, k_cache.dtype),
    )
    return out


def launch(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    groups: PrefixGroups,
    scale: float,
    out: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
    prefix: PrefillParameters,
    decode: DecodeParameters,
) -> None:
    """Fill `out` as cascade_decode does, with chosen parameters for prefixes and for what is behind them."""
    num_seqs, num_heads, head_dim = query.shape
    shared = launch_partial(
        *(query, k_cache, v_cache, block_tables, groups.prefix_lens, groups.group_start, groups.rows, scale, None),
        *(out, k_scales, v_scales, prefix),
    )
    own = launch_split(
        *(query, k_cache, v_cache, block_tables, seq_lens, scale, None, out, k_scales, v_scales),
        *(groups.row_prefix_lens, decode),
    )
    merge_prefix_kernel[shared.num_items * prefix.tokens_per_tile, num_heads](
        *(shared.out, shared.lse, shared.shares, own.out, own.lse, own.shares),
        *(groups.rows, groups.group_start, groups.prefix_lens, seq_lens, out, groups.prefix_lens.shape[0]),
        *(shared.num_items, prefix.num_shares, num_seqs, decode.num_shares, *out.stride()[:2]),
        GROUP_SIZE=num_heads // k_cache.shape[1],
        HEADS_PER_PROGRAM=prefix.heads_per_program,
        HEAD_DIM=head_dim,
        BITS=bits_of(groups.prefix_lens.shape[0]),
        BLOCK_M=prefix.block_m,
        BLOCK_P=16,
        BLOCK_D=prefix.block_d,
        num_warps=4,
    )
