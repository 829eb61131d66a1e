"""Units that threads share out: each is taken once, whoever is fast, and those of one thread follow each other."""

from __future__ import annotations

import random
from typing import Any

import numba
import numpy as np
import pytest
import torch

from quire.kernels.cpu_elements import int64_pointer, move, take
from quire.kernels.cpu_ranges import enter_ranges, open_ranges, state_bytes, take_unit
from quire.kernels.cpu_workers import Worker


@numba.njit
def _open(address: int, num_ranges: int) -> None:
    open_ranges(int64_pointer(address), num_ranges)


@numba.njit
def _enter(address: int) -> int:
    return enter_ranges(int64_pointer(address), 0)  # type: ignore[no-any-return]


@numba.njit
def _take(address: int, num_ranges: int, thread: int, num_units: int) -> int:
    return take_unit(int64_pointer(address), num_ranges, thread, num_units)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("num_ranges", "num_threads"), [(1, 1), (2, 2), (2, 1), (3, 5), (8, 8)])
@pytest.mark.parametrize("num_units", [0, 1, 2, 7, 64, 101])
def test_each_unit_is_taken_once(num_units: int, num_ranges: int, num_threads: int) -> None:
    state = np.full(state_bytes(num_ranges) // 8, 99)
    address, rng = state.ctypes.data, random.Random(num_units)
    for _ in range(3):
        _open(address, num_ranges)
        threads = [_enter(address) for _ in range(num_threads)]
        assert threads == list(range(num_threads))
        taken = []
        while threads:
            thread = rng.choice(threads)
            unit = _take(address, num_ranges, thread, num_units)
            if unit == num_units:
                threads.remove(thread)
            else:
                taken.append(unit)
        assert sorted(taken) == list(range(num_units))


def test_threads_that_are_equally_fast_take_what_lies_together() -> None:
    state = np.zeros(state_bytes(3) // 8, np.int64)
    _open(state.ctypes.data, 3)
    turns = [[_take(state.ctypes.data, 3, thread, 12) for thread in range(3)] for _ in range(4)]
    assert turns == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]


def test_whoever_is_done_helps() -> None:
    state = np.zeros(state_bytes(2) // 8, np.int64)
    _open(state.ctypes.data, 2)
    assert _take(state.ctypes.data, 2, 1, 4) == 2
    assert [_take(state.ctypes.data, 2, 0, 4) for _ in range(4)] == [0, 1, 3, 4]


def _open_all(shared: Any) -> None:
    parameters = int64_pointer(shared)
    open_ranges(int64_pointer(parameters[1]), 2)


def _count_units(shared: Any) -> None:
    parameters = int64_pointer(shared)
    state, counts, num_units = int64_pointer(parameters[1]), int64_pointer(parameters[2]), parameters[3]
    thread = enter_ranges(state, 0)
    unit = take_unit(state, 2, thread, num_units)
    while unit < num_units:
        take(move(counts, unit))
        unit = take_unit(state, 2, thread, num_units)


def test_threads_that_race_for_the_last_units() -> None:
    num_units, num_runs = 3, 20_000
    state, counts = np.zeros(state_bytes(2) // 8, np.int64), np.zeros(num_units + 1, np.int64)
    worker = Worker(_count_units, _open_all)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for _ in range(num_runs):
        worker.run(torch.float32, np.array([0, state.ctypes.data, counts.ctypes.data, num_units], np.int64), 2)
    torch.set_num_threads(before)
    assert counts.tolist() == [num_runs] * num_units + [0]
