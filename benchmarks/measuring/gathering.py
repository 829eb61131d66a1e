"""Pages side by side, for peers that know of none."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def gathered(cache: torch.Tensor, block_tables: torch.Tensor) -> torch.Tensor:
    """[S, Hk, M * block_size, D]: the pages [num_blocks, Hk, block_size, D] of each sequence, in order."""
    num_seqs, num_blocks = block_tables.shape
    _, num_kv_heads, block_size, head_dim = cache.shape
    pages = cache[block_tables.long()].transpose(1, 2)
    return pages.reshape(num_seqs, num_kv_heads, num_blocks * block_size, head_dim)


def token_slots(block_tables: torch.Tensor, block_size: int, seq_lens: Sequence[int]) -> torch.Tensor:
    """[sum of seq_lens] int32: where each token of each sequence lies, counted in tokens."""
    offsets = torch.arange(block_size, dtype=torch.int32, device=block_tables.device)
    slots = (block_tables.int()[:, :, None] * block_size + offsets).flatten(1)
    return torch.cat([row[:length] for row, length in zip(slots, seq_lens, strict=True)])
