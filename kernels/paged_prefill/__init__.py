"""Causal attention of many new tokens per sequence over their pages."""

from __future__ import annotations

import torch

from quire.kernels.backend import Backend, choose_body
from quire.kernels.checks import check_attention, require


def paged_prefill(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float,
    max_query_len: int,
    sliding_window: int | None = None,
    out: torch.Tensor | None = None,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """The newest tokens of each sequence attend to its pages up to and including themselves.

    The new tokens of all sequences lie one after another; those of sequence s are [query_start[s], query_start[s + 1]),
    its last ones: token i of them sits at position seq_lens[s] - query_len + i. Their keys and values are already in
    the cache, as are those of the chunks before. Query head h reads KV head h // (Hq // Hk). Softmax and sums are in
    float32, the result is rounded to query's dtype.

    Args:
        query: [T, Hq, D]; float32, float16 or bfloat16, any D. The last dimension is contiguous.
        k_cache: [num_blocks, Hk, block_size, D] in query's dtype, on CPUs also in 16 bits for a query in float32, or
            int8 or (on GPUs) fp8 with scales; a block of one head is contiguous. Hk divides Hq.
        v_cache: like k_cache, with the same strides.
        block_tables: [S, M] int32, rows contiguous: the ids of a sequence's blocks in order. Entries past its length,
            and those that a sliding window has left behind, are never followed: they may be 0 or stale.
        seq_lens: [S] int32, tokens in the cache, the new ones included; at most M * block_size.
        query_start: [S + 1] int32, contiguous: query_start[0] is 0, query_start[S] is T.
        scale: factor of the scores, positive, usually D ** -0.5.
        max_query_len: the longest query_len, known on the host.
        sliding_window: W: position p sees positions j <= p with p - j < W; None sees all.
        out: where to write; None for a new tensor. The last dimension is contiguous.
        k_scales: [num_blocks, Hk, block_size] bfloat16, the last dimension contiguous: what the codes of a
            slot are multiplied with. None for other caches.
        v_scales: like k_scales, with the same strides.
        backend: "auto" goes by query's device.

    Returns:
        [T, Hq, D] in query's dtype: `out` if it was given. Slots of a page that no token of the sequence fills never
        influence it, not even when they hold NaN.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above. Values (block ids, lengths) are the caller's duty.

    Source: Dao, "FlashAttention-2", 2023 (arXiv 2307.08691), over the pages of PagedAttention (arXiv 2309.06180).
    """
    body = choose_body(backend, query.device)
    check_attention(
        query, k_cache, v_cache, k_scales, v_scales, block_tables, seq_lens, scale, sliding_window, out, body
    )
    require(
        query_start.shape == (seq_lens.shape[0] + 1,)
        and query_start.dtype == torch.int32
        and query_start.device == query.device
        and query_start.is_contiguous(),
        "query_start must be contiguous int32 [sequences + 1]",
        query_start,
        seq_lens,
    )
    common = (query, k_cache, v_cache, block_tables, seq_lens, query_start, scale, max_query_len, sliding_window, out)
    if body == "triton":
        from quire.kernels.paged_prefill.triton import paged_prefill as run
    elif body == "cpu":
        from quire.kernels.paged_prefill.cpu import paged_prefill as run
    else:
        from quire.kernels.paged_prefill.reference import paged_prefill as run
    return run(*common, k_scales, v_scales)
