"""The blocks of one sequence, in order of position."""

from __future__ import annotations

from quire.scheduler.block_pool import BlockPool


class BlockTable:
    """Block ids by position: token p lives in block_ids[p // block_size].

    Append-only: an entry never changes while it is held, so a row of the engine's table is only ever extended. Only the
    sliding window lets go of leading blocks; their entries become 0. Every other entry is one reference to the block,
    and `copy_source` is one more.
    """

    __slots__ = ("_block_size", "_pool", "block_ids", "capacity", "copy_source", "copy_target", "num_released")

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self.block_ids: list[int] = []
        self.capacity = 0
        """Tokens that fit into the blocks: len(block_ids) * block_size."""
        self.num_released = 0
        """Leading entries that are 0."""
        self.copy_source: int | None = None
        """Block to be copied before the next step writes; held until the copy is handed out."""
        self.copy_target = 0
        """Block of this table to copy it into, while there is a source; others may have come after it."""

    def num_missing_blocks(self, num_tokens: int) -> int:
        """Blocks to allocate until `num_tokens` tokens fit."""
        return -((self.capacity - num_tokens) // self._block_size) if num_tokens > self.capacity else 0

    def adopt(self, block_ids: list[int]) -> None:
        """Start with the blocks of a cached prefix, shared; leading zeros lie outside the window."""
        for block_id in block_ids:
            if block_id:
                self._pool.share(block_id)
            else:
                self.num_released += 1
        self._extend(block_ids)

    def adopt_and_copy_last(self, block_ids: list[int]) -> None:
        """Start with a prefix whose last block goes on in a copy: see `take_copy`. Takes one block from the pool."""
        self.adopt(block_ids[:-1])
        self.copy_source = block_ids[-1]
        self._pool.share(self.copy_source)
        (self.copy_target,) = self.grow(1)

    def grow(self, num_blocks: int) -> list[int]:
        """Append newly allocated blocks; their ids."""
        block_ids = self._pool.allocate(num_blocks)
        self._extend(block_ids)
        return block_ids

    def fork(self, num_tokens: int) -> BlockTable:
        """A table that shares the first `num_tokens` tokens and has a last block of its own to go on in.

        Full blocks are shared. A partial last one is to be copied: see `take_copy`. Takes one block from the pool.
        """
        num_shared = num_tokens // self._block_size
        table = BlockTable(self._pool, self._block_size)
        if num_tokens % self._block_size:
            table.adopt_and_copy_last(self.block_ids[: num_shared + 1])
        else:
            table.adopt(self.block_ids[:num_shared])
            table.grow(1)
        return table

    def take_copy(self, step_id: int) -> tuple[int, int] | None:
        """(source, target) of the planned copy, once, for the step that makes it; the source is no longer held."""
        if self.copy_source is None:
            return None
        copy = (self.copy_source, self.copy_target)
        self._pool.fence(copy, step_id)
        self._pool.release((self.copy_source,))
        self.copy_source = None
        return copy

    def release_before(self, first_block: int) -> None:
        """Let go of the blocks before index `first_block`."""
        first_block = min(first_block, len(self.block_ids))
        if first_block > self.num_released:
            released = self.block_ids[self.num_released : first_block]
            self.block_ids[self.num_released : first_block] = [0] * len(released)
            self.num_released = first_block
            self._pool.release(reversed(released))

    def release(self) -> None:
        """Let go of everything, the tail first."""
        if self.copy_source is not None:
            self._pool.release((self.copy_source,))
            self.copy_source = None
        self._pool.release(reversed(self.block_ids[self.num_released :]))
        self.block_ids.clear()
        self.capacity = 0
        self.num_released = 0

    def held_block_ids(self) -> list[int]:
        """Every block this table holds a reference to."""
        held = self.block_ids[self.num_released :]
        return held if self.copy_source is None else [*held, self.copy_source]

    def _extend(self, block_ids: list[int]) -> None:
        self.block_ids += block_ids
        self.capacity += len(block_ids) * self._block_size
