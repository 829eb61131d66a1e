"""A detector is trusted once it has caught a planted fault: every mutant is killed by the invariant named for it."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, Mutant
from mutants_in_flight import MUTANTS_IN_FLIGHT
from simulation.simulation import Simulation

from quire.scheduler.invariants import InvariantError

MAX_SEEDS = 150
ALL_MUTANTS = MUTANTS + MUTANTS_IN_FLIGHT


def name_of_failure(seed: int, num_steps: int = 100) -> str | None:
    try:
        Simulation(seed).run(num_steps)
    except InvariantError as error:
        return error.name
    except (LookupError, ValueError, AttributeError, OverflowError):
        return "crash"
    return None


@pytest.mark.parametrize("mutant", ALL_MUTANTS, ids=lambda mutant: f"{mutant.invariant}: {mutant.fault}")
def test_mutant_is_killed_by_its_invariant(mutant: Mutant) -> None:
    seen = set()
    with mutant.planted():
        for seed in range(mutant.first_seed, mutant.first_seed + MAX_SEEDS):
            seen.add(name_of_failure(seed, mutant.num_steps))
            if mutant.invariant in seen:
                return
    pytest.fail(f"not killed by {mutant.invariant} in {MAX_SEEDS} seeds, but: {seen}")


def test_every_invariant_of_the_simulator_has_a_mutant() -> None:
    """I22 is a metric, I27 needs adapters."""
    expected = {f"I{number}" for number in range(1, 35)} - {"I22", "I27"}
    assert {mutant.invariant for mutant in ALL_MUTANTS} == expected


def test_the_seeds_pass_without_a_mutant() -> None:
    assert [name_of_failure(seed) for seed in range(MAX_SEEDS)] == [None] * MAX_SEEDS
