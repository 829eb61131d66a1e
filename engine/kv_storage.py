"""The pages themselves: one tensor for all layers, what belongs to them, and the copies that copy-on-write asks for."""

from __future__ import annotations

import numpy as np
import torch

from quire.engine.host_values import to_device
from quire.engine.log_prob_pages import LogProbPages
from quire.engine.zeroed_memory import zeroed
from quire.kernels.quantization import LARGEST_CODE
from quire.models.config import ModelConfig
from quire.models.kv_cache import KVCache

SCALE_DTYPE = torch.bfloat16


def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers, K and V, with the scales that pages of codes have."""
    num_vectors = 2 * config.num_layers * config.num_kv_heads * block_size
    scale_bytes = SCALE_DTYPE.itemsize if dtype in LARGEST_CODE else 0
    return num_vectors * (config.head_dim * dtype.itemsize + scale_bytes)


class KVStorage:
    """`layers[i]` are the pages of layer i.

    `log_probs` are the stored log-probabilities of the same blocks, on the host.

    Args:
        dtype: of the pages: the model's, or one of codes.
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
        shape = (config.num_layers, 2, num_blocks, config.num_kv_heads, block_size)
        pages = zeroed((*shape, config.head_dim), dtype, device)
        self._parts = [pages]  # each [num_layers, 2, num_blocks, ...]
        if dtype in LARGEST_CODE:
            self._parts = [pages.view(torch.int8)]  # torch copies bytes wherever it runs, fp8 not everywhere
            scales = zeroed(shape, SCALE_DTYPE, device)
            self._parts.append(scales)
            self.layers = [
                KVCache(page[0], page[1], scale[0], scale[1]) for page, scale in zip(pages, scales, strict=True)
            ]
        else:
            self.layers = [KVCache(page[0], page[1]) for page in pages]
        self.log_probs = LogProbPages(num_blocks, block_size, max_logprobs)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy (source, target) blocks, scales and log-probabilities too; no target is the source of another copy of
        one call."""
        if not copies:
            return
        sources, targets = zip(*copies, strict=True)
        index = to_device(np.array([sources, targets], np.int64), self._parts[0].device)
        for part in self._parts:
            part[:, :, index[1]] = part[:, :, index[0]]
        self.log_probs.copy_blocks(copies)
