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

    A block that a step in flight reads or writes is fenced: without references it is not free before that step has
    retired. It may be shared again meanwhile, for its content stays.
    """

    __slots__ = (
        "_last_uses",
        "_next",
        "_prefix_cache",
        "_previous",
        "num_blocks",
        "num_fenced_blocks",
        "num_free_blocks",
        "num_used_blocks",
        "ref_counts",
    )

    def __init__(self, num_blocks: int, prefix_cache: PrefixCache) -> None:
        self.num_blocks = num_blocks
        self.num_free_blocks = num_blocks - 1
        self.num_used_blocks = 0
        self.num_fenced_blocks = 0
        """Without references, and not free yet."""
        self._last_uses: dict[int, int] = {}
        """Id of the newest step in flight that uses a block, for blocks that were or may be released before it retires,
        in the order in which they are to become free."""
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
            self.num_used_blocks += 1
            if block_id in self._last_uses:
                self.num_fenced_blocks -= 1
                return
            next_free, previous_free = self._next[block_id], self._previous[block_id]
            self._next[previous_free] = next_free
            self._previous[next_free] = previous_free
            self.num_free_blocks -= 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Drop one reference of each; those without any join the free list's end in the order given, if no step in
        flight uses them."""
        ref_counts, last_uses = self.ref_counts, self._last_uses
        unused = []
        for block_id in block_ids:
            ref_count = ref_counts[block_id] - 1
            if ref_count < 0:
                raise InvariantError("I2", f"block {block_id} is released more often than it was taken")
            ref_counts[block_id] = ref_count
            if ref_count == 0:
                unused.append(block_id)
        self.num_used_blocks -= len(unused)
        if last_uses:
            num_unused = len(unused)
            unused = [block_id for block_id in unused if block_id not in last_uses]
            self.num_fenced_blocks += num_unused - len(unused)
        self._append_free(unused)

    def fence(self, block_ids: Iterable[int], step_id: int) -> None:
        """A step in flight uses these blocks, which have references: given up, they are not free before it retires."""
        last_uses = self._last_uses
        for block_id in block_ids:
            last_uses[block_id] = max(step_id, last_uses.pop(block_id, step_id))

    def retire(self, step_id: int) -> None:
        """A step has retired, and all before it: what only they used joins the free list's end."""
        last_uses = self._last_uses
        if not last_uses:
            return
        retired = [block_id for block_id, last_use in last_uses.items() if last_use <= step_id]
        for block_id in retired:
            del last_uses[block_id]
        unused = [block_id for block_id in retired if self.ref_counts[block_id] == 0]
        self.num_fenced_blocks -= len(unused)
        self._append_free(unused)

    def _append_free(self, block_ids: list[int]) -> None:
        next_free, previous_free = self._next, self._previous
        last = previous_free[NULL_BLOCK]
        for block_id in block_ids:
            next_free[last] = block_id
            previous_free[block_id] = last
            last = block_id
        next_free[last] = NULL_BLOCK
        previous_free[NULL_BLOCK] = last
        self.num_free_blocks += len(block_ids)

    def is_fenced(self, block_id: int) -> bool:
        return block_id in self._last_uses

    def check_count(self) -> None:
        """I4 in O(1): the counts are kept apart from each other."""
        num_free, num_used, num_fenced = self.num_free_blocks, self.num_used_blocks, self.num_fenced_blocks
        if num_free + num_used + num_fenced + 1 != self.num_blocks or num_free < 0 or num_fenced < 0:
            raise InvariantError(
                "I4", f"{num_free} free + {num_used} used + {num_fenced} fenced + 1 of {self.num_blocks} blocks"
            )

    def free_block_ids(self) -> list[int]:
        """The free list from head (allocated next) to tail; a damaged ring is cut after `num_blocks` entries."""
        block_ids: list[int] = []
        block_id = self._next[NULL_BLOCK]
        while block_id != NULL_BLOCK and len(block_ids) <= self.num_blocks:
            block_ids.append(block_id)
            block_id = self._next[block_id]
        return block_ids
