"""Attention of one new token per sequence over its pages."""

from __future__ import annotations

import torch

from quire.kernels.backend import Backend, choose_body
from quire.kernels.checks import check_attention, require


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
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Each sequence's newest token attends to the sequence's pages, itself included.

    Query head h reads KV head h // (Hq // Hk). The query of sequence s sits at position seq_lens[s] - 1; its own key
    and value are already in the cache. Softmax and sums are in float32, the result is rounded to query's dtype.

    Args:
        query: [S, Hq, D]; float32, float16 or bfloat16, any D. The last dimension is contiguous.
        k_cache: [num_blocks, Hk, block_size, D] in query's dtype, on CPUs also in 16 bits for a query in float32, or
            int8 or (on GPUs) fp8 with scales; a block of one head is contiguous. Hk divides Hq.
        v_cache: like k_cache, with the same strides.
        block_tables: [S, M] int32, rows contiguous: the ids of a sequence's blocks in order. Entries past its length,
            and those that a sliding window has left behind, are never followed: they may be 0 or stale.
        seq_lens: [S] int32, tokens in the cache, at least 1 and at most M * block_size. On a GPU a row that only pads
            a batch may have 0: its result is zeros.
        scale: factor of the scores, positive, usually D ** -0.5.
        sliding_window: W: only positions j with seq_len - 1 - j < W are seen; None sees all.
        out: where to write; None for a new tensor. The last dimension is contiguous.
        k_scales: [num_blocks, Hk, block_size] bfloat16, the last dimension contiguous: what the codes of a
            slot are multiplied with. None for other caches.
        v_scales: like k_scales, with the same strides.
        backend: "auto" goes by query's device.

    Returns:
        [S, Hq, D] in query's dtype: `out` if it was given. Slots of a page that no token of the sequence fills never
        influence it, not even when they hold NaN.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above. Values (block ids, lengths) are the caller's duty.

    On a GPU a captured call may be replayed with any values in tables and seq_lens: how the work is cut follows from
    seq_lens on the device, the grid from shapes. So a result's last bits depend there on the lengths beside it in the
    batch, though on nothing else of them; on a CPU they depend on the sequence alone.

    Source: Kwon et al., PagedAttention, 2023 (arXiv 2309.06180); the split over the length follows Dao et al.,
    "Flash-Decoding for long-context inference", 2023, its equal shares Ye et al., FlashInfer, 2025 (arXiv 2501.01005).
    """
    body = choose_body(backend, query.device)
    check_attention(
        query, k_cache, v_cache, k_scales, v_scales, block_tables, seq_lens, scale, sliding_window, out, body
    )
    require(query.shape[0] == block_tables.shape[0], "query must have one row per sequence", query, block_tables)
    if body == "triton":
        from quire.kernels.paged_decode.triton import paged_decode as run
    elif body == "cpu":
        from quire.kernels.paged_decode.cpu import paged_decode as run
    else:
        from quire.kernels.paged_decode.reference import paged_decode as run
    return run(query, k_cache, v_cache, block_tables, seq_lens, scale, sliding_window, out, k_scales, v_scales)
