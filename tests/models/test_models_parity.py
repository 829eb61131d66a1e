"""Logits and greedy tokens equal transformers' in float32, whatever the pages and the chunks."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

TOLERANCE = 1e-4
PROMPT_LENGTHS = {"one": 1, "short": 5, "page": 8, "long": 45}
NUM_NEW_TOKENS = 10

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e3, "factor": 8.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 256}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases, one KV head": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama, heads wider than the hidden size, gelu": ("llama", {"head_dim": 24, "hidden_act": "gelu"}),
    "llama in shards": ("llama", {"max_shard_size": "40KB"}),
    "llama, linear RoPE": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama, dynamic RoPE": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}}),
    "llama, llama3 RoPE": ("llama", {"rope_parameters": {**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}),
    "llama, YaRN": ("llama", {"rope_parameters": YARN}),
    "llama, LongRoPE": (
        "llama",
        {"rope_parameters": {**LONGROPE, "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [9.0] * 8}},
    ),
    "mistral": ("mistral", {}),
    "mistral, window shorter than the prompt": ("mistral", {"sliding_window": 11}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows from layer 1": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 tied, windows by layer": (
        "qwen3",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3 tied, stored in bfloat16": ("qwen3", {"tie_word_embeddings": True, "dtype": "bfloat16"}),
    "llama stored in float16": ("llama", {"dtype": "float16"}),
    "gpt2 stored in bfloat16": ("gpt2", {"dtype": "bfloat16"}),
    "gpt2": ("gpt2", {}),
    "gpt2, untied, wide": ("gpt2", {"tie_word_embeddings": False, "n_inner": 80, "activation_function": "relu"}),
}


@pytest.fixture(params=CASES)
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Path:
    family, overrides = CASES[request.param]
    return tiny_checkpoint(family, **overrides)


def prompts() -> dict[str, list[int]]:
    rng = random.Random(11)
    return {name: [rng.randrange(3, 320) for _ in range(length)] for name, length in PROMPT_LENGTHS.items()}


@lru_cache(maxsize=1)
def transformers_model(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def expected_logits(directory: Path, sequences: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """[tokens, vocab_size] of each sequence, from transformers."""
    model = transformers_model(directory)
    with torch.inference_mode():
        return {name: model(torch.tensor([tokens])).logits[0] for name, tokens in sequences.items()}


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """NaN if a logit is NaN."""
    return float(torch.stack([(found[name] - expected[name]).abs().max() for name in expected]).max())


def test_logits_of_every_prompt_token(checkpoint: Path, paged_runner: Callable[..., Any]) -> None:
    sequences = prompts()
    error = largest_error(
        paged_runner(checkpoint).step(sequences, every_token=True), expected_logits(checkpoint, sequences)
    )
    assert error < TOLERANCE


def generate(runner: Any, sequences: dict[str, list[int]], chunk: int) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Greedy continuations, and the logits of every sampled token; prompts are cut into chunks of different lengths."""
    tokens = {name: list(prompt) for name, prompt in sequences.items()}
    logits: dict[str, list[torch.Tensor]] = {name: [] for name in sequences}
    while any(len(logits[name]) < NUM_NEW_TOKENS for name in sequences):
        work = {}
        for index, name in enumerate(sequences):
            start = runner.lengths.get(name, 0)
            if len(logits[name]) < NUM_NEW_TOKENS:
                work[name] = tokens[name][start : start + chunk + index]
        for name, row in runner.step(work).items():
            if runner.lengths[name] == len(tokens[name]):
                logits[name].append(row)
                tokens[name].append(int(row.argmax()))
    return tokens, {name: torch.stack(rows) for name, rows in logits.items()}


@pytest.mark.parametrize("chunk", [3, 100])
def test_greedy_tokens_with_chunked_prefill(checkpoint: Path, paged_runner: Callable[..., Any], chunk: int) -> None:
    sequences = prompts()
    tokens, logits = generate(paged_runner(checkpoint), sequences, chunk)
    expected = expected_logits(checkpoint, {name: tokens[name][:-1] for name in tokens})
    sampled = {name: rows[len(sequences[name]) - 1 :] for name, rows in expected.items()}
    assert largest_error(logits, sampled) < TOLERANCE
    assert {name: rows.argmax(-1).tolist() for name, rows in sampled.items()} == {
        name: tokens[name][len(sequences[name]) :] for name in tokens
    }


@pytest.mark.parametrize(
    ("family", "overrides", "wrong"),
    [
        ("mistral", {"sliding_window": 11}, {"sliding_window": 12}),
        ("llama", {}, {"rms_norm_eps": 1e-4}),
        ("llama", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10100.0}}),
        ("qwen3", {}, {"hidden_act": "gelu"}),
        ("gpt2", {}, {"activation_function": "gelu"}),
    ],
)
def test_the_comparison_notices_a_small_fault(
    family: str,
    overrides: dict[str, Any],
    wrong: dict[str, Any],
    tiny_checkpoint: Callable[..., Path],
    paged_runner: Callable[..., Any],
) -> None:
    sequences = prompts()
    found = paged_runner(tiny_checkpoint(family, **{**overrides, **wrong})).step(sequences, every_token=True)
    assert largest_error(found, expected_logits(tiny_checkpoint(family, **overrides), sequences)) > 10 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_half_precision_stays_near_float32(
    family: str, dtype: torch.dtype, tiny_checkpoint: Callable[..., Path], paged_runner: Callable[..., Any]
) -> None:
    """The file is float32 or half, the model half: the same logits but for rounding."""
    sequences = prompts()
    directory = tiny_checkpoint(family)
    expected = expected_logits(directory, sequences)["long"]
    for stored in (directory, tiny_checkpoint(family, dtype=str(dtype).removeprefix("torch."))):
        found = paged_runner(stored, dtype).step(sequences, every_token=True)["long"]
        difference = (found - expected).norm() / expected.norm()
        assert difference < {torch.bfloat16: 0.06, torch.float16: 0.008}[dtype]
