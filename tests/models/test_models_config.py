"""ModelConfig.from_hf: what transformers writes is understood; what is missing, odd or not computed is said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quire.config import ConfigError
from quire.models.config import SUPPORTED_ARCHITECTURES, ModelConfig
from quire.models.registry import MODELS
from quire.models.rope_config import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "eos_token_id": 2,
    "bos_token_id": 1,
    "torch_dtype": "bfloat16",
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "eos_token_id": 50256,
}
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., ModelConfig]:
    def read(config: dict[str, Any] | str, generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
        text = config if isinstance(config, str) else json.dumps(config | changes)
        (tmp_path / "config.json").write_text(text)
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return ModelConfig.from_hf(tmp_path)

    return read


Read = Callable[..., ModelConfig]


def test_every_supported_architecture_has_a_model() -> None:
    assert set(SUPPORTED_ARCHITECTURES) == set(MODELS)


def test_llama(read: Read) -> None:
    config = read(LLAMA)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (4, 8, 2, 64)
    assert config.rope == RopeConfig(theta=10000.0, rotary_dim=64)
    assert config.norm_eps == 1e-5
    assert not config.tie_word_embeddings
    assert config.checkpoint_dtype == "bfloat16"
    assert config.layer_windows == (None,) * 4
    assert config.uniform_window is None
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)


PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": LLAMA
    | {
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_size": 4096,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "pretraining_tp": 1,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "SmolLM2-135M": LLAMA
    | {
        "hidden_size": 576,
        "is_llama_config": True,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
    },
    "Yarn-Llama-2-7b-64k": LLAMA
    | {
        "auto_map": {"AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM"},
        "rope_scaling": {"factor": 16.0, "finetuned": True, "original_max_position_embeddings": 4096, "type": "yarn"},
    },
    "Qwen2.5-0.5B": QWEN2
    | {
        "hidden_size": 896,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "Qwen3-0.6B": QWEN3
    | {
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 1024,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "gpt2": GPT2
    | {
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_fields_of_published_checkpoints(read: Read, name: str) -> None:
    config = read(PUBLISHED[name])
    lengths = {"Yarn-Llama-2-7b-64k": 65536, "gpt2": 1024}
    assert config.max_position_embeddings == lengths.get(name, PUBLISHED[name].get("max_position_embeddings"))
    assert config.uniform_window is None


def test_gpt2_and_its_defaults(read: Read) -> None:
    config = read(GPT2)
    assert (config.head_dim, config.intermediate_size, config.activation) == (64, 3072, "gelu_tanh")
    assert config.tie_word_embeddings
    assert config.rope is None
    assert config.checkpoint_dtype == "float32"


def test_fields_left_out(read: Read) -> None:
    llama = {name: value for name, value in LLAMA.items() if name not in ("num_key_value_heads", "rms_norm_eps")}
    assert read(llama).num_kv_heads == 8
    assert read(llama).norm_eps == 1e-6
    assert read(QWEN3).head_dim == 128
    assert read(QWEN3, head_dim=64).head_dim == 64
    assert read(LLAMA, head_dim=None).head_dim == 64
    assert read(LLAMA, torch_dtype=None, dtype="float16").checkpoint_dtype == "float16"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_what_transformers_5_writes(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    config = ModelConfig.from_hf(tiny_checkpoint(family))
    assert config.eos_token_ids == (2,)
    assert config.bos_token_id == 1


def test_end_of_sequence_of_the_generation_config_wins(read: Read) -> None:
    config = read(LLAMA, generation={"eos_token_id": [5, 7, 5]})
    assert config.eos_token_ids == (5, 7)
    assert config.bos_token_id == 1


@pytest.mark.parametrize(
    ("config", "changes", "windows"),
    [
        (MISTRAL, {}, (4096,) * 4),
        (MISTRAL, {"sliding_window": None}, (None,) * 4),
        (MISTRAL, {"sliding_window": 64, "layer_types": [SLIDING] * 4}, (64,) * 4),
        (QWEN2, {"sliding_window": 64, "use_sliding_window": False}, (None,) * 4),
        (QWEN2, {"sliding_window": 64}, (None,) * 4),
        (QWEN2, {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 64)),
        (QWEN2, {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}, (64,) * 4),
        (
            QWEN3,
            {"sliding_window": 64, "use_sliding_window": True, "layer_types": [FULL, SLIDING, FULL, SLIDING]},
            (None, 64, None, 64),
        ),
    ],
)
def test_sliding_windows(read: Read, config: Any, changes: Any, windows: Any) -> None:
    found = read(config, **changes)
    assert found.layer_windows == windows
    assert found.uniform_window == (windows[0] if len(set(windows)) == 1 else None)


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_rope_of_transformers_4_and_5(read: Read, field: str) -> None:
    linear = read(LLAMA, **{field: {"type": "linear", "factor": 4}}, rope_theta=5e5)
    assert linear.rope == RopeConfig(5e5, 64, LinearScaling(4.0))
    assert linear.max_position_embeddings == 16384
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "rope_theta": 1e6}
    yarn = read(LLAMA, **{field: scaling}, max_position_embeddings=8192, rope_theta=5)
    assert yarn.rope is not None
    assert yarn.rope.theta == 1e6
    assert yarn.rope.scaling == YarnScaling(4.0, 4096, 32.0, 1.0, True)
    assert yarn.max_position_embeddings == 16384
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = read(LLAMA, **{field: {**llama3, "original_max_position_embeddings": 1024}})
    assert config.rope == RopeConfig(1e4, 64, Llama3Scaling(8.0, 1024, 1.0, 4.0))
    assert config.max_position_embeddings == 4096


def test_rope_that_depends_on_the_length_is_served_up_to_where_it_does_not(read: Read) -> None:
    assert read(LLAMA, rope_scaling={"type": "dynamic", "factor": 4}).max_position_embeddings == 4096
    factors = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 1024, **factors}
    assert read(LLAMA, rope_scaling=scaling).max_position_embeddings == 1024


def test_partial_rotary_factor(read: Read) -> None:
    assert read(LLAMA, partial_rotary_factor=0.5).rope == RopeConfig(1e4, 32)
    assert read(LLAMA, rope_parameters={"partial_rotary_factor": 0.25}).rope == RopeConfig(1e4, 16)


@pytest.mark.parametrize("required", [name for name in LLAMA if name in MISTRAL and LLAMA[name] == MISTRAL[name]])
def test_a_missing_field_is_named_or_has_a_default(read: Read, required: str) -> None:
    config = {name: value for name, value in MISTRAL.items() if name != required}
    if required in ("rms_norm_eps", "hidden_act", "eos_token_id", "bos_token_id", "torch_dtype"):
        read(config)
        return
    with pytest.raises(ConfigError, match=f"no '{required}'"):
        read(config)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LLAMA, {"architectures": ["BertModel"]}, '"BertModel" is not supported; supported: GPT2LMHeadModel, Llama'),
        (LLAMA, {"architectures": None}, "supported: GPT2LMHeadModel"),
        (LLAMA, {"architectures": ["LlamaForCausalLM", "X"]}, "supported: GPT2LMHeadModel"),
        (LLAMA, {"model_type": "llama4_text"}, "'model_type' must be 'llama'"),
        (LLAMA, {"vocab_size": 0}, "'vocab_size' must be an integer from 1"),
        (LLAMA, {"vocab_size": True}, "'vocab_size' must be an integer"),
        (LLAMA, {"hidden_size": "512"}, "'hidden_size' must be an integer"),
        (LLAMA, {"num_hidden_layers": 10**9}, "'num_hidden_layers' must be an integer from 1 to 10000"),
        (LLAMA, {"max_position_embeddings": 10**12}, "'max_position_embeddings' must be"),
        (LLAMA, {"num_key_value_heads": 3}, "must divide 'num_attention_heads' 8"),
        (LLAMA, {"num_attention_heads": 7, "num_key_value_heads": 7}, "must divide 'hidden_size' 512"),
        (LLAMA, {"rms_norm_eps": 0}, "'rms_norm_eps' must be a number"),
        (LLAMA, {"hidden_act": "xielu"}, "'hidden_act' must be one of silu"),
        (LLAMA, {"tie_word_embeddings": "yes"}, "must be true or false"),
        (LLAMA, {"torch_dtype": "int8"}, "'torch_dtype' must be one of"),
        (LLAMA, {"eos_token_id": 32000}, "'eos_token_id' must lie in the vocabulary, 0 to 31999"),
        (LLAMA, {"eos_token_id": [1, "2"]}, "'eos_token_id' must lie"),
        (LLAMA, {"bos_token_id": -1}, "'bos_token_id' must be"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "weights in 'gptq' are not supported"),
        (LLAMA, {"alibi": True}, "'alibi' is not supported"),
        (LLAMA, {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' is not supported"),
        (LLAMA, {"num_local_experts": 8}, "'num_local_experts' is not supported"),
        (LLAMA, {"logits_scaling": 8.0}, "'logits_scaling' is not supported"),
        (LLAMA, {"is_causal": False}, "'is_causal' is not supported"),
        (LLAMA, {"sliding_window": 64}, "'sliding_window' must be null for Llama"),
        (LLAMA, {"layer_types": [SLIDING] * 4}, "'layer_types' must be null for Llama"),
        (MISTRAL, {"attention_bias": True}, "'attention_bias' must be false"),
        (MISTRAL, {"sliding_window": 64, "layer_types": [FULL, SLIDING] * 2}, "must be 'sliding_attention' in every"),
        (QWEN2, {"layer_types": [SLIDING] * 4}, "names sliding layers without"),
        (QWEN2, {"layer_types": [FULL] * 3}, "for each of 4 layers"),
        (QWEN2, {"layer_types": ["chunked_attention"] * 4}, "for each of 4 layers"),
        (QWEN2, {"use_sliding_window": True}, "no 'max_window_layers'"),
        (LLAMA, {"head_dim": 63}, "must be even"),
        (LLAMA, {"rope_scaling": [1]}, "'rope_scaling' must be an object"),
        (LLAMA, {"rope_scaling": {"rope_type": "mrope"}}, "RoPE of type 'mrope' is not supported; known: default"),
        (LLAMA, {"rope_scaling": {"mrope_section": [1, 2]}}, "'mrope_section' is not supported for RoPE"),
        (LLAMA, {"rope_parameters": {FULL: {}, SLIDING: {}}}, "'full_attention' is not supported for RoPE"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "no 'factor'"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0.5}}, "'factor' must be a number from 1"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 1e300}}, "lower its factor"),
        (LLAMA, {"rope_scaling": {"type": "llama3", "factor": 8}}, "no 'low_freq_factor'"),
        (LLAMA, {"rope_scaling": {"type": "longrope", "short_factor": [1]}}, "must be a list of 32"),
        (LLAMA, {"rope_theta": -1}, "'rope_theta' must be a number"),
        (LLAMA, {"rope_theta": 10**400}, "'rope_theta' must be a number"),
        (GPT2, {"n_head": 7}, "must divide 'n_embd' 768"),
        (GPT2, {"scale_attn_weights": False}, "'scale_attn_weights' is not supported"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' is not supported"),
        (GPT2, {"add_cross_attention": True}, "'add_cross_attention' is not supported"),
        ("[]", {}, "not a JSON object"),
        ("{", {}, "not a JSON object"),
        ('{"a": 1, "a": 2}', {}, "not a JSON object"),
        ("[" * 100_000, {}, "not a JSON object"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(read: Read, config: Any, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read(config, **changes)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_odd_generation_config(read: Read) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json: 'eos_token_id' must lie in the vocabulary"):
        read(LLAMA, generation={"eos_token_id": "hot"})


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        ModelConfig.from_hf(tmp_path)


def test_the_front_process_can_read_it_without_torch() -> None:
    code = "import sys, quire.models.config, quire.models.hub; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
