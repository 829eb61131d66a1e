"""The blocks of the KV-cache: who may be handed out next, and how many tables hold each."""

from __future__ import annotations

from collections.abc import Iterable

from quire.scheduler.invariants import InvariantError
from quire.scheduler.prefix_cache import PrefixCache

NULL_BLOCK = 0


class BlockPool:
    """Reference counts, and the free blocks in LRU order.

    The free list is a ring threaded through two integer lists, so that a prefix hit can take a block out of its middle
    in O(1). The null block is the ring's anchor and is never handed out. A free block keeps its cached content until it
    is allocated again; allocation takes the head of the list. Tables are released tail first, so of one sequence the
    end of the chain is evicted before the beginning that others may share.
    """

    __slots__ = (
        "_next",
        "_prefix_cache",
        "_previous",
        "num_blocks",
        "num_free_blocks",
        "num_used_blocks",
        "ref_counts",
    )

    def __init__(self, num_blocks: int, prefix_cache: PrefixCache) -> None:
        self.num_blocks = num_blocks
        self.num_free_blocks = num_blocks - 1
        self.num_used_blocks = 0
        self.ref_counts: list[int] = [0] * num_blocks
        self._next: list[int] = [*range(1, num_blocks), NULL_BLOCK]
        self._previous: list[int] = [num_blocks - 1, *range(num_blocks - 1)]
        self._prefix_cache = prefix_cache

    def allocate(self, num_blocks: int) -> list[int]:
        """Take the least recently used free blocks, with one reference each; what was cached in them is forgotten."""
        ref_counts, next_free = self.ref_counts, self._next
        block_ids = []
        block_id = next_free[NULL_BLOCK]
        for _ in range(num_blocks):
            if block_id == NULL_BLOCK or ref_counts[block_id] != 0:
                raise InvariantError("I21", f"block {block_id} at the head of the free list cannot be allocated")
            ref_counts[block_id] = 1
            self._prefix_cache.forget(block_id)
            block_ids.append(block_id)
            block_id = next_free[block_id]
        next_free[NULL_BLOCK] = block_id
        self._previous[block_id] = NULL_BLOCK
        self.num_free_blocks -= num_blocks
        self.num_used_blocks += num_blocks
        return block_ids

    def share(self, block_id: int) -> None:
        """Add a reference; a free block is taken out of the free list with its content."""
        self.ref_counts[block_id] += 1
        if self.ref_counts[block_id] == 1:
            next_free, previous_free = self._next[block_id], self._previous[block_id]
            self._next[previous_free] = next_free
            self._previous[next_free] = previous_free
            self.num_free_blocks -= 1
            self.num_used_blocks += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Drop one reference of each; those without any join the free list's end in the order given."""
        ref_counts, next_free, previous_free = self.ref_counts, self._next, self._previous
        num_freed = 0
        for block_id in block_ids:
            ref_count = ref_counts[block_id] - 1
            if ref_count < 0:
                raise InvariantError("I2", f"block {block_id} is released more often than it was taken")
            ref_counts[block_id] = ref_count
            if ref_count == 0:
                last = previous_free[NULL_BLOCK]
                next_free[last] = block_id
                previous_free[block_id] = last
                next_free[block_id] = NULL_BLOCK
                previous_free[NULL_BLOCK] = block_id
                num_freed += 1
        self.num_free_blocks += num_freed
        self.num_used_blocks -= num_freed

    def check_count(self) -> None:
        """I4 in O(1): the two counts are kept apart from each other."""
        if self.num_free_blocks + self.num_used_blocks + 1 != self.num_blocks or self.num_free_blocks < 0:
            raise InvariantError(
                "I4", f"{self.num_free_blocks} free + {self.num_used_blocks} used + 1 of {self.num_blocks} blocks"
            )

    def free_block_ids(self) -> list[int]:
        """The free list from head (allocated next) to tail; a damaged ring is cut after `num_blocks` entries."""
        block_ids: list[int] = []
        block_id = self._next[NULL_BLOCK]
        while block_id != NULL_BLOCK and len(block_ids) <= self.num_blocks:
            block_ids.append(block_id)
            block_id = self._next[block_id]
        return block_ids
