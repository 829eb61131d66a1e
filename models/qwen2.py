"""Qwen2 and Qwen2.5 (Yang et al., 2024, arXiv 2407.10671)."""

from __future__ import annotations

from quire.models.config import ModelConfig
from quire.models.layers.attention import RotaryAttention
from quire.models.layers.decoder import Decoder
from quire.models.layers.rope import cos_sin_table
from quire.models.weights import Weights


def build_qwen2(config: ModelConfig, weights: Weights, num_positions: int) -> Decoder:
    """Llama with biases on queries, keys and values; some layers may have a sliding window."""
    cos_sin = cos_sin_table(config.rope, num_positions, weights.device)

    def attention(index: int, name: str) -> RotaryAttention:
        return RotaryAttention(
            config,
            weights,
            name,
            cos_sin,
            sliding_window=config.layer_windows[index],
            qkv_bias=True,
        )

    return Decoder(config, weights, cos_sin, attention)
