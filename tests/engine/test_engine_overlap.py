"""Scheduling ahead changes no token: an engine on a device that computes late, against one that waits for each step."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from quire import LLM, SamplingParams
from quire.engine.best_of import engine_params
from quire.engine.inputs import InputBuilder
from quire.engine.llm import RequestOutput
from quire.engine.tokenizer import with_bad_word_ids
from quire.grammar import Grammar
from quire.models.forward_batch import ForwardBatch
from quire.scheduler.block_manager import BlockManager
from quire.scheduler.output import FinishReason, ScheduledBatch, TokenLogProbs
from quire.scheduler.request import Request
from tests.engine.fake_device import on_fake_device

TEXTS = (
    "Once upon a time there was a king who had a daughter, and",
    "The fox said to the wolf",
    "In a far country",
    "A poor woodcutter went into the forest every day to cut wood for the fire, and one morning he found",
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.1, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.9, "n": 3},
    {"temperature": 0.7, "n": 2, "best_of": 3},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.9, "logprobs": 0, "n": 2},
    {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 1},
    {"temperature": 0.0, "stop": (" the",)},
    {"temperature": 0.9, "stop": ("ing", ".")},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 0.9, "min_tokens": 6},
    {"temperature": 0.9, "logit_bias": {17: 3.0, 300: -5.0}},
    {"temperature": 0.0, "bad_words": ("king",)},
    {"temperature": 0.0, "grammar": Grammar("regex", "( [a-z]{2,5}){3,9}\\.")},
    {"use_beam_search": True, "n": 2, "best_of": 3, "temperature": 0.0},
    {"use_beam_search": True, "n": 1, "best_of": 2, "temperature": 0.0, "stop": (" and",), "logprobs": 1},
    {"temperature": 0.0, "num_speculative_tokens": 3},
    {"temperature": 1.0, "typical_p": 0.8},
    {"temperature": 0.0, "max_tokens": 1},
)
SETTINGS: dict[str, dict[str, Any]] = {
    "room": {"num_blocks": 300},
    "few blocks": {"num_blocks": 22, "max_num_seqs": 9},
    "small steps": {"num_blocks": 60, "max_num_batched_tokens": 16, "max_num_seqs": 6},
    "no cache": {"num_blocks": 40, "enable_prefix_caching": False},
}


TOLERANCE = 1e-4
NUM_SEEDS = 3


def make_llm(*, max_model_len: int = 160, **settings: Any) -> LLM:
    return LLM(dtype="float32", device="cpu", max_model_len=max_model_len, block_size=8, num_threads=1, **settings)


def draw(rng: random.Random, count: int) -> tuple[list[str], list[SamplingParams]]:
    """Texts that begin alike, some of them more than once, and all options."""
    texts, params = [], []
    for index in range(count):
        text = rng.choice(TEXTS)
        texts.append(text if rng.random() < 0.5 else text[: rng.randrange(8, len(text))])
        options = OPTIONS[index % len(OPTIONS)]
        params.append(SamplingParams(**{"max_tokens": rng.randrange(6, 40), "seed": index} | options))
    return texts, params


def without_numbers(entries: list[TokenLogProbs] | None) -> list[TokenLogProbs]:
    return [replace(entry, log_prob=0.0, top_log_probs=[]) for entry in entries or []]


def words(result: RequestOutput) -> tuple[Any, ...]:
    """All but log-probabilities, and what the cache had, which depends on who was done when."""
    outputs = [replace(output, cumulative_logprob=None, logprobs=None) for output in result.outputs]
    ids = [without_numbers(output.logprobs) for output in result.outputs]
    return outputs, ids, without_numbers(result.prompt_logprobs)


def numbers(result: RequestOutput) -> list[float]:
    """In the order of their words. Decoding and computing again what was preempted differ in the last bits."""
    lists = [result.prompt_logprobs, *(output.logprobs for output in result.outputs)]
    values = [value for entries in lists for entry in entries or [] for value in (entry.log_prob, *entry.top_log_probs)]
    return values + [output.cumulative_logprob or 0.0 for output in result.outputs]


@pytest.fixture(scope="module", params=SETTINGS)
def llms(request: pytest.FixtureRequest) -> tuple[LLM, LLM]:
    """One that waits for each step, and one that schedules ahead."""
    settings = SETTINGS[request.param]
    return make_llm(**settings), make_llm(**settings, async_scheduling=True)


def test_overlapped_tokens_are_the_plain_tokens(llms: tuple[LLM, LLM]) -> None:
    plain, overlapped = llms
    marks: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        texts, params = draw(random.Random(seed), 3 * len(OPTIONS))
        expected = plain.generate(texts, params)
        with on_fake_device(overlapped._engine, seed) as counted:
            found = overlapped.generate(texts, params)
        marks += counted
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert words(one) == words(other), (seed, index, params[index])
            assert numbers(one) == pytest.approx(numbers(other), abs=TOLERANCE)
        overlapped._engine.check_integrity()
    assert marks["submitted before the last was computed"] > marks["steps"] / 4
    assert marks["completed before the one in front"] > marks["steps"] / 20
    assert not overlapped._engine.has_work()
    assert overlapped.stats().num_used_blocks == 0


@pytest.mark.parametrize("seed", [0, 1, 3])  # with 2 a draw lies on the border of two tokens, decided by a step's size
def test_steps_that_do_not_fit_change_no_token(llms: tuple[LLM, LLM], seed: int) -> None:
    """They are tried again, smaller, whatever they left behind."""
    plain, overlapped = llms
    texts, params = draw(random.Random(seed), 2 * len(OPTIONS))
    expected = plain.generate(texts, params)
    with on_fake_device(overlapped._engine, seed, shortage=0.3) as marks:
        found = overlapped.generate(texts, params)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert words(one) == words(other), (index, params[index])
        assert numbers(one) == pytest.approx(numbers(other), abs=TOLERANCE)
    overlapped._engine.check_integrity()
    assert marks["did not fit"] > 15
    assert marks["memory released"] == marks["did not fit"]


def test_a_step_that_cannot_be_smaller_ends_the_engine() -> None:
    llm = make_llm(num_blocks=100, async_scheduling=True)
    with (
        on_fake_device(llm._engine, 0, shortage=1.0, always_fit=0),
        pytest.raises(torch.OutOfMemoryError, match="cannot be smaller"),
    ):
        llm.generate(list(TEXTS), SamplingParams(max_tokens=4))


def test_a_missing_fence_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that end while a step is in flight, and prompts that are admitted into their blocks at once."""
    rng = random.Random(1)
    settings: dict[str, Any] = {"num_blocks": 10, "max_model_len": 48, "max_num_seqs": 4}
    settings["enable_prefix_caching"] = False
    prompts = [[rng.randrange(5, 2000) for _ in range(rng.randrange(9, 24))] for _ in range(60)]
    params = [
        SamplingParams(temperature=0.0, max_tokens=rng.randrange(4, 12), stop_token_ids=(14, 12)) for _ in prompts
    ]

    def generate() -> list[list[int]]:
        llm = make_llm(**settings, async_scheduling=True)
        with on_fake_device(llm._engine, 1, promptness=0.8):
            return [result.outputs[0].token_ids for result in llm.generate(prompts, params)]

    expected = [result.outputs[0].token_ids for result in make_llm(**settings).generate(prompts, params)]
    assert generate() == expected
    monkeypatch.setattr(BlockManager, "release", lambda self, sequence: sequence.block_table.release())
    assert generate() != expected


def test_inputs_that_are_overwritten_too_early_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of all steps in one place."""
    llm = make_llm(num_blocks=100, async_scheduling=True)
    texts, params = draw(random.Random(7), len(OPTIONS))

    def generate() -> list[tuple[Any, ...]]:
        with on_fake_device(llm._engine, 7):
            return [words(result) for result in llm.generate(texts, params)]

    expected = generate()
    build, positions = InputBuilder.build, torch.zeros(4096, dtype=torch.int64)

    def in_one_place(builder: InputBuilder, batch: ScheduledBatch) -> ForwardBatch:
        inputs = build(builder, batch)
        inputs.positions = positions[: len(inputs.positions)].copy_(inputs.positions)
        return inputs

    monkeypatch.setattr(InputBuilder, "build", in_one_place)
    assert generate() != expected


def test_without_a_device_of_its_own_a_cpu_runs_ahead_too() -> None:
    texts, params = draw(random.Random(5), 2 * len(OPTIONS))
    settings = SETTINGS["small steps"]
    expected = make_llm(**settings).generate(texts, params)
    found = make_llm(**settings, async_scheduling=True).generate(texts, params)
    assert [words(result) for result in found] == [words(result) for result in expected]


class Driver:
    """Adds, aborts and steps an engine by a script; what each choice was told."""

    def __init__(self, llm: LLM) -> None:
        self.engine = llm._engine
        self.told: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], FinishReason] = {}

    def add(self, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        eos = tuple(self.engine.info.eos_token_ids)
        self.engine.add(
            Request(request_id=request_id, prompt_token_ids=prompt, params=params, seed=3, eos_token_ids=eos)
        )

    def step(self) -> None:
        for output in self.engine.step():
            key = (output.request_id, output.choice_index)
            assert key not in self.ends
            self.told.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.ends[key] = output.finish_reason
        self.engine.check_integrity()

    def run(self, rng: random.Random, llm: LLM, num_requests: int, aborts: float) -> None:
        live: list[str] = []
        texts, params = draw(random.Random(1), num_requests)
        for index, (text, each) in enumerate(zip(texts, params, strict=True)):
            self.add(str(index), llm.tokenizer.encode(text), engine_params(with_bad_word_ids(each, llm.tokenizer)))
            live.append(str(index))
            for _ in range(rng.randrange(3)):
                self.step()
                if rng.random() < aborts:
                    self.engine.abort(rng.choice(live), rng.choice((None, 0, 1)))
        while self.engine.has_work():
            self.step()


def test_aborts_in_flight_leave_the_others_alone() -> None:
    plain, overlapped = make_llm(num_blocks=26), make_llm(num_blocks=26, async_scheduling=True)
    undisturbed, disturbed = Driver(plain), Driver(overlapped)
    undisturbed.run(random.Random(2), plain, 2 * len(OPTIONS), aborts=0.0)
    with on_fake_device(overlapped._engine, 2):
        disturbed.run(random.Random(2), overlapped, 2 * len(OPTIONS), aborts=0.4)
    assert 10 < len(disturbed.ends) < len(undisturbed.ends)
    for key, token_ids in disturbed.told.items():
        expected = undisturbed.told[key]
        assert token_ids == (expected if key in disturbed.ends else expected[: len(token_ids)])
        assert disturbed.ends.get(key) in (None, undisturbed.ends[key])
    assert overlapped.stats().num_used_blocks == 0


def test_a_failure_with_a_step_in_flight_ends_its_own_request_only() -> None:
    """Its row in the step ahead has no token to begin with, and is passed over."""
    plain, overlapped = make_llm(num_blocks=100), make_llm(num_blocks=100, async_scheduling=True)
    prompts = [plain.tokenizer.encode(text) for text in TEXTS]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    expected, found = Driver(plain), Driver(overlapped)
    for driver in (expected, found):
        for index, prompt in enumerate(prompts):
            driver.add(str(index), prompt, params)
    while expected.engine.has_work():
        expected.step()
    with on_fake_device(overlapped._engine, 3):
        choose, num_steps = overlapped._engine._sampler.choose, 0

        def broken(logits: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
            nonlocal num_steps
            num_steps += 1
            if num_steps == 6:
                logits[1] = torch.nan
            return choose(logits, *rest)

        overlapped._engine._sampler.choose = broken  # type: ignore[method-assign]
        while found.engine.has_work():
            found.step()
    assert found.ends.pop(("1", 0)) is FinishReason.ERROR
    assert found.told.pop(("1", 0)) == expected.told[("1", 0)][:5]
    assert found.told == {key: token_ids for key, token_ids in expected.told.items() if key != ("1", 0)}
    assert set(found.ends.values()) == {FinishReason.LENGTH}
