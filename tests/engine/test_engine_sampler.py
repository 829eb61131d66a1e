"""The sampler against a float64 computation written from the definitions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch

from quire.engine.random_numbers import uniform
from quire.engine.sampler import sample
from quire.engine.sampling_options import SamplingOptions

VOCAB_SIZE = 50


@dataclass(frozen=True)
class Options:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0


def batch_of(options: list[Options], uniform_numbers: npt.NDArray[np.float64]) -> SamplingOptions:
    return SamplingOptions(
        temperature=np.array([o.temperature for o in options], np.float32),
        top_k=np.array([o.top_k for o in options], np.int64),
        top_p=np.array([o.top_p for o in options], np.float32),
        min_p=np.array([o.min_p for o in options], np.float32),
        typical_p=np.array([o.typical_p for o in options], np.float32),
        uniform=uniform_numbers,
    )


def reference_distribution(logits: npt.NDArray[np.float64], options: Options) -> npt.NDArray[np.float64]:
    scaled = logits / options.temperature
    kept = np.ones_like(scaled, dtype=bool)

    def probabilities() -> npt.NDArray[np.float64]:
        exponentials = np.where(kept, np.exp(scaled - scaled.max()), 0.0)
        return exponentials / exponentials.sum()

    if options.typical_p < 1.0:
        p = probabilities()
        surprise = -np.log(np.where(p > 0, p, 1.0))
        distance = np.where(p > 0, np.abs(surprise - (p * surprise).sum()), np.inf)
        order = np.argsort(distance, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        typical = np.zeros_like(kept)
        typical[order[before < options.typical_p]] = True
        kept &= typical
    if options.top_k:
        kept &= scaled >= np.sort(np.where(kept, scaled, -np.inf))[-min(options.top_k, len(scaled))]
    if options.top_p < 1.0:
        p = probabilities()
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        nucleus = np.zeros_like(kept)
        nucleus[order[before < options.top_p]] = True
        kept &= nucleus
    if options.min_p:
        p = probabilities()
        kept &= p >= options.min_p * p.max()
    return probabilities()


def chi_square_bound(degrees: int) -> float:
    """99.99 % quantile by Wilson and Hilferty's approximation."""
    z = 3.719
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(temperature=0.5),
        Options(temperature=2.0),
        Options(top_k=1),
        Options(top_k=7),
        Options(top_k=1000),
        Options(top_p=0.9),
        Options(top_p=0.05),
        Options(min_p=0.1),
        Options(typical_p=0.6),
        Options(typical_p=0.2),
        Options(temperature=1.4, top_k=25, typical_p=0.9),
        Options(temperature=0.8, top_k=20, top_p=0.8),
        Options(temperature=1.5, top_k=30, top_p=0.95, min_p=0.05),
    ],
    ids=str,
)
def test_distribution_is_exact(options: Options) -> None:
    num_draws = 40_000
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(1)) * 2
    numbers = uniform(
        np.full(num_draws, 11, np.uint64), np.zeros(num_draws, np.uint64), np.arange(num_draws, dtype=np.uint64)
    )
    token_ids = sample(logits.repeat(num_draws, 1), batch_of([options] * num_draws, numbers))
    assert (token_ids >= 0).all()
    expected = reference_distribution(logits.double().numpy(), options) * num_draws
    observed = np.bincount(token_ids.numpy(), minlength=VOCAB_SIZE)
    assert not observed[expected == 0].any()
    common = expected >= 5
    rare_expected, rare_observed = expected[~common].sum(), observed[~common].sum()
    statistic = ((observed[common] - expected[common]) ** 2 / expected[common]).sum()
    if rare_expected > 0:
        statistic += (rare_observed - rare_expected) ** 2 / rare_expected
    assert statistic < chi_square_bound(max(int(common.sum()), 1))


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [7, 9]] = 3.0
    assert sample(logits, batch_of([Options(temperature=0.0)], np.array([0.5]))).tolist() == [7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    """Logits rounded to bfloat16 tie often: nothing may depend on how a sort breaks ties."""
    generator = torch.Generator().manual_seed(5)
    rows = [
        Options(temperature=0.0),
        Options(),
        Options(top_k=3),
        Options(top_p=0.7),
        Options(top_k=40, top_p=0.5, min_p=0.02),
        Options(temperature=0.3, min_p=0.2),
    ] * 5
    logits = torch.randn(len(rows), 2000, generator=generator).to(dtype).float()
    numbers = np.random.default_rng(0).random(len(rows))
    together = sample(logits.clone(), batch_of(rows, numbers))
    for index, options in enumerate(rows):
        alone = sample(logits[index : index + 1].clone(), batch_of([options], numbers[index : index + 1]))
        assert alone.item() == together[index].item(), options


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_reported_and_alone(poison: float, temperature: float) -> None:
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[:, 4] = 9.0
    logits[1, 17] = poison
    options = [Options(temperature=temperature, top_k=5, top_p=0.9, min_p=0.01)] * 3
    assert sample(logits, batch_of(options, np.full(3, 0.5))).tolist() == [4, -1, 4]


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.zeros(1000, VOCAB_SIZE)
    logits[:, ::2] = -torch.inf
    numbers = (np.arange(1000) + 0.5) / 1000
    token_ids = sample(logits, batch_of([Options()] * 1000, numbers))
    assert set(token_ids.tolist()) == set(range(1, VOCAB_SIZE, 2))


@pytest.mark.parametrize("number", [2.0**-41, 1 - 2.0**-41])
def test_the_ends_of_the_interval_draw_real_tokens(number: float) -> None:
    logits = torch.full((1, VOCAB_SIZE), -torch.inf)
    logits[0, 10:20] = torch.linspace(-3, 3, 10)
    token_ids = sample(logits, batch_of([Options()], np.array([number])))
    assert token_ids.item() in ((10,) if number < 0.5 else (19,))
