"""Pages side by side, for peers that know of none."""

from __future__ import annotations

import torch


def gathered(cache: torch.Tensor, block_tables: torch.Tensor) -> torch.Tensor:
    """[S, Hk, M * block_size, D]: the pages [num_blocks, Hk, block_size, D] of each sequence, in order."""
    num_seqs, num_blocks = block_tables.shape
    _, num_kv_heads, block_size, head_dim = cache.shape
    pages = cache[block_tables.long()].transpose(1, 2)
    return pages.reshape(num_seqs, num_kv_heads, num_blocks * block_size, head_dim)
