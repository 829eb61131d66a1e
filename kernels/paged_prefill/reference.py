"""Paged causal attention in plain torch: one sequence after another."""

from __future__ import annotations

import torch

from quire.kernels.quantization import read_slots


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
) -> torch.Tensor:
    out = torch.empty_like(query) if out is None else out
    block_size = k_cache.shape[2]
    group_size = query.shape[1] // k_cache.shape[1]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    starts = query_start.tolist()
    for sequence, seq_len in enumerate(seq_lens.tolist()):
        start, end = starts[sequence], starts[sequence + 1]
        query_positions = torch.arange(seq_len - (end - start), seq_len, device=query.device)
        first = 0 if sliding_window is None else max(0, seq_len - (end - start) - sliding_window + 1)
        positions = torch.arange(first, seq_len, device=query.device)
        block_ids = block_tables[sequence, positions // block_size].long()
        keys = read_slots(k_cache, k_scales, block_ids, positions % block_size, wide)  # [L, Hk, D]
        values = read_slots(v_cache, v_scales, block_ids, positions % block_size, wide)
        keys = keys.repeat_interleave(group_size, dim=1)  # [L, Hq, D]
        values = values.repeat_interleave(group_size, dim=1)
        distance = query_positions[:, None] - positions[None, :]  # [Q, L]
        hidden = distance < 0
        if sliding_window is not None:
            hidden |= distance >= sliding_window
        scores = torch.einsum("qhd,lhd->hql", query[start:end].to(wide), keys) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[start:end] = torch.einsum("hql,lhd->qhd", weights, values).to(out.dtype)
    return out
