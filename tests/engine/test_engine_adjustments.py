"""Penalties, biases, masks and log-probabilities through the whole sampler, against the definitions."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from quire.config import SchedulerConfig
from quire.engine.grammar.factory import GrammarFactory
from quire.engine.sampler import Sampler
from quire.sampling_params import SamplingParams
from quire.scheduler.output import SampledTokens, ScheduledBatch
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler
from quire.tales import MODEL_DIR

VOCAB_SIZE = 60
EOS = 3
PROMPT = [5, 6, 7, 5, 9]
OUTPUT = [11, 12, 11, 5]
NUM_DRAWS = 20_000


@dataclass
class Row:
    """One sequence with OUTPUT behind PROMPT, about to sample; `logits` are what the model says."""

    params: SamplingParams
    logits: npt.NDArray[np.float64]

    def adjusted(self) -> npt.NDArray[np.float64]:
        params, logits = self.params, self.logits.copy()
        if params.use_beam_search:
            logits -= np.log(np.exp(logits).sum())
        for token_id in set(PROMPT + OUTPUT):
            factor = params.repetition_penalty
            logits[token_id] = logits[token_id] / factor if logits[token_id] > 0 else logits[token_id] * factor
        for token_id in set(OUTPUT):
            logits[token_id] -= params.presence_penalty + params.frequency_penalty * OUTPUT.count(token_id)
        for token_id, bias in params.logit_bias.items():
            logits[token_id] += bias
        if params.allowed_token_ids is not None:
            logits[[token_id for token_id in range(VOCAB_SIZE) if token_id not in params.allowed_token_ids]] = -np.inf
        for word in params.bad_word_token_ids:
            if (PROMPT + OUTPUT)[len(PROMPT + OUTPUT) - len(word) + 1 :] == list(word[:-1]):
                logits[word[-1]] = -np.inf
        if len(OUTPUT) < params.min_tokens:
            logits[[EOS, *params.stop_token_ids]] = -np.inf
        return logits


OPTIONS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.9},
    {"frequency_penalty": -0.5, "presence_penalty": -0.5},
    {"logit_bias": {5: 3.0, 20: -100.0, 21: 2.5}},
    {"allowed_token_ids": (4, 5, 11, 40)},
    {"bad_word_token_ids": ((11, 5, 30), (5, 31), (32,), (12, 5, 33))},
    {"min_tokens": 5, "stop_token_ids": (8,), "logit_bias": {EOS: 9.0, 8: 9.0}},
    {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": {30: 2.0},
        "min_tokens": 9,
    },
    {"repetition_penalty": 1.3, "allowed_token_ids": (5, 11, 12, 30, 31), "bad_word_token_ids": ((5, 31),), "top_k": 3},
    {"frequency_penalty": 0.7, "top_p": 0.8, "temperature": 0.7, "min_p": 0.02},
    {"presence_penalty": 1.0, "typical_p": 0.8, "temperature": 1.3},
]


def make_batch(all_params: list[SamplingParams]) -> ScheduledBatch:
    """A batch in which each request has PROMPT and OUTPUT and samples its next token."""
    most = 16 * len(all_params)
    config = SchedulerConfig(num_blocks=4 * most, max_num_seqs=most, max_num_batched_tokens=8 * most, max_model_len=64)
    scheduler = Scheduler(config)
    for seed, params in enumerate(all_params):
        scheduler.add(
            Request(request_id=str(seed), prompt_token_ids=PROMPT, params=params, seed=seed, eos_token_ids=(EOS,))
        )
    batch = scheduler.schedule()
    for token_id in OUTPUT:
        assert batch is not None
        for sequence in batch.sequences:  # as the scheduler would: for beams, which would need candidates
            if sequence.token_ids is sequence.request.prompt_token_ids:
                sequence.token_ids = list(sequence.token_ids)
            sequence.token_ids.append(token_id)
    assert batch is not None
    return batch


def make_logits(num_rows: int, seed: int = 1) -> torch.Tensor:
    return (torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 1.5).repeat(num_rows, 1)


def make_sampler(num_rows: int) -> Sampler:
    return Sampler(num_rows, GrammarFactory(MODEL_DIR, VOCAB_SIZE, (EOS,)))


def sample(sampler: Sampler, logits: torch.Tensor, batch: ScheduledBatch) -> SampledTokens:
    plan = sampler.plan(batch)
    return sampler.read(plan, sampler.choose(logits, plan))


def with_defaults(options: dict[str, Any]) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 40} | options))


def probabilities(row: Row) -> npt.NDArray[np.float64]:
    """What follows the temperature, from the definitions."""
    params = row.params
    scaled = row.adjusted() / params.temperature
    kept = np.isfinite(scaled)

    def current() -> npt.NDArray[np.float64]:
        exponentials = np.where(kept, np.exp(scaled - scaled[kept].max()), 0.0)
        return exponentials / exponentials.sum()

    def keep_best(order: npt.NDArray[np.int64], mass: float) -> None:
        p = current()
        before = np.cumsum(p[order]) - p[order]
        best = np.zeros_like(kept)
        best[order[before < mass]] = True
        kept[:] &= best

    if params.typical_p < 1.0:
        p = current()
        surprise = -np.log(np.where(p > 0, p, 1.0))
        distance = np.where(p > 0, np.abs(surprise - (p * surprise).sum()), np.inf)
        keep_best(np.argsort(distance, kind="stable"), params.typical_p)
    if params.top_k > 0:
        kept &= scaled >= np.sort(np.where(kept, scaled, -np.inf))[-params.top_k]
    if params.top_p < 1.0:
        keep_best(np.argsort(-current(), kind="stable"), params.top_p)
    if params.min_p:
        p = current()
        kept &= p >= params.min_p * p.max()
    return current()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_distribution_is_exact(options: dict[str, Any]) -> None:
    """By chi-square over many seeds, in batches that hold all the other options too."""
    params = with_defaults(options)
    others = [with_defaults(each) for each in OPTIONS if each is not options]
    num_rows = 1000
    row = Row(params, make_logits(1)[0].double().numpy())
    observed = np.zeros(VOCAB_SIZE)
    batch = make_batch([params] * num_rows + others)
    sampler = make_sampler(16 * (num_rows + len(others)))
    for _ in range(NUM_DRAWS // num_rows):
        sampled = sample(sampler, make_logits(num_rows + len(others)), batch)
        drawn = [token_id for token_id in sampled.token_ids[:num_rows] if token_id is not None]
        assert len(drawn) == num_rows
        observed += np.bincount(drawn, minlength=VOCAB_SIZE)
        reseed(batch)
    expected = probabilities(row) * observed.sum()
    assert not observed[expected == 0].any()
    common = expected >= 5
    statistic = ((observed[common] - expected[common]) ** 2 / expected[common]).sum()
    rare = expected[~common].sum()
    if rare > 0:
        statistic += (observed[~common].sum() - rare) ** 2 / rare
    degrees = max(int(common.sum()), 1)
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.719 * (2 / (9 * degrees)) ** 0.5) ** 3


def reseed(batch: ScheduledBatch) -> None:
    """The same sequences of other requests: each with a seed of its own, which the sampler reads anew."""
    for sequence in batch.sequences:
        sequence.request = replace(sequence.request, seed=sequence.request.seed + 100_000)
    order = batch.sequences[:]
    rows = [sequence.row for sequence in order]
    for sequence, row in zip(order, rows[1:] + rows[:1], strict=True):
        sequence.row = row


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_greedy_takes_the_best_of_what_is_left(options: dict[str, Any]) -> None:
    params = with_defaults(options | {"temperature": 0.0})
    sampled = sample(make_sampler(64), make_logits(1), make_batch([params]))
    assert sampled.token_ids == [Row(params, make_logits(1)[0].double().numpy()).adjusted().argmax()]


def test_penalties_are_those_of_transformers() -> None:
    for penalty in (0.7, 1.4):
        logits = make_logits(1)
        ids = torch.tensor([PROMPT + OUTPUT])
        expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
        batch = make_batch([with_defaults({"repetition_penalty": penalty, "temperature": 0.0})])
        sample(make_sampler(64), logits, batch)
        assert torch.equal(logits, expected)
    bad_words = [[11, 5, 30], [5, 31], [32]]
    processor = transformers.NoBadWordsLogitsProcessor(bad_words, eos_token_id=torch.tensor([EOS]))
    logits = make_logits(1)
    expected = processor(torch.tensor([PROMPT + OUTPUT]), logits.clone())
    words = tuple(tuple(word) for word in bad_words)
    sample(make_sampler(64), logits, make_batch([with_defaults({"bad_word_token_ids": words, "temperature": 0.0})]))
    assert torch.equal(logits.isinf(), expected.isinf())


def test_counts_follow_a_sequence_as_it_grows_and_a_row_that_changes_hands() -> None:
    params = with_defaults({"repetition_penalty": 1.5, "frequency_penalty": 0.4})
    sampler, rng = make_sampler(16), random.Random(3)
    batch = make_batch([params])
    (sequence,) = batch.sequences
    for _ in range(40):
        token_ids = sequence.token_ids
        if rng.random() < 0.2:  # a beam goes on from another's tokens
            token_ids = sequence.token_ids = PROMPT + [rng.randrange(VOCAB_SIZE) for _ in range(len(token_ids) - 5)]
        logits = make_logits(1, rng.randrange(1000))
        expected = logits[0].double().numpy().copy()
        sample(sampler, logits, batch)
        output = token_ids[len(PROMPT) :]
        for token_id in set(token_ids):
            expected[token_id] *= 1 / 1.5 if expected[token_id] > 0 else 1.5
            expected[token_id] -= 0.4 * output.count(token_id)
        assert logits[0].double().numpy() == pytest.approx(expected, abs=1e-5)
        token_ids.append(rng.randrange(VOCAB_SIZE))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probs_are_of_the_raw_distribution(temperature: float) -> None:
    options = {"temperature": temperature, "allowed_token_ids": (7, 8), "repetition_penalty": 1.9}
    all_params = [
        with_defaults(options | {"logprobs": 4}),
        with_defaults({"temperature": temperature}),
        with_defaults({"temperature": temperature, "logprobs": 0}),
    ]
    logits = make_logits(3)
    expected = logits[0].double().log_softmax(dim=-1)
    sampled = sample(make_sampler(64), logits, make_batch(all_params))
    assert set(sampled.log_probs) == {0, 2}
    for index, num_top in ((0, 4), (2, 0)):
        found = sampled.log_probs[index]
        assert found.token_id == sampled.token_ids[index]
        assert found.log_prob == pytest.approx(expected[found.token_id].item(), abs=1e-6)
        assert found.top_token_ids == expected.topk(num_top).indices.tolist()
        assert found.top_log_probs == pytest.approx(expected.topk(num_top).values.tolist(), abs=1e-6)


def test_nothing_allowed_is_said_and_not_taken_for_a_number_that_is_none() -> None:
    logits = make_logits(3)
    logits[1, 20] = torch.nan
    params = with_defaults({"allowed_token_ids": (5,), "bad_word_token_ids": ((5,),)})
    sampled = sample(make_sampler(64), logits, make_batch([params, params, with_defaults({})]))
    assert sampled.token_ids[:2] == [None, None]
    assert sampled.token_ids[2] is not None
    assert sampled.failures == {0: "no_token_allowed"}


def test_candidates_of_beams_are_adjusted_log_probabilities() -> None:
    beam = {"use_beam_search": True, "n": 3, "repetition_penalty": 1.4, "min_tokens": 6, "logprobs": 2}
    nothing_left = {"use_beam_search": True, "n": 2, "allowed_token_ids": (5, 9), "bad_word_token_ids": ((9,),)}
    all_params = [with_defaults({}), with_defaults(beam), with_defaults(nothing_left)]
    logits = make_logits(3)
    raw = logits[0].double()
    sampled: SampledTokens = sample(make_sampler(64), logits, make_batch(all_params))
    expected = Row(all_params[1], raw.numpy()).adjusted()
    order = np.argsort(-expected)[:6]
    assert sampled.candidates[1].token_ids == order.tolist()
    assert sampled.candidates[1].log_probs == pytest.approx(expected[order].tolist(), abs=1e-5)
    assert sampled.candidates[1].raw is not None
    for found, token_id in zip(sampled.candidates[1].raw, order, strict=True):
        assert found.log_prob == pytest.approx(raw.log_softmax(dim=-1)[token_id].item(), abs=1e-6)
        assert len(found.top_token_ids) == 2
    assert sampled.candidates[2].token_ids == [5]
    assert 0 not in sampled.candidates
