"""The pages of one layer, as models hand them to kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from quire.kernels.kv_write import kv_write


class KVCache(NamedTuple):
    """Keys and values of one layer in blocks."""

    keys: torch.Tensor
    """[num_blocks, num_kv_heads, block_size, head_dim], in the model's dtype or as int8 or fp8 codes."""
    values: torch.Tensor
    """Like `keys`."""
    key_scales: torch.Tensor | None = None
    """[num_blocks, num_kv_heads, block_size] bfloat16: what the codes of a slot are multiplied with."""
    value_scales: torch.Tensor | None = None
    """Like `key_scales`."""

    def write(self, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Store token t's key and value [T, num_kv_heads, head_dim] at slot slot_mapping[t]."""
        kv_write(key, value, self.keys, self.values, slot_mapping, self.key_scales, self.value_scales)
