"""Cascade decode in plain torch: one group after another, its prefix and then each member's rest, merged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quire.kernels.quantization import read_slots

if TYPE_CHECKING:
    from quire.kernels.cascade_decode import PrefixGroups


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
    out = torch.empty_like(query) if out is None else out
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    group_size, block_size = query.shape[1] // k_cache.shape[1], k_cache.shape[2]

    def attend(rows: list[int], first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of rows whose tables agree in [first, end): results [R, Hq, D], logarithms of sums of weights [R, Hq]."""
        positions = torch.arange(first, end, device=query.device)
        block_ids = block_tables[rows[0], positions // block_size].long()
        keys = read_slots(k_cache, k_scales, block_ids, positions % block_size, wide)  # [L, Hk, D]
        values = read_slots(v_cache, v_scales, block_ids, positions % block_size, wide)
        keys, values = (part.repeat_interleave(group_size, dim=1) for part in (keys, values))  # [L, Hq, D]
        scores = torch.einsum("rhd,lhd->rhl", query[rows].to(wide), keys) * scale
        return torch.einsum("rhl,lhd->rhd", scores.softmax(dim=-1), values), scores.logsumexp(dim=-1)

    starts, lens = groups.group_start.tolist(), seq_lens.tolist()
    for group, prefix_len in enumerate(groups.prefix_lens.tolist()):
        rows = groups.rows[starts[group] : starts[group + 1]].tolist()
        if not rows:
            continue
        prefixes, prefix_lses = attend(rows, 0, prefix_len)
        for index, row in enumerate(rows):
            rest, rest_lse = attend([row], prefix_len, lens[row])
            lses = torch.stack((prefix_lses[index], rest_lse[0]))  # [2, Hq]; -inf where there is nothing
            weights = lses.softmax(dim=0)[..., None]
            out[row] = (prefixes[index] * weights[0] + rest[0] * weights[1]).to(out.dtype)
    return out
