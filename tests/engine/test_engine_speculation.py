"""Drafts change how many steps it takes, and nothing else: the tokens with them are the tokens without."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.config import EngineConfig, SpeculativeConfig
from quire.engine.engine import Engine
from quire.engine.sample_rows import SampleRows
from quire.engine.sampling_options import make_row
from quire.engine.token_masks import ban_tokens
from quire.engine.tokenizer import Tokenizer
from quire.sampling_params import SamplingParams
from quire.scheduler.output import SchedulerStats
from quire.scheduler.request import Request
from quire.tales import MODEL_DIR

MODELS = ["tales", "llama", "mistral", "qwen3", "gpt2"]
NUM_PROMPTS = {"tales": 80, "llama": 30, "mistral": 30, "qwen3": 30, "gpt2": 30}
"""200 prompts."""
NUM_OUTPUT_TOKENS = 40
MAX_MODEL_LEN = 160
SPECULATION = SpeculativeConfig(num_speculative_tokens=4, max_ngram=3, min_ngram=1)
PHRASES = (
    "the king said to the fox:",
    "once there was a bird",
    "go home, said the wolf,",
    "and she wept",
    "the dog ran",
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS)
SAMPLED = SamplingParams(temperature=0.7, top_k=30, top_p=0.95, max_tokens=NUM_OUTPUT_TOKENS)

TinyCheckpoint = Callable[..., Path]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoint) -> tuple[str, Path]:
    """Name and directory; mistral has a window shorter than most prompts."""
    name = request.param
    if name == "tales":
        return name, MODEL_DIR
    return name, tiny_checkpoint(name, **({"sliding_window": 11} if name == "mistral" else {}))


@lru_cache
def prompts_of(name: str, directory: Path) -> list[list[int]]:
    """Every other one repeats itself."""
    rng = random.Random(name)
    tokenizer = Tokenizer(directory)
    prompts = []
    for index in range(NUM_PROMPTS[name]):
        phrases = rng.choices(PHRASES, k=2 + index % 3)
        text = " ".join(phrases * 2 + phrases[:1]) if index % 2 else " ".join(phrases)
        prompts.append(tokenizer.encode(text)[: MAX_MODEL_LEN - NUM_OUTPUT_TOKENS])
    return prompts


def generate(
    directory: Path, prompts: list[list[int]], params: SamplingParams, **options: Any
) -> tuple[list[tuple[list[int], str | None]], SchedulerStats]:
    """Of each choice of each prompt: tokens and how it ended."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": MAX_MODEL_LEN,
        "num_blocks": 256,
        "max_num_seqs": 16,
    }
    engine = Engine(EngineConfig(model=str(directory), **(settings | options)))
    told: dict[tuple[str, int], tuple[list[int], str | None]] = {}
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
        told |= {(str(index), choice_index): ([], None) for choice_index in range(params.n)}
    while engine.has_work():
        for output in engine.step():
            key = (output.request_id, output.choice_index)
            told[key] = (told[key][0] + output.token_ids, output.finish_reason)
        engine.check_integrity()
    return list(told.values()), engine.stats()


@pytest.fixture(scope="module")
def without_drafts() -> Iterator[Callable[..., list[tuple[list[int], str | None]]]]:
    """What each model answers without drafts, in one large batch; kept, for several tests compare with it."""
    answers: dict[object, list[tuple[list[int], str | None]]] = {}

    def answer(model: tuple[str, Path], params: SamplingParams) -> list[tuple[list[int], str | None]]:
        key = (model, repr(params))
        if key not in answers:
            answers[key], stats = generate(model[1], prompts_of(*model), params)
            assert stats.num_draft_steps == 0
        return answers[key]

    return answer


Without = Callable[..., list[tuple[list[int], str | None]]]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 8, "max_num_batched_tokens": 36},
        {"num_blocks": 26, "block_size": 8},
        {"num_blocks": 26, "block_size": 8, "enable_prefix_caching": False, "max_num_batched_tokens": 32},
    ],
    ids=["plain", "chunked", "preempted", "chunked-preempted-uncached"],
)
def test_the_same_tokens(
    model: tuple[str, Path], params: SamplingParams, options: dict[str, Any], without_drafts: Without
) -> None:
    answers, stats = generate(model[1], prompts_of(*model), params, speculative_config=SPECULATION, **options)
    assert answers == without_drafts(model, params)
    assert 0 < stats.num_accepted_tokens <= stats.num_drafted_tokens
    windowed = model[0] == "mistral"  # its sequences hold three blocks each, so that even 26 are enough for all
    assert (stats.num_preemptions > 0) == ("num_blocks" in options and not windowed)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_stop_tokens_and_least_length(model: tuple[str, Path], temperature: float, without_drafts: Without) -> None:
    """Stops are what the model says most, so that they fall among drafts."""
    params = replace(GREEDY, temperature=temperature, ignore_eos=True)
    said = [token_id for token_ids, _ in without_drafts(model, params) for token_id in token_ids[10:]]
    frequent = sorted(set(said), key=said.count)[-3:]
    params = replace(params, stop_token_ids=tuple(frequent), min_tokens=8)
    answers, stats = generate(model[1], prompts_of(*model), params, speculative_config=SPECULATION)
    assert answers == without_drafts(model, params)
    assert all(len(token_ids) > 8 and not {*token_ids[:8]} & {*frequent} for token_ids, _ in answers)
    assert {finish_reason for _, finish_reason in answers} >= {"stop"}
    assert stats.num_draft_steps > 0


def test_choices_each_have_their_own_drafts(model: tuple[str, Path]) -> None:
    params = replace(SAMPLED, n=3)
    prompts = prompts_of(*model)[:12]
    expected, _ = generate(model[1], prompts, params)
    answers, stats = generate(model[1], prompts, params, speculative_config=SPECULATION, num_blocks=64)
    assert answers == expected
    assert stats.num_accepted_tokens > 0


def test_a_request_asks_for_drafts_where_the_server_has_none() -> None:
    prompts = prompts_of("tales", MODEL_DIR)[:8]
    params = replace(GREEDY, num_speculative_tokens=3)
    expected, plain = generate(MODEL_DIR, prompts, GREEDY)
    answers, stats = generate(MODEL_DIR, prompts, params)
    assert answers == expected
    assert stats.num_accepted_tokens > 0
    assert stats.num_steps < plain.num_steps


def test_early_stops_are_masked_by_position() -> None:
    class Asked:
        token_ids = (7, 7, 7)
        num_output_tokens = 1
        stop_token_ids = frozenset({2})

        class request:
            params = SamplingParams(min_tokens=3)

    logits = torch.zeros(4, 5)
    rows = SampleRows([Asked()] * 4, {1: [7], 2: [7, 7], 3: [7, 7, 7]})  # type: ignore[list-item]
    asked = [make_row(index, Asked(), rows.drafts.get(index, [])) for index in range(4)]  # type: ignore[arg-type]
    ban_tokens(logits, asked, set())
    assert logits[:, 2].isinf().tolist() == [True, True, False, False]
    assert rows.positions().tolist() == [3, 4, 5, 6]
