"""The decoder that Llama and its kin share: pre-norm layers over one residual stream."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quire.models.config import ModelConfig
from quire.models.forward_batch import ForwardBatch
from quire.models.layers.attention import KVCache, RotaryAttention
from quire.models.layers.embedding import Embedding, LogitsHead
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
        self, hidden: torch.Tensor, residual: torch.Tensor, batch: ForwardBatch, cache: KVCache
    ) -> torch.Tensor:
        """What the MLP makes, not yet added to `residual`, which is changed IN PLACE; all [T, hidden_size]."""
        hidden = self._attention(self._attention_norm(hidden, residual), batch, cache)
        return self._mlp(self._mlp_norm(hidden, residual))


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
        self._embedding = Embedding(weights, "model.embed_tokens", config.vocab_size, config.hidden_size)
        self._layers = [self._layer(index, weights, attention) for index in range(config.num_layers)]
        self._norm = RMSNorm(weights, "model.norm", config.hidden_size, config.norm_eps)
        self._head = LogitsHead(weights, "lm_head", self._embedding, tied=config.tie_word_embeddings)
        self.weight_bytes = weights.num_bytes + cos_sin.nbytes

    def _layer(self, index: int, weights: Weights, attention: Callable[[int, str], RotaryAttention]) -> DecoderLayer:
        name = f"model.layers.{index}"
        mlp = GatedMLP(self.config, weights, f"{name}.mlp", bias=self.config.mlp_bias)
        return DecoderLayer(self.config, weights, name, attention(index, f"{name}.self_attn"), mlp)

    def forward(self, batch: ForwardBatch, kv_caches: list[KVCache]) -> torch.Tensor:
        """Final hidden states [R, H] of the tokens `batch.logits_indices`; K and V of all go into the caches."""
        hidden = self._embedding(batch.token_ids)
        residual = torch.zeros_like(hidden)
        for layer, cache in zip(self._layers, kv_caches, strict=True):
            hidden = layer(hidden, residual, batch, cache)
        return self._norm(hidden[batch.logits_indices], residual[batch.logits_indices])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden)
