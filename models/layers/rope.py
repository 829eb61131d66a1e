"""Tables of cosines and sines for rotary position embeddings."""

from __future__ import annotations

import math

import torch

from quire.models.rope_config import LinearScaling, Llama3Scaling, LongRopeScaling, RopeConfig, YarnScaling


def cos_sin_table(rope: RopeConfig | None, num_positions: int, device: torch.device) -> torch.Tensor:
    """[num_positions, rotary_dim] float32: cosines of rotary_dim / 2 frequencies, then their sines.

    The attention factor is multiplied in. Computed in float32 on the CPU, as transformers does. Raises ValueError for a
    model without rotary positions.
    """
    if rope is None:
        raise ValueError("this model has no rotary positions")
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(rope)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.attention_factor
    return table.to(device)


def inverse_frequencies(rope: RopeConfig) -> torch.Tensor:
    """Radians per position of each pair of dimensions: [rotary_dim / 2] float32.

    Source: RoFormer (Su et al., 2021, arXiv 2104.09864); for the scalings see models/rope_config.py. Equal to
    `ROPE_INIT_FUNCTIONS` of transformers.
    """
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    wavelengths: torch.Tensor = rope.theta**exponents  # in positions, without 2 pi
    match rope.scaling:
        case None:
            return 1.0 / wavelengths
        case LinearScaling(factor=factor):
            return 1.0 / wavelengths / factor
        case LongRopeScaling(factors=factors):
            return 1.0 / (torch.tensor(factors, dtype=torch.float32) * wavelengths)
        case Llama3Scaling() as scaling:
            return _llama3(scaling, 1.0 / wavelengths)
        case YarnScaling() as scaling:
            return _yarn(scaling, wavelengths, rope)


def _llama3(scaling: Llama3Scaling, frequencies: torch.Tensor) -> torch.Tensor:
    """Wavelengths up to context / high_freq_factor stay, those from context / low_freq_factor on are stretched."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(scaling: YarnScaling, wavelengths: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Dimensions that turn more than beta_fast times over the original context stay, below beta_slow are stretched."""
    low = _dimension_of_turns(scaling.beta_fast, scaling, rope)
    high = _dimension_of_turns(scaling.beta_slow, scaling, rope)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = high - low or 0.001
    stretched = ((torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return (1.0 / (scaling.factor * wavelengths)) * stretched + (1.0 / wavelengths) * (1 - stretched)


def _dimension_of_turns(turns: float, scaling: YarnScaling, rope: RopeConfig) -> float:
    """Index of the pair of dimensions that turns so often over the original context (YaRN, section 3.2)."""
    return (
        rope.rotary_dim
        * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi))
        / (2 * math.log(rope.theta))
    )
