"""The pages themselves: one tensor for all layers, and the copies that copy-on-write asks for."""

from __future__ import annotations

import torch

from quire.models.config import ModelConfig


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers, K and V."""
    return 2 * config.num_layers * config.num_kv_heads * block_size * config.head_dim * dtype.itemsize


class KVStorage:
    """`layers[i]` is (k_cache, v_cache) of layer i, each [num_blocks, num_kv_heads, block_size, head_dim]."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size, config.head_dim)
        self._pages = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = [(layer[0], layer[1]) for layer in self._pages]

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy (source, target) blocks in all layers; no target is the source of another copy of the same call."""
        if not copies:
            return
        sources, targets = zip(*copies, strict=True)
        index = torch.tensor([sources, targets], device=self._pages.device)
        self._pages[:, :, index[1]] = self._pages[:, :, index[0]]
