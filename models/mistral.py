"""Mistral (Jiang et al., 2023, arXiv 2310.06825)."""

from __future__ import annotations

from quire.models.config import ModelConfig
from quire.models.layers.attention import RotaryAttention
from quire.models.layers.decoder import Decoder
from quire.models.layers.rope import cos_sin_table
from quire.models.weights import Weights


def build_mistral(config: ModelConfig, weights: Weights, num_positions: int) -> Decoder:
    """Llama without biases; the same sliding window in every layer, or none."""
    cos_sin = cos_sin_table(config.rope, num_positions, weights.device)

    def attention(index: int, name: str) -> RotaryAttention:
        return RotaryAttention(
            config,
            weights,
            name,
            cos_sin,
            sliding_window=config.layer_windows[index],
        )

    return Decoder(config, weights, cos_sin, attention)
