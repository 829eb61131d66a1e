"""Sequences that wait, in order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from quire.scheduler.sequence import Sequence

BY_ORDER = attrgetter("order")


class RequestQueue:
    """Sorted by `Sequence.order`, which alone holds the policy: arrival ("fcfs"), or priority and then arrival.

    A new request goes to the end of its priority class, a preempted one back before all that arrived later.
    """

    __slots__ = ("_sequences",)

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def push(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=BY_ORDER)

    def remove(self, sequence: Sequence) -> None:
        del self._sequences[self._index(sequence)]

    def take(self, sequence: Sequence) -> list[Sequence]:
        """Remove one; those that came before it and have its priority."""
        index = self._index(sequence)
        del self._sequences[index]
        priority = sequence.order[0]
        return [other for other in self._sequences[:index] if other.order[0] == priority]

    def _index(self, sequence: Sequence) -> int:
        return bisect_left(self._sequences, sequence.order, key=BY_ORDER)
