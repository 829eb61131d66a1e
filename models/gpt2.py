"""GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019)."""

from __future__ import annotations

import torch

from quire.kernels.take_rows import take_rows
from quire.models.config import Activation, ModelConfig
from quire.models.forward_batch import ForwardBatch
from quire.models.kv_cache import KVCache
from quire.models.layers.attention import PagedAttention
from quire.models.layers.embedding import load_embedding, load_embedding_and_head
from quire.models.layers.linear import Linear, make_linear
from quire.models.layers.norm import LayerNorm
from quire.models.weights import Weights


class GPT2Layer:
    """Attention and MLP, each added to the residual stream behind a layer norm of its own."""

    def __init__(self, config: ModelConfig, weights: Weights, name: str) -> None:
        size = config.hidden_size
        self._head_dim = config.head_dim
        self._attention_norm = LayerNorm(weights, f"{name}.ln_1", size, config.norm_eps)
        self._qkv = conv1d(weights, f"{name}.attn.c_attn", size, 3 * size)
        self._attention = PagedAttention(config, sliding_window=None)
        self._out = conv1d(weights, f"{name}.attn.c_proj", size, size)
        self._mlp_norm = LayerNorm(weights, f"{name}.ln_2", size, config.norm_eps)
        self._up = conv1d(weights, f"{name}.mlp.c_fc", size, config.intermediate_size, config.activation)
        self._down = conv1d(weights, f"{name}.mlp.c_proj", config.intermediate_size, size)

    def __call__(self, hidden: torch.Tensor, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        heads = self._qkv(self._attention_norm(hidden)).unflatten(-1, (-1, self._head_dim))  # [T, 3 H, D]
        query, key, value = heads.chunk(3, dim=1)
        cache.write(key, value, batch.slot_mapping)
        hidden = hidden + self._out(self._attention(query, batch, cache))
        return hidden + self._down(self._up(self._mlp_norm(hidden)))


class GPT2:
    """A models.model.Model with learned positions and the layers above."""

    def __init__(self, config: ModelConfig, weights: Weights, num_positions: int) -> None:
        """All learned positions are loaded, whatever `num_positions` is."""
        self.config = config
        prefix = "transformer." if "transformer.wte.weight" in weights else ""  # openai-community/gpt2 has none
        self._embedding, self._head = load_embedding_and_head(
            *(weights, f"{prefix}wte", "lm_head", config.vocab_size, config.hidden_size),
            tied=config.tie_word_embeddings,
        )
        self._positions = load_embedding(weights, f"{prefix}wpe", config.max_position_embeddings, config.hidden_size)
        self._layers = [GPT2Layer(config, weights, f"{prefix}h.{index}") for index in range(config.num_layers)]
        self._norm = LayerNorm(weights, f"{prefix}ln_f", config.hidden_size, config.norm_eps)
        self.weight_bytes = weights.num_bytes

    def forward(self, batch: ForwardBatch, kv_caches: list[KVCache]) -> torch.Tensor:
        """Final hidden states [R, H] of the tokens `batch.logits_indices`; K and V of all go into the caches."""
        hidden = self._embedding(batch.token_ids) + self._positions(batch.positions)
        for layer, cache in zip(self._layers, kv_caches, strict=True):
            hidden = layer(hidden, batch, cache)
        return self._norm(hidden if batch.logits_indices is None else take_rows(hidden, batch.logits_indices))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden)


def conv1d(
    weights: Weights, name: str, in_features: int, out_features: int, activation: Activation | None = None
) -> Linear:
    """GPT-2's linear layers are stored as [in_features, out_features]."""
    weight = weights.transposed(f"{name}.weight", out_features, in_features)
    return make_linear(weights, weight, weights.tensor(f"{name}.bias", out_features), activation=activation)
