"""The simulated machine: the peer that prefills first, and the bound that prefix hits are measured against."""

from __future__ import annotations

import random

import pytest
import scheduling
from scheduling import Arrival, PrefillFirst, StepCost, make_scheduler, simulate


def test_who_prefills_first_lets_decodes_wait() -> None:
    arrivals = scheduling.poisson(random.Random(3), 4.0, 12, range(64, 513), range(8, 17))
    wanted = sum(arrival.num_output_tokens for arrival in arrivals)
    longest = {}
    for name, scheduler in (
        ("prefill first", make_scheduler(2048, scheduler_class=PrefillFirst)),
        ("small steps", make_scheduler(128)),
    ):
        figures = simulate(scheduler, arrivals, StepCost())
        assert figures.num_tokens == wanted
        assert len(figures.all_ttft()) == len(arrivals)
        longest[name] = max(figures.itl)
    assert longest["prefill first"] > 2 * longest["small steps"]


def test_a_tree_of_prefixes_in_its_own_order_finds_all_that_can_be_found() -> None:
    rng = random.Random(1)
    prompts = [path + scheduling.prompt_of(rng, 16) for path in scheduling.tree(rng, 2, 3, 32)]
    figures = simulate(make_scheduler(128), [Arrival(0.0, prompt, 2) for prompt in prompts], StepCost())
    assert figures.hit_rate == pytest.approx(scheduling.best_hit_rate(prompts))
