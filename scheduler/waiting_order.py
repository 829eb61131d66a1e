"""Who of those that wait is looked at first: the longest cached prefix, within what is fair."""

from __future__ import annotations

from collections.abc import Iterator

from quire.scheduler.block_manager import BlockManager
from quire.scheduler.request_queue import RequestQueue
from quire.scheduler.sequence import Sequence

MAX_OVERTAKES = 128
"""So many may overtake a sequence while it waits."""
MAX_NUM_SORTED = 256
"""The first so many of the queue may overtake each other."""
OVERDUE = -(2**62)


class WaitingOrder:
    """What is cached is used before it is evicted, and what is missing is computed for all who wait for it at once.

    Priority classes stay apart. Equally long prefixes leave the order of arrival, and so does a cache without hits. Who
    was overtaken as often as may be, or was preempted, is overtaken by nobody.
    """

    def __init__(self, waiting: RequestQueue, blocks: BlockManager) -> None:
        self.max_overtakes = MAX_OVERTAKES
        self._someone_is_overdue = False
        self._waiting = waiting
        self._blocks = blocks

    def candidates(self) -> Iterator[Sequence]:
        """All that wait, each once, in the order in which they may be admitted; `admit` may come between."""
        looked_at: set[Sequence] = set()
        self._someone_is_overdue = True
        while self._someone_is_overdue:
            self._someone_is_overdue = False
            for sequence in self._sorted(looked_at):
                looked_at.add(sequence)
                yield sequence
                if self._someone_is_overdue:
                    break

    def admit(self, sequence: Sequence) -> None:
        """It waits no longer."""
        for overtaken in self._waiting.take(sequence):
            overtaken.num_overtakes += 1
            if overtaken.num_overtakes == self.max_overtakes:
                self._someone_is_overdue = True

    def _sorted(self, without: set[Sequence]) -> list[Sequence]:
        sequences = [sequence for sequence in self._waiting if sequence not in without]
        if len(sequences) > 1 and self._blocks.caching:
            sequences[:MAX_NUM_SORTED] = sorted(sequences[:MAX_NUM_SORTED], key=self._rank)
        return sequences

    def _rank(self, sequence: Sequence) -> tuple[int, int, tuple[int, int, int]]:
        if sequence.num_overtakes >= self.max_overtakes or sequence.num_preemptions:
            return sequence.order[0], OVERDUE, sequence.order
        return sequence.order[0], -self._blocks.find_cached_prefix(sequence).num_tokens, sequence.order
