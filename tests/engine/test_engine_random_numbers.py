from __future__ import annotations

import numpy as np
import pytest

from quire.engine.random_numbers import philox4x32, uniform


def words(*values: int) -> tuple[np.ndarray, ...]:
    return tuple(np.array([value], np.uint64) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    """The known-answer vectors published with Random123."""
    result = philox4x32(words(*counter), words(*key))  # type: ignore[arg-type]
    assert tuple(int(word[0]) for word in result) == expected


def test_a_number_depends_on_its_own_row_alone() -> None:
    seeds = np.array([1, 2**63 + 5, 2**64 - 1, 7], np.uint64)
    choices = np.array([0, 1, 2, 3], np.uint64)
    positions = np.array([0, 5, 2**20, 9], np.uint64)
    together = uniform(seeds, choices, positions)
    for row in range(4):
        alone = uniform(seeds[row : row + 1], choices[row : row + 1], positions[row : row + 1])
        assert alone[0] == together[row]


def test_numbers_are_uniform_and_inside_the_open_interval() -> None:
    count = 100_000
    numbers = uniform(np.full(count, 42, np.uint64), np.zeros(count, np.uint64), np.arange(count, dtype=np.uint64))
    assert numbers.min() > 0
    assert numbers.max() < 1
    observed = np.histogram(numbers, bins=100, range=(0, 1))[0]
    chi_square = float(((observed - count / 100) ** 2 / (count / 100)).sum())
    assert chi_square < 148.2  # 99.9 % quantile, 99 degrees of freedom


def test_seed_choice_and_position_all_matter() -> None:
    base = (3, 1, 10)
    seen = set()
    for change in ((0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1)):
        seed, choice, position = (value + delta for value, delta in zip(base, change, strict=True))
        arrays = (np.array([value], np.uint64) for value in (seed, choice, position))
        seen.add(float(uniform(*arrays)[0]))
    assert len(seen) == 5
