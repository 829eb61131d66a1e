"""Qwen3, the dense models (Yang et al., 2025, arXiv 2505.09388)."""

from __future__ import annotations

from quire.models.config import ModelConfig
from quire.models.layers.attention import RotaryAttention
from quire.models.layers.decoder import Decoder
from quire.models.layers.rope import cos_sin_table
from quire.models.weights import Weights


def build_qwen3(config: ModelConfig, weights: Weights, num_positions: int) -> Decoder:
    """Llama with a norm of each head's query and key; some layers may have a sliding window."""
    cos_sin = cos_sin_table(config.rope, num_positions, weights.device)

    def attention(index: int, name: str) -> RotaryAttention:
        return RotaryAttention(
            config,
            weights,
            name,
            cos_sin,
            sliding_window=config.layer_windows[index],
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
            qk_norm=True,
        )

    return Decoder(config, weights, cos_sin, attention)
