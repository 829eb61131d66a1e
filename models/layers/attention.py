"""Attention over the paged KV-cache."""

from __future__ import annotations

import torch

from quire.kernels.backend import empty
from quire.kernels.cascade_decode import cascade_decode
from quire.kernels.paged_decode import paged_decode
from quire.kernels.paged_prefill import paged_prefill
from quire.kernels.rms_norm import rms_norm
from quire.kernels.rope import rope
from quire.kernels.rope_kv_write import rope_kv_write
from quire.models.config import ModelConfig
from quire.models.forward_batch import ForwardBatch
from quire.models.kv_cache import KVCache
from quire.models.layers.linear import fused_linear, linear
from quire.models.weights import Weights


class PagedAttention:
    """Lets every query of a step see its own sequence up to itself; the step's keys and values are in their pages."""

    def __init__(self, config: ModelConfig, sliding_window: int | None) -> None:
        self._scale = config.head_dim**-0.5
        self._sliding_window = sliding_window

    def __call__(self, query: torch.Tensor, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """From query [T, Hq, D] to [T, Hq * D]."""
        num_decodes = batch.num_decodes  # each of one token: rows of `query` and of the block tables alike
        if num_decodes == len(query):
            return self._decode(query, batch, cache, None).flatten(1)
        out = empty(tuple(query.shape), query)
        if num_decodes:
            self._decode(query[:num_decodes], batch, cache, out[:num_decodes])
        paged_prefill(
            query[num_decodes:],
            cache.keys,
            cache.values,
            batch.block_tables[num_decodes:],
            batch.seq_lens[num_decodes:],
            batch.prefill_start,
            self._scale,
            batch.max_query_len,
            self._sliding_window,
            out[num_decodes:],
            cache.key_scales,
            cache.value_scales,
        )
        return out.flatten(1)

    def _decode(
        self, query: torch.Tensor, batch: ForwardBatch, cache: KVCache, out: torch.Tensor | None
    ) -> torch.Tensor:
        tables, seq_lens = batch.block_tables[: len(query)], batch.seq_lens[: len(query)]
        if batch.prefix_groups is not None and self._sliding_window is None:
            return cascade_decode(
                *(query, cache.keys, cache.values, tables, seq_lens, batch.prefix_groups, self._scale, out),
                *(cache.key_scales, cache.value_scales),
            )
        return paged_decode(
            *(query, cache.keys, cache.values, tables, seq_lens, self._scale, self._sliding_window, out),
            *(cache.key_scales, cache.value_scales),
        )


class RotaryAttention:
    """Self-attention with rotary positions and grouped queries, as Llama has it.

    Args:
        cos_sin: [max_positions, rotary_dim] float32, shared by all layers.
        qk_norm: RMS norm of each head's query and key before they are rotated.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        name: str,
        cos_sin: torch.Tensor,
        *,
        sliding_window: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
    ) -> None:
        dim = config.head_dim
        self._heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self._head_dim = dim
        rows = {f"{name}.{part}_proj": num * dim for part, num in zip("qkv", self._heads, strict=True)}
        self._qkv = fused_linear(weights, rows, config.hidden_size, bias=qkv_bias)
        self._out = linear(weights, f"{name}.o_proj", config.num_heads * dim, config.hidden_size, bias=out_bias)
        self._norms = (
            (weights.tensor(f"{name}.q_norm.weight", dim), weights.tensor(f"{name}.k_norm.weight", dim))
            if qk_norm
            else (None, None)
        )
        self._norm_eps = config.norm_eps
        self._cos_sin = cos_sin
        self._attention = PagedAttention(config, sliding_window)

    def __call__(self, hidden: torch.Tensor, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        heads = self._qkv(hidden).unflatten(-1, (-1, self._head_dim))  # [T, Hq + 2 Hk, D]
        query, key, value = heads.split(self._heads, dim=1)
        if cache.key_scales is None:
            rope_kv_write(
                *(query, key, value, batch.positions, self._cos_sin, cache.keys, cache.values, batch.slot_mapping),
                *(*self._norms, self._norm_eps),
            )
        else:
            query_norm, key_norm = self._norms
            if query_norm is not None and key_norm is not None:
                query, key = rms_norm(query, query_norm, self._norm_eps), rms_norm(key, key_norm, self._norm_eps)
            rope(query, key, batch.positions, self._cos_sin)
            cache.write(key, value, batch.slot_mapping)
        return self._out(self._attention(query, batch, cache))
