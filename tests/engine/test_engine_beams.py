"""Beam search against Hugging Face's `generate`, float32: sequences, order and scores."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quire.config import EngineConfig
from quire.engine.engine import Engine
from quire.sampling_params import SamplingParams
from quire.scheduler.output import TokenLogProbs
from quire.scheduler.request import AdmissionError, Request
from quire.tales import MODEL_DIR

CHECKPOINTS = ["tales", "llama", "qwen3"]
PROMPT_LENGTHS = (5, 17)
NUM_OUTPUT_TOKENS = 14
SCORE_TOLERANCE = 1e-4

TinyCheckpoint = Callable[..., Path]
Searched = list[tuple[list[int], float]]
"""Output tokens without end-of-sequence and padding, and score, of each returned beam."""


@dataclass
class Told:
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    log_prob: float | None = None
    log_probs: list[TokenLogProbs] = field(default_factory=list)


@lru_cache(maxsize=4)
def reference_model(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoint) -> Path:
    return MODEL_DIR if request.param == "tales" else tiny_checkpoint(request.param)


@lru_cache(maxsize=4)
def shared_engine(directory: Path) -> Engine:
    return make_engine(directory)


def make_prompts(directory: Path, lengths: tuple[int, ...] = PROMPT_LENGTHS) -> list[list[int]]:
    rng = random.Random(5)
    vocab_size = reference_model(directory).config.vocab_size
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths]


def reference(directory: Path, prompt: list[int], params: SamplingParams, eos_token_ids: list[int]) -> Searched:
    model = reference_model(directory)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=transformers.GenerationConfig(
                do_sample=False,
                num_beams=params.num_sequences,
                num_return_sequences=params.n,
                max_new_tokens=params.max_tokens,
                min_new_tokens=params.min_tokens or None,
                length_penalty=params.length_penalty,
                early_stopping=params.early_stopping,
                repetition_penalty=params.repetition_penalty,
                eos_token_id=eos_token_ids or None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
            ),
        )
    searched = []
    for row, score in zip(generated.sequences[:, len(prompt) :].tolist(), generated.sequences_scores, strict=True):
        ends = [index for index, token_id in enumerate(row) if token_id in eos_token_ids]
        searched.append((row[: ends[0] + 1] if ends else row, score.item()))
    return searched


def make_engine(directory: Path, **options: Any) -> Engine:
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 128,
        "num_blocks": 256,
        "max_num_seqs": 32,
    }
    return Engine(EngineConfig(model=str(directory), **(settings | options)))


def submit(engine: Engine, request_id: str, prompt: list[int], params: SamplingParams, eos: list[int]) -> None:
    engine.add(Request(request_id=request_id, prompt_token_ids=prompt, params=params, seed=3, eos_token_ids=tuple(eos)))


def drain(engine: Engine) -> dict[tuple[str, int], Told]:
    told: dict[tuple[str, int], Told] = {}
    while engine.has_work():
        for output in engine.step():
            choice = told.setdefault((output.request_id, output.choice_index), Told())
            assert choice.finish_reason is None
            choice.token_ids += output.token_ids
            choice.log_probs += output.log_probs or []
            choice.finish_reason = output.finish_reason
            choice.log_prob = output.cumulative_log_prob
        engine.check_integrity()
    assert engine.stats().num_used_blocks == 0
    return told


def compare(told: dict[tuple[str, int], Told], request_id: str, params: SamplingParams, expected: Searched) -> None:
    for index, (token_ids, score) in enumerate(expected):
        choice = told[request_id, index]
        assert choice.token_ids == token_ids, (request_id, index)
        assert choice.log_prob is not None
        assert choice.log_prob / len(token_ids) ** params.length_penalty == pytest.approx(score, abs=SCORE_TOLERANCE)


def beams(width: int, **fields: Any) -> SamplingParams:
    return SamplingParams(
        **{"use_beam_search": True, "n": width, "max_tokens": NUM_OUTPUT_TOKENS, "temperature": 0.0} | fields
    )


def likely_stops(directory: Path, prompts: list[list[int]]) -> list[int]:
    """Tokens that beams of these prompts really come across, so that an end of sequence is within reach."""
    found = [reference(directory, prompt, beams(4), [])[-1][0] for prompt in prompts]
    return [found[0][6], found[-1][3]]


@pytest.mark.parametrize("eos", ["reachable", "none"])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_beams_are_those_of_generate(
    checkpoint: Path, width: int, length_penalty: float, early_stopping: Any, eos: str
) -> None:
    prompts = make_prompts(checkpoint)
    eos_token_ids = likely_stops(checkpoint, prompts) if eos == "reachable" else []
    params = beams(width, length_penalty=length_penalty, early_stopping=early_stopping)
    engine = shared_engine(checkpoint)
    for index, prompt in enumerate(prompts):
        submit(engine, str(index), prompt, params, eos_token_ids)
    told = drain(engine)
    for index, prompt in enumerate(prompts):
        compare(told, str(index), params, reference(checkpoint, prompt, params, eos_token_ids))


CROWDED_LENGTHS = (14, 15, 16, 13)


@lru_cache(maxsize=4)
def crowd(directory: Path) -> tuple[list[list[int]], list[int], list[Searched]]:
    """Prompts, an end of sequence within reach, and the reference for width 4."""
    prompts = make_prompts(directory, CROWDED_LENGTHS)
    eos_token_ids = likely_stops(directory, prompts)
    return prompts, eos_token_ids, [reference(directory, prompt, beams(4), eos_token_ids) for prompt in prompts]


def run_crowd(engine: Engine, directory: Path) -> dict[tuple[str, int], Told]:
    """The searches of `crowd` among sampled and greedy requests, which finish as they would alone."""
    prompts, eos_token_ids, expected = crowd(directory)
    sampled = SamplingParams(temperature=1.0, top_p=0.9, n=2, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        submit(engine, f"sampled {index}", prompt, sampled, eos_token_ids)
        submit(engine, str(index), prompt, beams(4), eos_token_ids)
        submit(engine, f"greedy {index}", prompt[::-1], greedy, eos_token_ids)
    told = drain(engine)
    for index in range(len(prompts)):
        compare(told, str(index), beams(4), expected[index])
    return told


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 7}, {"max_num_batched_tokens": 1}, {"block_size": 32}],
    ids=str,
)
def test_among_sampled_and_greedy_requests(checkpoint: Path, options: dict[str, Any]) -> None:
    engine = make_engine(checkpoint, **options)
    first = run_crowd(engine, checkpoint)
    warm = run_crowd(engine, checkpoint)
    assert {key: each.token_ids for key, each in warm.items()} == {key: each.token_ids for key, each in first.items()}
    assert engine.stats().num_preemptions == 0


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_whole_groups_are_preempted_and_come_back(checkpoint: Path, prefix_caching: bool) -> None:
    """Room for all groups as they begin, not as they end."""
    prompts, _, _ = crowd(checkpoint)
    params = beams(4, max_tokens=40)
    engine = make_engine(checkpoint, num_blocks=18, enable_prefix_caching=prefix_caching)
    for index, prompt in enumerate(prompts):
        submit(engine, str(index), prompt, params, [])
    told = drain(engine)
    assert engine.stats().num_preemptions > 0
    for index, prompt in enumerate(prompts):
        compare(told, str(index), params, reference(checkpoint, prompt, params, []))


def test_a_window_shorter_than_the_text(tiny_checkpoint: TinyCheckpoint) -> None:
    checkpoint = tiny_checkpoint("mistral", sliding_window=11)
    prompts = make_prompts(checkpoint, (5, 30))
    engine = make_engine(checkpoint)
    for index, prompt in enumerate(prompts):
        submit(engine, str(index), prompt, beams(3), [])
    told = drain(engine)
    for index, prompt in enumerate(prompts):
        compare(told, str(index), beams(3), reference(checkpoint, prompt, beams(3), []))


@pytest.mark.parametrize("fields", [{"repetition_penalty": 1.3}, {"min_tokens": 6}, {"n": 2, "best_of": 5}], ids=str)
def test_options_mean_what_they_mean_to_generate(checkpoint: Path, fields: dict[str, Any]) -> None:
    prompts, eos_token_ids, _ = crowd(checkpoint)
    params = beams(4, **fields)
    engine = make_engine(checkpoint)
    for index, prompt in enumerate(prompts):
        submit(engine, str(index), prompt, params, eos_token_ids)
    told = drain(engine)
    for index, prompt in enumerate(prompts):
        compare(told, str(index), params, reference(checkpoint, prompt, params, eos_token_ids))
    assert len(told) == len(prompts) * params.n


def test_stop_strings_end_beams_as_in_generate() -> None:
    model, tokenizer = reference_model(MODEL_DIR), transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    prompt = tokenizer("Once upon a time")["input_ids"]
    stop = [", ", "king"]
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            tokenizer=tokenizer,
            generation_config=transformers.GenerationConfig(
                do_sample=False,
                num_beams=4,
                num_return_sequences=4,
                max_new_tokens=NUM_OUTPUT_TOKENS,
                pad_token_id=0,
                stop_strings=stop,
                return_dict_in_generate=True,
                output_scores=True,
            ),
        )
    engine = make_engine(MODEL_DIR)
    submit(engine, "stop", prompt, beams(4, stop=tuple(stop)), [])
    told = drain(engine)
    assert any(each.finish_reason == "stop" for each in told.values())
    for index, (row, score) in enumerate(
        zip(generated.sequences[:, len(prompt) :].tolist(), generated.sequences_scores, strict=True)
    ):
        choice = told["stop", index]
        assert choice.token_ids == row[: len(choice.token_ids)]
        assert not any(row[len(choice.token_ids) :])
        assert choice.log_prob / len(choice.token_ids) == pytest.approx(score.item(), abs=SCORE_TOLERANCE)


def test_log_probs_of_beams_are_raw_and_add_up(checkpoint: Path) -> None:
    prompts, eos_token_ids, expected = crowd(checkpoint)
    engine = make_engine(checkpoint)
    submit(engine, "scored", prompts[0], beams(4, logprobs=3), eos_token_ids)
    told = drain(engine)
    compare(told, "scored", beams(4), expected[0])
    for choice in told.values():
        assert [each.token_id for each in choice.log_probs] == choice.token_ids
        assert sum(each.log_prob for each in choice.log_probs) == pytest.approx(choice.log_prob, abs=1e-4)
        assert all(len(each.top_token_ids) == 3 for each in choice.log_probs)


def test_certain_tokens_of_the_first_choice_are_told_early(checkpoint: Path) -> None:
    prompts, _, _ = crowd(checkpoint)
    engine = make_engine(checkpoint)
    submit(engine, "beams", prompts[1], beams(2, max_tokens=40), [])
    num_early = 0
    while engine.has_work():
        for output in engine.step():
            num_early += len(output.token_ids) if output.finish_reason is None else 0
    assert num_early > 0


def test_a_beam_search_that_cannot_fit_is_refused(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, num_blocks=9, max_num_seqs=8)
    with pytest.raises(AdmissionError, match="4 beams"):
        submit(engine, "large", [5] * 20, beams(4, max_tokens=20), [])
    submit(engine, "fits", [5] * 20, beams(4, max_tokens=13), [])
    told = drain(engine)
    assert all(len(each.token_ids) == 13 for each in told.values())
    with pytest.raises(AdmissionError, match="at most 8"):
        submit(engine, "wide", [5] * 20, beams(9), [])


def test_an_aborted_search_leaves_nothing(checkpoint: Path) -> None:
    engine = make_engine(checkpoint)
    submit(engine, "left", [5] * 20, beams(4), [])
    for _ in range(5):
        engine.step()
    engine.abort("left", 1)
    engine.step()
    assert engine.has_work()
    engine.abort("left")
    assert not engine.has_work()
    engine.check_integrity()
    assert engine.stats().num_used_blocks == 0
