"""The three operations one after the other, in plain torch."""

from __future__ import annotations

import torch

from quire.kernels.kv_write import kv_write
from quire.kernels.rms_norm import rms_norm
from quire.kernels.rope import rope


def rope_kv_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
) -> None:
    if query_norm is not None and key_norm is not None:
        query.copy_(rms_norm(query, query_norm, eps, backend="reference"))
        key = rms_norm(key, key_norm, eps, backend="reference")
    rope(query, key, positions, cos_sin, backend="reference")
    kv_write(key, value, k_cache, v_cache, slot_mapping, backend="reference")
