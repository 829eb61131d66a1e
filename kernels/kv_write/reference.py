"""Writing keys and values into pages in plain torch."""

from __future__ import annotations

import torch


def kv_write(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    block_size = k_cache.shape[2]
    block_ids, offsets = slot_mapping // block_size, slot_mapping % block_size
    k_cache[block_ids, :, offsets] = key.to(k_cache.dtype)
    v_cache[block_ids, :, offsets] = value.to(v_cache.dtype)
