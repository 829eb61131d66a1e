"""Writing keys and values into pages in plain torch."""

from __future__ import annotations

import torch

from quire.kernels.quantization import quantize


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> None:
    block_size = k_cache.shape[2]
    block_ids, offsets = slot_mapping // block_size, slot_mapping % block_size
    for tokens, cache, scales in ((key, k_cache, k_scales), (value, v_cache, v_scales)):
        if scales is None:
            cache[block_ids, :, offsets] = tokens.to(cache.dtype)
        else:
            cache[block_ids, :, offsets], scales[block_ids, :, offsets] = quantize(tokens, cache.dtype)
