"""A detector is trusted once it has caught a planted fault: every mutant is killed by the invariant named for it."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, Mutant
from simulation.simulation import Simulation

from quire.scheduler.invariants import InvariantError

MAX_SEEDS = 150
STEPS = 100


def names_of_failures(seed: int) -> str | None:
    try:
        Simulation(seed).run(STEPS)
    except InvariantError as error:
        return error.name
    except (LookupError, ValueError, AttributeError):
        return "crash"
    return None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.invariant}: {mutant.fault}")
def test_mutant_is_killed_by_its_invariant(mutant: Mutant) -> None:
    seen = set()
    with mutant.planted():
        for seed in range(MAX_SEEDS):
            seen.add(names_of_failures(seed))
            if mutant.invariant in seen:
                return
    pytest.fail(f"not killed by {mutant.invariant} in {MAX_SEEDS} seeds, but: {seen}")


def test_every_invariant_of_the_simulator_has_a_mutant() -> None:
    """I22 is a metric, I27 needs adapters."""
    expected = {f"I{number}" for number in range(1, 33)} - {"I22", "I27"}
    assert {mutant.invariant for mutant in MUTANTS} == expected


def test_the_seeds_pass_without_a_mutant() -> None:
    assert [names_of_failures(seed) for seed in range(MAX_SEEDS)] == [None] * MAX_SEEDS
