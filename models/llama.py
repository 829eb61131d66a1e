"""Llama 1 to 3 (Touvron et al., 2023, arXiv 2302.13971)."""

from __future__ import annotations

from quire.models.config import ModelConfig
from quire.models.layers.attention import RotaryAttention
from quire.models.layers.decoder import Decoder
from quire.models.layers.rope import cos_sin_table
from quire.models.weights import Weights


def build_llama(config: ModelConfig, weights: Weights, num_positions: int) -> Decoder:
    """Full attention; biases where config.json asks for them."""
    cos_sin = cos_sin_table(config.rope, num_positions, weights.device)

    def attention(index: int, name: str) -> RotaryAttention:
        return RotaryAttention(
            config,
            weights,
            name,
            cos_sin,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
        )

    return Decoder(config, weights, cos_sin, attention)
