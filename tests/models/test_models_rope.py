"""RoPE tables equal those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from quire.models.config import ModelConfig
from quire.models.layers.rope import cos_sin_table, inverse_frequencies

NUM_POSITIONS = 512
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.3 * index for index in range(16)],
    "long_factor": [30.0] * 16,
}
PARAMETERS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 1000000},
    {"rope_type": "linear", "factor": 4},
    {"rope_type": "dynamic", "factor": 2.7},
    YARN,
    YARN | {"rope_theta": 1e6, "beta_fast": 16, "beta_slow": 2.0},
    YARN | {"attention_factor": 0.83},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    YARN | {"truncate": False},
    YARN | {"original_max_position_embeddings": 4},
    LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 3.0, "rope_theta": 5e5},
    LONGROPE | {"original_max_position_embeddings": 512},
    LONGROPE | {"original_max_position_embeddings": 512, "factor": 4.0},
    LONGROPE | {"original_max_position_embeddings": 512, "attention_factor": 1.3},
]


def read(directory: Path, **fields: Any) -> tuple[ModelConfig, transformers.LlamaConfig]:
    shape = {"vocab_size": 8, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 32}
    fields = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512, **shape, **fields}
    fields |= {"bos_token_id": None, "eos_token_id": None}
    (directory / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **fields}))
    return ModelConfig.from_hf(directory), transformers.LlamaConfig(**json.loads(json.dumps(fields)))


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_table_equals_transformers(parameters: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = read(tmp_path, rope_parameters={"rope_theta": 10000.0, **parameters})
    table = cos_sin_table(ours.rope, NUM_POSITIONS, torch.device("cpu"))
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(NUM_POSITIONS)[None])
    expected = torch.cat((cos[0, :, :16], sin[0, :, :16]), dim=-1)
    torch.testing.assert_close(table, expected, rtol=0, atol=4e-5)  # positions times an ulp of the frequency
    reference, _ = (
        (LlamaRotaryEmbedding(theirs).inv_freq, 1.0)
        if parameters["rope_type"] == "default"
        else ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs)
    )
    assert ours.rope is not None
    torch.testing.assert_close(inverse_frequencies(ours.rope), reference, rtol=3e-7, atol=0)


def test_fields_of_transformers_4_mean_the_same(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    old, theirs = read(tmp_path, rope_scaling=scaling, rope_theta=5e5)
    new, _ = read(tmp_path, rope_parameters={**YARN, "rope_theta": 5e5})
    assert old.rope == new.rope
    assert old.rope is not None
    torch.testing.assert_close(inverse_frequencies(old.rope), LlamaRotaryEmbedding(theirs).inv_freq, rtol=3e-7, atol=0)


@pytest.mark.parametrize("rope_type", ["linear", "yarn", "llama3"])
def test_partial_rotary_factor(rope_type: str, tmp_path: Path) -> None:
    parameters = {"rope_type": rope_type, "factor": 4.0, "partial_rotary_factor": 0.5, "rope_theta": 1e4}
    if rope_type == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if rope_type != "linear":
        parameters["original_max_position_embeddings"] = 64
    ours, theirs = read(tmp_path, rope_parameters=parameters)
    reference, _ = ROPE_INIT_FUNCTIONS[rope_type](theirs)
    assert ours.rope is not None
    assert ours.rope.rotary_dim == 16
    torch.testing.assert_close(inverse_frequencies(ours.rope), reference, rtol=3e-7, atol=0)


def test_a_model_without_rope_has_no_table() -> None:
    with pytest.raises(ValueError, match="no rotary positions"):
        cos_sin_table(None, 8, torch.device("cpu"))
