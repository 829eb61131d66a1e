"""How rotary position embeddings are parametrised: what `config.json` says of them, checked. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quire.config import ConfigError
from quire.models.json_fields import JsonFields

DEFAULT_THETA = 10_000.0
"""What transformers takes when a checkpoint names no base."""

_COMMON_NAMES = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
_NAMES = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
}


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation (Chen et al., 2023, arXiv 2306.15595): all frequencies are divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al., 2023, arXiv 2309.00071): low frequencies are divided by `factor`, high ones are kept."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    truncate: bool


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: like YaRN, with a ramp over wavelengths (`apply_scaling` in meta-llama/llama-models)."""

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """LongRoPE (Ding et al., 2024, arXiv 2402.13753): each frequency is divided by a factor of its own."""

    factors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    theta: float
    rotary_dim: int
    """Leading dimensions of a head that are rotated; even."""
    scaling: LinearScaling | YarnScaling | Llama3Scaling | LongRopeScaling | None = None
    attention_factor: float = 1.0
    """Multiplies cosines and sines."""


def read_rope(fields: JsonFields, head_dim: int, max_position_embeddings: int) -> tuple[RopeConfig, int]:
    """The RoPE parameters of `config.json`, in the style of transformers 4 (`rope_scaling`) or 5 (`rope_parameters`).

    Dynamic NTK scaling and LongRoPE change all frequencies, also those of keys already cached, when a sequence outgrows
    the length of pre-training, so no table is right for both sides of it: such models are served up to that length,
    where dynamic NTK is plain RoPE and LongRoPE uses its short factors, as in transformers.

    Returns:
        The parameters, and the longest sequence they are good for, in tokens: `max_position_embeddings`, stretched by
        linear and YaRN factors (as vLLM does), cut as said for dynamic NTK and LongRoPE.

    Raises:
        ConfigError: a parameter is missing, odd, or of no known scaling.
    """
    parameters = fields.optional_object("rope_scaling")
    if parameters is None or not parameters.names():
        parameters = fields.optional_object("rope_parameters") or JsonFields(fields.source, {})
    rope_type = parameters.optional_string("rope_type") or parameters.optional_string("type") or "default"
    if rope_type not in _NAMES:
        raise ConfigError(
            f"{fields.source}: RoPE of type {rope_type[:40]!r} is not supported; known: {', '.join(_NAMES)}."
        )
    unknown = parameters.names() - _COMMON_NAMES - _NAMES[rope_type]
    if unknown:
        raise ConfigError(
            f"{parameters.source}: {sorted(unknown)[0][:40]!r} is not supported for RoPE of type {rope_type!r}; "
            "remove it if the model does not need it."
        )
    theta = parameters.optional_number("rope_theta", 1.001) or fields.optional_number("rope_theta", 1.001)
    rope = RopeConfig(theta=theta or DEFAULT_THETA, rotary_dim=_rotary_dim(fields, parameters, head_dim))
    original = (
        fields.optional_integer("original_max_position_embeddings", 2)
        or parameters.optional_integer("original_max_position_embeddings", 2)
        or max_position_embeddings
    )
    if rope_type == "linear":
        factor = parameters.number("factor", 1)
        return _scaled(rope, LinearScaling(factor)), int(max_position_embeddings * factor)
    if rope_type == "yarn":
        factor = parameters.optional_number("factor", 1) or max(1.0, max_position_embeddings / original)
        longest = max(max_position_embeddings, int(original * factor))
        return _scaled(rope, _yarn(parameters, factor, original), _yarn_attention(parameters, factor)), longest
    if rope_type == "llama3":
        return _scaled(rope, _llama3(parameters, original)), max_position_embeddings
    if rope_type == "longrope":
        scaling = LongRopeScaling(parameters.numbers("short_factor", rope.rotary_dim // 2))
        attention = _longrope_attention(parameters, max_position_embeddings, original)
        return _scaled(rope, scaling, attention), min(max_position_embeddings, original)
    return rope, max_position_embeddings


def _scaled(
    rope: RopeConfig, scaling: LinearScaling | YarnScaling | Llama3Scaling | LongRopeScaling, attention: float = 1.0
) -> RopeConfig:
    return RopeConfig(rope.theta, rope.rotary_dim, scaling, attention)


def _rotary_dim(fields: JsonFields, parameters: JsonFields, head_dim: int) -> int:
    source = parameters if "partial_rotary_factor" in parameters else fields
    rotary_dim = int(head_dim * (source.optional_number("partial_rotary_factor", 1e-6, 1) or 1.0))
    if rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(
            f"{fields.source}: RoPE over {rotary_dim} dimensions of a head is not possible; 'head_dim' times "
            "'partial_rotary_factor' must be even."
        )
    return rotary_dim


def _yarn(parameters: JsonFields, factor: float, original: int) -> YarnScaling:
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=parameters.optional_number("beta_fast", 0) or 32.0,
        beta_slow=parameters.optional_number("beta_slow", 0) or 1.0,
        truncate=parameters.boolean("truncate", True),
    )


def _yarn_attention(parameters: JsonFields, factor: float) -> float:
    given = parameters.optional_number("attention_factor", 0)
    if given is not None:
        return given
    mscale = parameters.optional_number("mscale", 0)
    mscale_all_dim = parameters.optional_number("mscale_all_dim", 0)
    if mscale and mscale_all_dim:
        return _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
    return _yarn_mscale(factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(parameters: JsonFields, original: int) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=parameters.number("factor", 1),
        original_max_position_embeddings=original,
        low_freq_factor=parameters.number("low_freq_factor", 1e-6),
        high_freq_factor=parameters.number("high_freq_factor", 1e-6),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise parameters.error("high_freq_factor", f"must be larger than 'low_freq_factor' {scaling.low_freq_factor:g}")
    return scaling


def _longrope_attention(parameters: JsonFields, max_position_embeddings: int, original: int) -> float:
    given = parameters.optional_number("attention_factor", 0)
    if given is not None:
        return given
    factor = parameters.optional_number("factor", 1) or max_position_embeddings / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
