"""Which architecture of config.json is built by what; one line for each."""

from __future__ import annotations

from collections.abc import Callable

from quire.models.config import ModelConfig
from quire.models.gpt2 import GPT2
from quire.models.llama import build_llama
from quire.models.mistral import build_mistral
from quire.models.model import Model
from quire.models.qwen2 import build_qwen2
from quire.models.qwen3 import build_qwen3
from quire.models.weights import Weights

MODELS: dict[str, Callable[[ModelConfig, Weights, int], Model]] = {
    "GPT2LMHeadModel": GPT2,
    "LlamaForCausalLM": build_llama,
    "MistralForCausalLM": build_mistral,
    "Qwen2ForCausalLM": build_qwen2,
    "Qwen3ForCausalLM": build_qwen3,
}
"""Called with the configuration, the weights to take from, and the number of positions that will be used."""
