"""What the engine asks of a model."""

from __future__ import annotations

from typing import Protocol

import torch

from quire.models.config import ModelConfig
from quire.models.forward_batch import ForwardBatch
from quire.models.kv_cache import KVCache


class Model(Protocol):
    """Weights on one device, and the arithmetic of one step. Not thread-safe."""

    config: ModelConfig
    weight_bytes: int
    """Bytes of device memory that the model holds: weights and tables."""

    def forward(self, batch: ForwardBatch, kv_caches: list[KVCache]) -> torch.Tensor:
        """Compute one step.

        Args:
            batch: its tensors on the model's device.
            kv_caches: of each layer, keys and values [num_blocks, num_kv_heads, block_size, head_dim] as codes or in
                the model's dtype. The step's keys and values are written at `batch.slot_mapping`.

        Returns:
            Final hidden states [R, hidden_size], one row for each of `batch.logits_indices`: what `logits` takes.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """From rows that `forward` returned, [R, hidden_size], to their logits [R, vocab_size] float32."""
        ...
