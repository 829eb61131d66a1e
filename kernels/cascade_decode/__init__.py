"""Decode attention of groups of sequences that begin with the same blocks: what they share is read once for all."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quire.kernels.backend import Backend, choose_body
from quire.kernels.checks import check_attention, require


@dataclass(frozen=True, slots=True)
class PrefixGroups:
    """Which sequences of a decode begin alike, G groups of S sequences; all int32, on one device.

    Every sequence is in one group. Members of a group have the same block ids where its prefix lies. A prefix may be
    empty: those that share nothing are such a group. A group without members only pads. A captured graph may be
    replayed with any values.
    """

    rows: torch.Tensor  # [S] the sequences' rows in a batch, group after group
    group_start: torch.Tensor  # [G + 1] members of group g are rows[group_start[g] : group_start[g + 1]]
    prefix_lens: torch.Tensor  # [G] tokens of the prefix, at most the length of the shortest member
    row_prefix_lens: torch.Tensor  # [S] by row of the batch: the prefix of its group


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
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """What `paged_decode` computes without a window, with the keys and values of each group's prefix read once.

    All query heads of a group's rows that share a KV head fill the rows of matrix products over the prefix; what lies
    behind it each sequence sees for itself; both are merged by the logarithms of their sums of weights. That is exact
    but for rounding: the order of sums differs from `paged_decode`, nothing else.

    Args:
        query: [S, Hq, D], see `paged_decode`; so are the others. There is no sliding window: what a prefix's members
            see of it would differ.
        groups: of the rows of `query`. Its values are the caller's duty.
        backend: "auto" goes by query's device; there is no body for CPUs, which keep what rows share in their caches.

    Returns:
        [S, Hq, D] in query's dtype: `out` if it was given. A row with seq_len 0 becomes zeros on a GPU.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above, or the backend is "cpu".

    Source: Juravsky et al., Hydragen, 2024 (arXiv 2402.05099); Ye et al., "Cascade Inference", FlashInfer, 2024.
    Several groups in one launch, cut into equal shares, are our own.
    """
    body = choose_body(backend, query.device)
    require(body != "cpu", "cascade_decode has no body for CPUs; use paged_decode, or backend='reference'")
    check_attention(query, k_cache, v_cache, k_scales, v_scales, block_tables, seq_lens, scale, None, out, body)
    require(query.shape[0] == block_tables.shape[0], "query must have one row per sequence", query, block_tables)
    _check_groups(groups, query)
    if body == "triton":
        from quire.kernels.cascade_decode.triton import cascade_decode as run
    else:
        from quire.kernels.cascade_decode.reference import cascade_decode as run
    return run(query, k_cache, v_cache, block_tables, seq_lens, groups, scale, out, k_scales, v_scales)


def _check_groups(groups: PrefixGroups, query: torch.Tensor) -> None:
    num_seqs, num_groups = query.shape[0], groups.prefix_lens.shape[0]
    for name, size in (
        ("rows", num_seqs),
        ("row_prefix_lens", num_seqs),
        ("prefix_lens", num_groups),
        ("group_start", num_groups + 1),
    ):
        tensor = getattr(groups, name)
        require(
            tensor.shape == (size,)
            and tensor.dtype == torch.int32
            and tensor.is_contiguous()
            and tensor.device == query.device,
            f"groups.{name} must be contiguous int32 [{size}] on query's device",
            tensor,
            query,
        )
    require(num_groups > 0 or num_seqs == 0, "every sequence must be in a group", groups.rows)
