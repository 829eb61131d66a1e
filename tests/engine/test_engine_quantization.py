"""Weights of 8 and 4 bits end to end: how far the model moves, and that a request's tokens stay its own."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quire import LLM, SamplingParams
from quire.config import ConfigError, EngineConfig, Quantization
from quire.engine import device
from quire.engine.engine import Engine
from quire.kernels.quantized_linear import dequantize, quantize
from quire.models.fp8_checkpoint import Fp8Checkpoint
from quire.tales import MODEL_DIR

TinyCheckpoint = Callable[..., Path]
TALE = (
    "Once upon a time there was a king who had three daughters, and the youngest was so fair that the sun himself, who "
    "had seen so much, wondered each time that he shone upon her face. Near the castle lay a great dark forest, and in "
    "the forest, under an old lime-tree, was a well. When the day was hot, the king's child went out into the forest "
    "and sat down by the side of the cool well; and when she was tired she took a golden ball, threw it up and caught "
    "it again, and this ball was her favourite plaything. One day an old woman came to the door of the house and "
    "begged for a piece of bread. The wicked brother drove her away, but the good brother gave her all that he had, "
    "and she said: Since you have been kind to me, I will give you a ring, and whenever you turn it upon your finger "
    "you shall have whatever you wish for. So he went on his way and came to a great city, where everybody was "
    "mourning because a dragon with seven heads was to have the king's daughter on the morrow."
)
COSTS = {"int8": 0.01, "int4": 0.05}
each_quantization = pytest.mark.parametrize("quantization", ["int8", "int4"])


def make(directory: Path, quantization: Quantization | None, **options: Any) -> LLM:
    settings = {"device": "cpu", "num_blocks": 128, "max_num_seqs": 8, "max_model_len": 128}
    return LLM(directory, quantization=quantization, **(settings | options))


def generate(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def log_probs(llm: LLM, prompt: list[int]) -> torch.Tensor:
    (output,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(prompt) - 1
    return torch.tensor([entry.log_prob for entry in output.prompt_logprobs])


@each_quantization
def test_what_it_costs_in_perplexity(quantization: Quantization) -> None:
    options = {"dtype": "float32", "max_model_len": 512}
    plain = make(MODEL_DIR, None, **options).perplexity(TALE).perplexity
    rounded = make(MODEL_DIR, quantization, **options).perplexity(TALE).perplexity
    assert rounded != plain
    assert abs(rounded / plain - 1) < COSTS[quantization]


@each_quantization
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_is_the_model_with_the_rounded_weights(
    family: str, quantization: Quantization, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """Log-probabilities as those of the checkpoint whose weights are what the integers stand for."""
    directory = tmp_path / family
    shutil.copytree(tiny_checkpoint(family, tie_word_embeddings=family == "qwen2"), directory)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and "wpe" not in name:
            is_table = any(part in name for part in ("embed_tokens", "lm_head", "wte"))
            is_transposed = family == "gpt2" and not is_table
            stored = tensor.t() if is_transposed else tensor
            whole = dequantize(quantize(stored, 8 if is_table or quantization == "int8" else 4))
            tensors[name] = (whole.t() if is_transposed else whole).contiguous()
    prompt = list(range(3, 60))
    found = log_probs(make(directory, quantization, dtype="float32"), prompt)
    unrounded = log_probs(make(directory, None, dtype="float32"), prompt)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    expected = log_probs(make(directory, None, dtype="float32"), prompt)
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-3)  # inputs are rounded to 16 bits
    assert (found - unrounded).abs().max() > 5e-2  # else the tolerance would see no difference


@each_quantization
def test_tokens_do_not_depend_on_the_batch_or_on_how_prompts_are_cut(quantization: Quantization) -> None:
    prompts = [[(7 * i + j) % 4000 + 3 for j in range(length)] for i, length in enumerate((1, 3, 17, 45, 70))]
    together = generate(make(MODEL_DIR, quantization), prompts)
    alone = make(MODEL_DIR, quantization)
    assert [generate(alone, [prompt])[0] for prompt in prompts] == together
    chunked = make(MODEL_DIR, quantization, max_num_batched_tokens=16, enable_prefix_caching=False)
    assert generate(chunked, prompts) == together


@each_quantization
def test_the_start_says_what_the_weights_are(quantization: Quantization) -> None:
    plain, rounded = make(MODEL_DIR, None).info, make(MODEL_DIR, quantization).info
    assert (plain.quantization, rounded.quantization) == (None, quantization)
    line = rounded.memory_budget[0]
    assert f" {quantization}" in line
    plain_mib, mib = (float(info.memory_budget[0].split()[1]) for info in (plain, rounded))
    assert mib < {"int8": 0.55, "int4": 0.33}[quantization] * plain_mib * (2 if plain.dtype == "float32" else 1)


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="--quantization must be int8 or int4 or fp8, not 'fp4'"):
        EngineConfig(model="x", quantization="fp4")  # type: ignore[arg-type]


def test_is_refused_on_a_gpu() -> None:
    config = EngineConfig(model="x", quantization="int4")
    with pytest.raises(ConfigError, match="--quantization int4 is for CPUs; on a GPU leave it out"):
        device.choose_quantization(config, torch.device("cuda"))


GPU = torch.device("cuda")
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("found", "code_dtype", "message"),
    [
        (torch.device("cpu"), FP8, "--quantization fp8 is for GPUs; on a CPU use --quantization int8"),
        (GPU, None, "this GPU has no products of fp8.*leave it out"),
        (GPU, FP8, None),
        (GPU, torch.float8_e4m3fnuz, None),
    ],
    ids=str,
)
def test_fp8_is_for_gpus_that_multiply_it(
    found: torch.device, code_dtype: torch.dtype | None, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "code_dtype", lambda _: code_dtype)
    config = EngineConfig(model="x", quantization="fp8")
    if message is None:
        assert device.choose_quantization(config, found) == "fp8"
        return
    with pytest.raises(ConfigError, match=message):
        device.choose_quantization(config, found)


@pytest.mark.parametrize(
    ("found", "code_dtype", "block", "why"),
    [
        (GPU, FP8, None, None),
        (GPU, None, None, "this GPU has no products of fp8"),
        (GPU, FP8, (128, 128), "their scales are of blocks; --quantization fp8 rounds them again"),
        (torch.device("cpu"), FP8, None, "this CPU has no products of fp8"),
    ],
    ids=str,
)
def test_what_becomes_of_weights_stored_in_fp8_is_said(
    found: torch.device,
    code_dtype: torch.dtype | None,
    block: tuple[int, int] | None,
    why: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(device, "code_dtype", lambda _: code_dtype)
    config = EngineConfig(model="x")
    assert not device.keeps_fp8_weights(config, None, torch.bfloat16, found)
    with caplog.at_level(logging.WARNING):
        assert device.keeps_fp8_weights(config, Fp8Checkpoint(block), torch.bfloat16, found) == (why is None)
    expected = [] if why is None else [f"the weights are stored in fp8 and are read as bfloat16: {why}."]
    assert caplog.messages == expected


def test_an_fp8_checkpoint_runs_on_a_cpu(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the model that its weights stand for, rounded to 8 bits or not."""
    for name in ("fp8", "meant"):
        shutil.copytree(tiny_checkpoint("llama"), tmp_path / name)
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    meant = dict(tensors)
    for name, weight in list(tensors.items()):
        if name.endswith("_proj.weight"):
            scale = weight.abs().max() / 448
            tensors[name] = (weight / scale).to(FP8)
            tensors[f"{name}_scale"] = scale
            meant[name] = tensors[name].float() * scale
    save_file(tensors, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    save_file(meant, tmp_path / "meant" / "model.safetensors", {"format": "pt"})
    path = tmp_path / "fp8" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    prompt = list(range(3, 60))
    for quantization in (None, "int8"):
        found = log_probs(make(tmp_path / "fp8", quantization, dtype="float32"), prompt)
        assert "the weights are stored in fp8 and are read as float32" in caplog.text
        assert torch.equal(found, log_probs(make(tmp_path / "meant", quantization, dtype="float32"), prompt))


def test_a_processor_without_products_of_bytes_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(model="x", quantization="int8")
    for is_fast, num_warnings in ((True, 0), (False, 1)):
        monkeypatch.setattr(device, "is_fast_here", lambda is_fast=is_fast: is_fast)
        with caplog.at_level(logging.WARNING):
            assert device.choose_quantization(config, torch.device("cpu")) == "int8"
        assert len(caplog.records) == num_warnings


def test_a_dtype_that_the_processor_does_not_multiply_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cases = {("bfloat16", True): 0, ("bfloat16", False): 1, ("float16", True): 1, ("float32", False): 0}
    for (name, is_native), num_warnings in cases.items():
        monkeypatch.setattr(device, "cpu_has_bfloat16", lambda is_native=is_native: is_native)
        caplog.clear()
        config = EngineConfig(model="x", dtype=name)  # type: ignore[arg-type]
        with caplog.at_level(logging.WARNING):
            assert device.choose_dtype(config, "bfloat16", torch.device("cpu")) == getattr(torch, name)
        assert len(caplog.records) == num_warnings
        assert all("--dtype float32 is faster" in record.message for record in caplog.records)


def test_a_quantized_checkpoint_and_weights_that_are_not_finite(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint("llama"), directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    settings = {"model": str(directory), "device": "cpu", "quantization": "int8", "num_blocks": 8}
    with pytest.raises(ConfigError, match="weight must be finite; load the model without it"):
        Engine(EngineConfig(**settings))  # type: ignore[arg-type]
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ConfigError, match="weights in 'gptq' are not supported; use a checkpoint in fp8"):
        Engine(EngineConfig(**settings))  # type: ignore[arg-type]
