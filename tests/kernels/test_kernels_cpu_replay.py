"""The threads of a replay come when they can: every unit is done once, in the kernels' order, whoever is late."""

from __future__ import annotations

import ctypes
import itertools
import random
import threading
import time
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch

from quire.kernels import cpu_replay as call
from quire.kernels.cpu_elements import int64_pointer, move, take
from quire.kernels.cpu_recording import Arena, Recording, record
from quire.kernels.cpu_workers import ALONE, Worker

MAX_UNITS = 24
TICKET, NUM_UNITS, NUM_ENTERED, FROM, NUM_FROM, TO, NUM_DONE, DELAY = range(8)
NUM_COME = np.zeros(1, np.int64)
ADDRESS = NUM_COME.ctypes.data


def _prepare(shared: Any) -> None:
    parameters = int64_pointer(shared)
    if parameters[NUM_UNITS] <= 1:
        parameters[TICKET] = ALONE if parameters[NUM_UNITS] == 1 else 1


def _mix(shared: Any) -> None:
    """Each unit makes a number from one that another unit of the kernel before has made, and counts how often."""
    parameters = int64_pointer(shared)
    source, target = int64_pointer(parameters[FROM]), int64_pointer(parameters[TO])
    take(move(parameters, NUM_ENTERED))
    unit = take(parameters)
    while unit < parameters[NUM_UNITS]:
        for _ in range(parameters[DELAY]):
            take(move(parameters, NUM_DONE))
        target[unit] = 3 * source[(7 * unit + 5) % parameters[NUM_FROM]] + unit
        take(move(target, MAX_UNITS + unit))
        unit = take(parameters)


WORKER = Worker(_mix, _prepare)


@numba.cfunc(numba.types.int64())  # type: ignore[untyped-decorator]
def next_number() -> int:
    """Stands in for omp_get_thread_num: threads are numbered as they come."""
    return take(int64_pointer(ADDRESS))  # type: ignore[no-any-return]


class Chain:
    """Kernels, each of which reads what the last one before it that has work has written."""

    def __init__(self, num_units: list[int], delays: list[int]) -> None:
        self.numbers = np.zeros((len(num_units) + 1, 2, MAX_UNITS), np.int64)
        self.kernels: list[npt.NDArray[np.int64]] = []
        self.expected = [np.arange(MAX_UNITS)]
        last, num_from = 0, MAX_UNITS
        with record(Arena()) as self.recording:
            for index, (units, delay) in enumerate(zip(num_units, delays, strict=True)):
                source, target = self.numbers[last].ctypes.data, self.numbers[index + 1].ctypes.data
                parameters = np.array([0, units, 0, source, num_from, target, 0, delay], np.int64)
                WORKER.run(torch.float32, parameters, 5)
                unit = np.arange(units)
                self.expected.append(3 * self.expected[last][(7 * unit + 5) % num_from] + unit)
                if units:
                    last, num_from = index + 1, units

    def replay(self, delays_s: list[float]) -> npt.NDArray[np.int64]:
        """Run on threads that come after these seconds; how many entered each kernel."""
        self.numbers[:] = 0
        self.numbers[0, 0] = self.expected[0]
        parameters = self.recording.parameters.reshape(-1, 8)
        parameters[:, NUM_ENTERED] = NUM_COME[0] = 0
        shared = shared_parameters(self.recording)
        prepare, replay = (ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address) for address in call.compiled())
        prepare(shared.ctypes.data)

        def come(delay_s: float) -> None:
            time.sleep(delay_s)
            replay(shared.ctypes.data)

        threads = [threading.Thread(target=come, args=(delay,)) for delay in delays_s]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
            assert not thread.is_alive()
        for (numbers, counts), expected in zip(self.numbers[1:], self.expected[1:], strict=True):
            np.testing.assert_array_equal(numbers[: len(expected)], expected)
            np.testing.assert_array_equal(counts, np.arange(MAX_UNITS) < len(expected))
        return parameters[:, NUM_ENTERED].copy()


def shared_parameters(recording: Recording) -> npt.NDArray[np.int64]:
    shared = recording._replay.copy()
    shared[call.THREAD_NUMBER] = next_number.address
    return shared


def test_threads_that_come_at_any_time_do_each_unit_once() -> None:
    draw = random.Random(1)
    several: list[int] = []  # kernels that more than one thread has entered; where others keep the cores busy few
    for _ in itertools.takewhile(lambda count: count < 40 or max(several) <= 10, range(1000)):
        num_units = [draw.choice((0, 1, 2, 5, MAX_UNITS)) for _ in range(60)]
        delays = [draw.choice((0, 0, 10, 1000)) for _ in num_units]
        chain = Chain(num_units, delays)
        entered = chain.replay([draw.uniform(0.0, 0.004) for _ in range(draw.randint(1, 6))])
        working = np.array(num_units) > 0
        assert np.array_equal(entered > 0, working)
        assert (entered[np.array(num_units) == 1] == 1).all()
        several.append((entered > 1).sum())
    assert max(several) > 10  # they did compute together


def test_nobody_waits_for_who_does_not_come() -> None:
    """A thread alone goes through all kernels of a recording for five; another, too late, finds nothing to do."""
    chain = Chain([5, MAX_UNITS, 0, 1, 3], [0] * 5)
    assert chain.replay([0.0, 0.5]).tolist() == [1, 1, 0, 1, 1]
    chain = Chain([5], [0])
    assert chain.replay([0.0]).tolist() == [1]
    assert Chain([0, 0], [0, 0]).replay([0.0, 0.0]).tolist() == [0, 0]


def test_who_is_late_joins_the_kernel_that_runs() -> None:
    """The first computes alone for a while, then both do; the late one does not go back to what is done."""
    chain = Chain([3] * 4 + [MAX_UNITS] * 4, [10] * 4 + [1_000_000] * 4)
    entered = chain.replay([0.0, 0.1])
    assert entered[:4].tolist() == [1] * 4
    assert entered[-1] == 2


def test_threads_enter_and_leave_at_the_same_moment() -> None:
    """Kernels so small that a thread comes while the last one leaves, thousands of times."""
    chain = Chain([2] * 2000, [0] * 2000)
    replays = (chain.replay([0.0] * 3) for _ in range(2000))
    entered = list(itertools.islice(replays, 20))
    # On cores that other processes keep busy it may take more until two threads run at once.
    assert any((kernels > 1).any() for kernels in itertools.chain(entered, replays))
