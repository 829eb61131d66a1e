"""What a checkpoint is, in our words; the only reader of Hugging Face field names. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from quire.config import ConfigError
from quire.models.fp8_checkpoint import Fp8Checkpoint, read_fp8
from quire.models.json_fields import JsonFields, is_integer
from quire.models.refused_fields import refuse_what_changes_numbers
from quire.models.rope_config import RopeConfig, read_rope

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
LayerWindows = tuple[int | None, ...]

MAX_HEADS = 2**16
MAX_LAYERS = 10_000
MAX_POSITIONS = 2**24
"""Positions are multiplied with frequencies in float32, which counts no further."""

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_CHECKPOINT_DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and arithmetic of one decoder-only language model."""

    architecture: str
    """One of SUPPORTED_ARCHITECTURES."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    """Longest sequence the model can be run on, in tokens; RoPE scaling is counted in (see rope_config.read_rope)."""
    norm_eps: float
    activation: Activation
    rope: RopeConfig | None
    """None: learned position embeddings (GPT-2)."""
    tie_word_embeddings: bool
    attention_bias: bool
    """Whether the attention projections have biases, where the architecture leaves that open (Llama, Qwen3)."""
    mlp_bias: bool
    """The same of the MLP (Llama)."""
    layer_windows: LayerWindows
    """Sliding window of each layer, in tokens, the query's own included; None sees all."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    checkpoint_dtype: str
    """dtype named by the checkpoint: "float32" (also if it names none), "bfloat16", "float16" or "float64"."""
    fp8: Fp8Checkpoint | None = None
    """How weights that are stored in fp8 are scaled; None: none are."""

    @property
    def uniform_window(self) -> int | None:
        """The sliding window, if every layer has the same one."""
        return self.layer_windows[0] if len(set(self.layer_windows)) == 1 else None

    @classmethod
    def from_hf(cls, directory: str | Path) -> ModelConfig:
        """Read config.json, and generation_config.json if there is one, as transformers 4 or 5 writes them.

        What a file leaves out has transformers' default where that is one for the whole family. Code in the directory
        (`auto_map`) is never run.

        Raises:
            ConfigError: a file or field is missing or odd, or the model needs what we do not compute.
        """
        fields = JsonFields.read(Path(directory) / "config.json")
        generation_path = Path(directory) / "generation_config.json"
        generation = JsonFields.read(generation_path) if generation_path.is_file() else JsonFields("", {})
        architecture = _architecture(fields)
        refuse_what_changes_numbers(fields)
        return replace(_READERS[architecture](architecture, fields, generation), fp8=read_fp8(fields))


@dataclass(frozen=True, slots=True)
class _Family:
    """What the Llama-like families read differently."""

    model_type: str
    windows: Callable[[JsonFields, int], LayerWindows]
    has_attention_bias: bool = False
    has_mlp_bias: bool = False
    needs_num_kv_heads: bool = True
    default_head_dim: int | None = None
    """None: hidden_size / num_heads."""


def _architecture(fields: JsonFields) -> str:
    names = fields.raw("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or name not in _READERS:
        raise ConfigError(
            f"{fields.source}: architecture {json.dumps(name or names)[:80]} is not supported; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}."
        )
    return name


def _read_llama_like(family: _Family, architecture: str, fields: JsonFields, generation: JsonFields) -> ModelConfig:
    _check_model_type(fields, family.model_type)
    num_heads = fields.integer("num_attention_heads", high=MAX_HEADS)
    if family.needs_num_kv_heads and "num_key_value_heads" not in fields:
        raise fields.missing("num_key_value_heads")
    num_kv_heads = fields.optional_integer("num_key_value_heads", high=MAX_HEADS) or num_heads
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"must divide 'num_attention_heads' {num_heads}")
    hidden_size = fields.integer("hidden_size")
    head_dim = fields.optional_integer("head_dim", high=MAX_HEADS) or family.default_head_dim
    if head_dim is None:
        head_dim = _share(fields, "num_attention_heads", "hidden_size")
    rope, longest = read_rope(fields, head_dim, fields.integer("max_position_embeddings", high=MAX_POSITIONS))
    if longest > MAX_POSITIONS:
        raise ConfigError(f"{fields.source}: RoPE scaled to {longest:.3g} positions is not possible; lower its factor.")
    num_layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    vocab_size = fields.integer("vocab_size")
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=longest,
        norm_eps=fields.optional_number("rms_norm_eps", 1e-20) or 1e-6,
        activation=_activation(fields, "hidden_act", "silu"),
        rope=rope,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=_bias(fields, "attention_bias", family.has_attention_bias),
        mlp_bias=_bias(fields, "mlp_bias", family.has_mlp_bias),
        layer_windows=family.windows(fields, num_layers),
        eos_token_ids=_eos_token_ids(fields, generation, vocab_size),
        bos_token_id=_bos_token_id(fields, generation, vocab_size),
        checkpoint_dtype=_checkpoint_dtype(fields),
    )


def _read_gpt2(architecture: str, fields: JsonFields, generation: JsonFields) -> ModelConfig:
    _check_model_type(fields, "gpt2")
    hidden_size = fields.integer("n_embd")
    num_heads = fields.integer("n_head", high=MAX_HEADS)
    num_layers = fields.integer("n_layer", high=MAX_LAYERS)
    vocab_size = fields.integer("vocab_size")
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.optional_integer("n_inner") or 4 * hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=_share(fields, "n_head", "n_embd"),
        max_position_embeddings=fields.integer("n_positions", high=MAX_POSITIONS),
        norm_eps=fields.optional_number("layer_norm_epsilon", 1e-20) or 1e-5,
        activation=_activation(fields, "activation_function", "gelu_new"),
        rope=None,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
        attention_bias=True,
        mlp_bias=True,
        layer_windows=(None,) * num_layers,
        eos_token_ids=_eos_token_ids(fields, generation, vocab_size),
        bos_token_id=_bos_token_id(fields, generation, vocab_size),
        checkpoint_dtype=_checkpoint_dtype(fields),
    )


def _check_model_type(fields: JsonFields, model_type: str) -> None:
    if fields.optional_string("model_type") not in (None, model_type):
        raise fields.error("model_type", f"must be {model_type!r} for this architecture")


def _share(fields: JsonFields, heads_name: str, size_name: str) -> int:
    """Size of one head where the heads share the hidden size."""
    heads, size = fields.integer(heads_name), fields.integer(size_name)
    if size % heads:
        raise fields.error(heads_name, f"must divide {size_name!r} {size}")
    return size // heads


def _no_windows(fields: JsonFields, num_layers: int) -> LayerWindows:
    for name, expected in (("sliding_window", None), ("layer_types", ["full_attention"] * num_layers)):
        if fields.raw(name) not in (None, expected):
            raise fields.error(name, "must be null for Llama; sliding windows need MistralForCausalLM")
    return (None,) * num_layers


def _mistral_windows(fields: JsonFields, num_layers: int) -> LayerWindows:
    window = _window(fields)
    kind = "full_attention" if window is None else "sliding_attention"
    if fields.raw("layer_types") not in (None, [kind] * num_layers):
        raise fields.error("layer_types", f"must be {kind!r} in every layer, as 'sliding_window' says for Mistral")
    return (window,) * num_layers


def _qwen_windows(fields: JsonFields, num_layers: int) -> LayerWindows:
    window = _window(fields) if fields.boolean("use_sliding_window", False) else None
    kinds = fields.raw("layer_types")
    if kinds is None:
        first = fields.integer("max_window_layers", 0) if window is not None else 0
        return tuple(window if index >= first else None for index in range(num_layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in known for kind in kinds):
        raise fields.error("layer_types", f"must list {' or '.join(known)} for each of {num_layers} layers")
    if window is None and "sliding_attention" in kinds:
        raise fields.error("layer_types", "names sliding layers without 'use_sliding_window' and 'sliding_window'")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _window(fields: JsonFields) -> int | None:
    return fields.optional_integer("sliding_window") if "sliding_window" in fields else 4096


def _activation(fields: JsonFields, name: str, default: str) -> Activation:
    given = fields.optional_string(name) or default
    if given not in _ACTIVATIONS:
        raise fields.error(name, f"must be one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[given]


def _bias(fields: JsonFields, name: str, allowed: bool) -> bool:
    bias = fields.boolean(name, False)
    if bias and not allowed:
        raise fields.error(name, "must be false for this architecture")
    return bias


def _eos_token_ids(fields: JsonFields, generation: JsonFields, vocab_size: int) -> tuple[int, ...]:
    source = generation if generation.raw("eos_token_id") is not None else fields
    value = source.raw("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(is_integer(token_id) and 0 <= token_id < vocab_size for token_id in ids):
        raise source.error("eos_token_id", f"must lie in the vocabulary, 0 to {vocab_size - 1}")
    return tuple(dict.fromkeys(ids))


def _bos_token_id(fields: JsonFields, generation: JsonFields, vocab_size: int) -> int | None:
    source = generation if generation.raw("bos_token_id") is not None else fields
    return source.optional_integer("bos_token_id", 0, vocab_size - 1)


def _checkpoint_dtype(fields: JsonFields) -> str:
    name = "dtype" if fields.raw("dtype") is not None else "torch_dtype"
    dtype = (fields.optional_string(name) or "float32").removeprefix("torch.")
    if dtype not in _CHECKPOINT_DTYPES:
        raise fields.error(name, f"must be one of {', '.join(_CHECKPOINT_DTYPES)}")
    return dtype


_LLAMA = _Family("llama", _no_windows, has_attention_bias=True, has_mlp_bias=True, needs_num_kv_heads=False)
_MISTRAL = _Family("mistral", _mistral_windows)
_QWEN2 = _Family("qwen2", _qwen_windows)
_QWEN3 = _Family("qwen3", _qwen_windows, has_attention_bias=True, default_head_dim=128)

_READERS: dict[str, Callable[[str, JsonFields, JsonFields], ModelConfig]] = {
    "GPT2LMHeadModel": _read_gpt2,
    "LlamaForCausalLM": partial(_read_llama_like, _LLAMA),
    "MistralForCausalLM": partial(_read_llama_like, _MISTRAL),
    "Qwen2ForCausalLM": partial(_read_llama_like, _QWEN2),
    "Qwen3ForCausalLM": partial(_read_llama_like, _QWEN3),
}
SUPPORTED_ARCHITECTURES = tuple(_READERS)
