"""The pages themselves: one tensor for all layers, what belongs to them, and the copies that copy-on-write asks for."""

from __future__ import annotations

import torch

from quire.engine.log_prob_pages import LogProbPages
from quire.engine.zeroed_memory import zeroed
from quire.models.config import ModelConfig


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers, K and V."""
    return 2 * config.num_layers * config.num_kv_heads * block_size * config.head_dim * dtype.itemsize


class KVStorage:
    """`layers[i]` is (k_cache, v_cache) of layer i, each [num_blocks, num_kv_heads, block_size, head_dim].

    `log_probs` are the stored log-probabilities of the same blocks, on the host.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        max_logprobs: int,
    ) -> None:
        shape = (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size, config.head_dim)
        self._pages = zeroed(shape, dtype, device)
        self.layers = [(layer[0], layer[1]) for layer in self._pages]
        self.log_probs = LogProbPages(num_blocks, block_size, max_logprobs)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy (source, target) blocks, log-probabilities too; no target is the source of another copy of one call."""
        if not copies:
            return
        sources, targets = zip(*copies, strict=True)
        index = torch.tensor([sources, targets], device=self._pages.device)
        self._pages[:, :, index[1]] = self._pages[:, :, index[0]]
        self.log_probs.copy_blocks(copies)
