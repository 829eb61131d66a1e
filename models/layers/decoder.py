"""The decoder that Llama and its kin share: pre-norm layers over one residual stream."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quire.kernels.take_rows import take_rows
from quire.models.config import ModelConfig
from quire.models.forward_batch import ForwardBatch
from quire.models.kv_cache import KVCache
from quire.models.layers.attention import RotaryAttention
from quire.models.layers.embedding import load_embedding_and_head
from quire.models.layers.mlp import GatedMLP
from quire.models.layers.norm import RMSNorm
from quire.models.weights import Weights


class DecoderLayer:
    """Attention, then MLP, each behind a norm that first adds to the residual what the half before it made."""

    def __init__(
        self, config: ModelConfig, weights: Weights, name: str, attention: RotaryAttention, mlp: GatedMLP
    ) -> None:
        self._attention_norm = RMSNorm(weights, f"{name}.input_layernorm", config.hidden_size, config.norm_eps)
        self._attention = attention
        self._mlp_norm = RMSNorm(weights, f"{name}.post_attention_layernorm", config.hidden_size, config.norm_eps)
        self._mlp = mlp

    def __call__(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, batch: ForwardBatch, cache: KVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the MLP makes, and the residual stream [T, hidden_size] that it is still to be added to.

        `residual` is changed IN PLACE; None before the first layer, whose `hidden` becomes it.
        """
        normed = self._attention_norm(hidden, residual)
        residual = hidden if residual is None else residual
        hidden = self._attention(normed, batch, cache)
        return self._mlp(self._mlp_norm(hidden, residual)), residual


class Decoder:
    """A models.model.Model: embedding, layers, norm, logits.

    Args:
        cos_sin: the table that the attention layers share.
        attention: makes the attention of a layer, given its index and the prefix of its tensors' names.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        cos_sin: torch.Tensor,
        attention: Callable[[int, str], RotaryAttention],
    ) -> None:
        self.config = config
        self._embedding, self._head = load_embedding_and_head(
            *(weights, "model.embed_tokens", "lm_head", config.vocab_size, config.hidden_size),
            tied=config.tie_word_embeddings,
        )
        self._layers = [self._layer(index, weights, attention) for index in range(config.num_layers)]
        self._norm = RMSNorm(weights, "model.norm", config.hidden_size, config.norm_eps)
        self.weight_bytes = weights.num_bytes + cos_sin.nbytes

    def _layer(self, index: int, weights: Weights, attention: Callable[[int, str], RotaryAttention]) -> DecoderLayer:
        name = f"model.layers.{index}"
        mlp = GatedMLP(self.config, weights, f"{name}.mlp", bias=self.config.mlp_bias)
        return DecoderLayer(self.config, weights, name, attention(index, f"{name}.self_attn"), mlp)

    def forward(self, batch: ForwardBatch, kv_caches: list[KVCache]) -> torch.Tensor:
        """Final hidden states [R, H] of the tokens `batch.logits_indices`; K and V of all go into the caches."""
        hidden, residual = self._embedding(batch.token_ids), None
        for layer, cache in zip(self._layers, kv_caches, strict=True):
            hidden, residual = layer(hidden, residual, batch, cache)
        if batch.logits_indices is not None and residual is not None:
            hidden, residual = (take_rows(x, batch.logits_indices) for x in (hidden, residual))
        return self._norm(hidden, residual)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden)
