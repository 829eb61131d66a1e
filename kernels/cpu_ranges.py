"""How threads share out units of work whose data lie one after another in memory.

Were units taken one by one, each thread would jump over what the others read, and a processor takes up to a microsecond
until it reads ahead again: at one row as long as a panel of 4 bits takes. So each thread has a range of its own, takes
its units in their order, and then helps with what is left of the others' ranges.

The state is int64 words, a cache line for each counter: that of the threads, then that of each range.
"""

from __future__ import annotations

from typing import NamedTuple

import numba

from quire.kernels.cpu_elements import call_for_number, move, take

_LINE = 8  # int64 words


class Panels(NamedTuple):
    """What a kernel reads from end to end: memory that never changes, each panel a unit or a few."""

    address: int
    num_panels: int
    panel_bytes: int


def state_bytes(num_ranges: int) -> int:
    """Of memory for the state of `num_ranges` ranges, as many as there are threads at most; any number is right."""
    return 8 * _LINE * (1 + num_ranges)


@numba.njit
def open_ranges(state, num_ranges):  # type: ignore[no-untyped-def]
    """Before the threads enter: no unit is taken."""
    for index in range(1 + num_ranges):
        state[_LINE * index] = 0


@numba.njit
def enter_ranges(state, thread_number):  # type: ignore[no-untyped-def]
    """This thread's number: what the function at `thread_number` says, so that a thread has the same range in every
    kernel; if that is 0, the order in which threads enter."""
    return take(state) if thread_number == 0 else call_for_number(thread_number)


@numba.njit
def take_unit(state, num_ranges, thread, num_units):  # type: ignore[no-untyped-def]
    """A unit below `num_units` that nobody else is given, or `num_units` if there is none any more."""
    for i in range(num_ranges):
        index = (thread + i) % num_ranges
        first, end = index * num_units // num_ranges, (index + 1) * num_units // num_ranges
        counter = move(state, _LINE * (1 + index))
        if counter[0] < end - first:
            unit = first + take(counter)
            if unit < end:
                return unit
    return num_units
