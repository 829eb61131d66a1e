"""Token for token the same as transformers, float32 and greedy, however the work is cut into steps and pages."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quire.config import EngineConfig
from quire.engine.engine import Engine
from quire.sampling_params import SamplingParams
from quire.scheduler.request import Request
from quire.tales import MODEL_DIR

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gpt2", "tales"]
WINDOWED = {"mistral": {"sliding_window": 11}}
PROMPT_LENGTHS = (1, 3, 16, 17, 45, 70)
CROWDED_LENGTHS = (14, 15, 16, 13, 12, 16)
"""One block each at first and three at the end: more than a pool of CROWDED_BLOCKS holds."""
CROWDED_BLOCKS = 10
NUM_OUTPUT_TOKENS = 24
MAX_MODEL_LEN = 128

TinyCheckpoint = Callable[..., Path]


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoint) -> Path:
    family, overrides = request.param
    return MODEL_DIR if family == "tales" else tiny_checkpoint(family, **overrides)


def each_family(*names: str, **overrides: Any) -> pytest.MarkDecorator:
    cases = [(name, WINDOWED.get(name, {}) | overrides if name in WINDOWED else overrides) for name in names]
    return pytest.mark.parametrize("checkpoint", cases, ids=names, indirect=True)


@lru_cache(maxsize=4)
def reference(
    directory: Path, lengths: tuple[int, ...] = PROMPT_LENGTHS, ignore_eos: bool = False
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and what transformers makes of each by itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if ignore_eos:
        model.generation_config.eos_token_id = None
    rng = random.Random(7)
    prompts = [[rng.randrange(3, model.config.vocab_size) for _ in range(length)] for length in lengths]
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            generated = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=transformers.GenerationConfig(
                    do_sample=False,
                    max_new_tokens=NUM_OUTPUT_TOKENS,
                    eos_token_id=model.generation_config.eos_token_id,
                    pad_token_id=0,
                ),
            )
        outputs.append(generated[0, len(prompt) :].tolist())
    return prompts, outputs


def make_engine(directory: Path, **options: Any) -> Engine:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": MAX_MODEL_LEN,
        "num_blocks": 128,
        "max_num_seqs": 8,
    }
    return Engine(EngineConfig(model=str(directory), **(settings | options)))


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams | None = None) -> list[list[int]]:
    params = params or SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS)
    outputs: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    for index, prompt in enumerate(prompts):
        engine.add(
            Request(
                request_id=str(index),
                prompt_token_ids=prompt,
                params=params,
                seed=index,
                eos_token_ids=tuple(engine.info.eos_token_ids),
            )
        )
    while engine.has_work():
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
        engine.check_integrity()
    assert engine.stats().num_used_blocks == 0
    return list(outputs.values())


@each_family(*FAMILIES)
@pytest.mark.parametrize("block_size", [16, 32])
def test_batch_of_mixed_lengths(checkpoint: Path, block_size: int) -> None:
    prompts, expected = reference(checkpoint)
    assert run(make_engine(checkpoint, block_size=block_size), prompts) == expected


@each_family(*FAMILIES)
@pytest.mark.parametrize("budget", [1, 7, 64])
def test_chunked_prefill(checkpoint: Path, budget: int) -> None:
    prompts, expected = reference(checkpoint)
    assert run(make_engine(checkpoint, max_num_batched_tokens=budget), prompts) == expected


@each_family("llama")
@pytest.mark.parametrize("target", [1e-3, 1000.0])
def test_a_target_for_the_time_between_tokens(checkpoint: Path, target: float) -> None:
    prompts, expected = reference(checkpoint)
    assert run(make_engine(checkpoint, target_itl_ms=target), prompts) == expected


@each_family("llama")
def test_requests_that_arrive_together_and_begin_alike(checkpoint: Path) -> None:
    prompts, expected = reference(checkpoint)
    engine = make_engine(checkpoint, max_num_batched_tokens=64)
    thrice = [run(engine, [prompt] * 3) for prompt in prompts]
    assert thrice == [[output] * 3 for output in expected]
    block_size = engine.info.block_size
    num_shared = sum((len(prompt) - 1) // block_size * block_size for prompt in prompts)
    assert engine.stats().prefix_cache_hits == 2 * num_shared


@each_family(*FAMILIES)
def test_warm_prefix_cache(checkpoint: Path) -> None:
    prompts, expected = reference(checkpoint)
    engine = make_engine(checkpoint)
    assert run(engine, prompts) == expected
    cold_hits = engine.stats().prefix_cache_hits
    assert run(engine, prompts) == expected
    assert engine.stats().prefix_cache_hits > cold_hits
    engine.reset_prefix_cache()
    assert run(engine, prompts) == expected


@each_family(*FAMILIES)
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_forced_preemption(checkpoint: Path, prefix_caching: bool) -> None:
    prompts, expected = reference(checkpoint, CROWDED_LENGTHS, True)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    engine = make_engine(checkpoint, num_blocks=CROWDED_BLOCKS, enable_prefix_caching=prefix_caching)
    assert run(engine, prompts, params) == expected
    assert engine.stats().num_preemptions > 0


@each_family(*FAMILIES)
def test_prompts_only_whole(checkpoint: Path) -> None:
    prompts, expected = reference(checkpoint)
    engine = make_engine(checkpoint, enable_chunked_prefill=False, max_num_batched_tokens=MAX_MODEL_LEN)
    assert run(engine, prompts) == expected


@each_family("mistral")
def test_window_shorter_than_the_prompt_frees_blocks(checkpoint: Path) -> None:
    """Window 11: a sequence of 94 tokens needs two or three blocks at a time, never six."""
    prompts, expected = reference(checkpoint)
    engine = make_engine(checkpoint, max_num_batched_tokens=16, num_blocks=8, max_model_len=100)
    assert run(engine, prompts[-1:], None) == expected[-1:]


@each_family(*FAMILIES)
def test_a_seed_gives_the_same_tokens_alone_in_a_batch_and_after_preemption(checkpoint: Path) -> None:
    prompts, _ = reference(checkpoint, CROWDED_LENGTHS, True)
    params = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    together = run(make_engine(checkpoint), prompts, params)
    crowded = make_engine(checkpoint, num_blocks=CROWDED_BLOCKS)
    assert run(crowded, prompts, params) == together
    assert crowded.stats().num_preemptions > 0
    engine = make_engine(checkpoint, max_num_seqs=1)
    assert run(engine, prompts, params) == together


@pytest.mark.parametrize(
    "options",
    [
        {
            "repetition_penalty": 1.2,
            "presence_penalty": 0.4,
            "frequency_penalty": 0.3,
            "logit_bias": {9: 2.0, 11: -5.0},
        },
        {"typical_p": 0.8, "min_p": 0.01, "bad_word_token_ids": ((9,), (11, 12), (13,)), "min_tokens": 5},
        {"allowed_token_ids": tuple(range(20, 300)), "top_k": 30, "logprobs": 3, "num_speculative_tokens": 3},
    ],
    ids=["penalties", "masks", "drafts"],
)
@each_family("llama", "tales")
def test_no_option_makes_tokens_depend_on_neighbours_or_preemption(checkpoint: Path, options: dict[str, Any]) -> None:
    prompts, _ = reference(checkpoint, CROWDED_LENGTHS, True)
    params = SamplingParams(temperature=0.9, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True, **options)
    together = run(make_engine(checkpoint), prompts, params)
    crowded = make_engine(checkpoint, num_blocks=CROWDED_BLOCKS)
    assert run(crowded, prompts, params) == together
    assert crowded.stats().num_preemptions > 0
    assert run(make_engine(checkpoint, max_num_seqs=1), prompts, params) == together
