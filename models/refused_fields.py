"""Fields of config.json that change a model's numbers and that no supported family has. No torch."""

from __future__ import annotations

from quire.config import ConfigError
from quire.models.json_fields import JsonFields

_OFF: tuple[object, ...] = (None, False, 0, "", [], {})
_ONE: tuple[object, ...] = (None, 1, True)

HARMLESS_VALUES: dict[str, tuple[object, ...]] = {
    "add_cross_attention": _OFF,
    "alibi": _OFF,
    "attention_chunk_size": _OFF,
    "attention_multiplier": _ONE,
    "attn_logit_softcapping": _OFF,
    "attn_temperature_tuning": _OFF,
    "clip_qkv": _OFF,
    "compression_config": _OFF,
    "embedding_multiplier": _ONE,
    "final_logit_softcapping": _OFF,
    "is_causal": _ONE,
    "is_encoder_decoder": _OFF,
    "logit_scale": _ONE,
    "logits_scaling": _ONE,
    "n_routed_experts": _OFF,
    "no_rope_layer_interval": _OFF,
    "no_rope_layers": _OFF,
    "num_experts": _OFF,
    "num_local_experts": _OFF,
    "parallel_attn": _OFF,
    "per_layer_config": _OFF,
    "pruned_heads": _OFF,
    "qk_layernorm": _OFF,
    "query_pre_attn_scalar": _OFF,
    "residual_multiplier": _ONE,
    "rope_interleave": _OFF,
    "rope_interleaved": _OFF,
    "scale_attn_by_inverse_layer_idx": _OFF,
    "scale_attn_weights": _ONE,
    "scale_emb": _ONE,
    "use_alibi": _OFF,
    "use_bidirectional_attention": _OFF,
    "use_mrope": _OFF,
    "use_parallel_residual": _OFF,
    "use_qk_norm": _OFF,
}


def refuse_what_changes_numbers(fields: JsonFields) -> None:
    """Raise ConfigError if a field has a value under which our arithmetic would not be the model's."""
    for name, harmless in HARMLESS_VALUES.items():
        if fields.raw(name) not in harmless:
            raise ConfigError(f"{fields.source}: {name!r} is not supported; use a checkpoint without it.")
