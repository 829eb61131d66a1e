"""The memory side of the scheduler: what is cached, what fits, and what the engine's block tables must be told."""

from __future__ import annotations

from collections.abc import Iterable

from quire.config import SchedulerConfig
from quire.scheduler.block_pool import BlockPool
from quire.scheduler.block_table import BlockTable
from quire.scheduler.cached_prefix import NOTHING_CACHED, CachedPrefix, FoundPrefix
from quire.scheduler.output import BlockTableUpdate
from quire.scheduler.prefix_cache import PrefixCache
from quire.scheduler.sequence import Sequence
from quire.scheduler.steps_in_flight import StepsInFlight
from quire.scheduler.window import first_block_in_window


class BlockManager:
    """Pool, prefix cache and the log of changed table entries. Who runs is not its business but the scheduler's."""

    def __init__(self, config: SchedulerConfig, steps: StepsInFlight) -> None:
        self._steps = steps
        self.block_size = config.block_size
        self.window = config.sliding_window
        self.caching = config.enable_prefix_caching
        self._num_usable_blocks = config.num_usable_blocks
        self.prefix_cache = PrefixCache(
            config.num_blocks, config.block_size, namespace=config.cache_namespace, window=config.sliding_window
        )
        self.pool = BlockPool(config.num_blocks, self.prefix_cache)
        self._updates: list[BlockTableUpdate] = []
        self._copying: list[BlockTable] = []
        """Tables that have planned a copy since the last batch."""

    def new_table(self) -> BlockTable:
        return BlockTable(self.pool, self.block_size)

    def find_cached_prefix(self, sequence: Sequence) -> CachedPrefix:
        """Where a waiting sequence can start from. Looks again only if that may have changed."""
        if not self.caching:
            return NOTHING_CACHED
        found, version = sequence.found_prefix, self.prefix_cache.version
        if found is None or found.scoring_depth != sequence.scoring_depth:
            found = sequence.found_prefix = FoundPrefix(self._find_prefix(sequence), version, sequence.scoring_depth)
        elif found.version != version:
            if not self._is_still_missing(found.prefix):
                found.prefix = self._find_prefix(sequence)
            found.version = version
        return found.prefix

    def _is_still_missing(self, prefix: CachedPrefix) -> bool:
        """Whether nothing was found, and nothing can be: not even the first block. With a window it can without."""
        return not prefix.block_ids and self.window is None and prefix.next_key not in self.prefix_cache

    def _find_prefix(self, sequence: Sequence) -> CachedPrefix:
        """The last token is always left to be computed, for its logits are wanted."""
        if sequence.scoring_depth is not None:
            return self._find_scored_prefix(sequence, sequence.scoring_depth)
        num_blocks = sequence.num_hittable_tokens // self.block_size
        self.prefix_cache.extend_keys(sequence.block_keys, sequence.token_ids, num_blocks)
        block_ids = self.prefix_cache.find(sequence.block_keys, num_blocks)
        next_key = sequence.block_keys[len(block_ids) + 1] if len(block_ids) < num_blocks else None
        return CachedPrefix(block_ids, len(block_ids) * self.block_size, next_key=next_key)

    def is_computing(self, writer: Sequence, start: int, sequence: Sequence, prefix: CachedPrefix) -> bool:
        """Whether `writer`, from token `start` on, computes the first block that the cached prefix of one that waits
        lacks."""
        index = len(prefix.block_ids)
        if prefix.next_key is None or start >= (index + 1) * self.block_size:
            return False
        depth, stored = sequence.scoring_depth, writer.scoring_depth
        if depth is not None and (stored is None or stored < depth):
            return False
        return writer.block_keys[index + 1 : index + 2] == [prefix.next_key]

    def _find_scored_prefix(self, sequence: Sequence, depth: int) -> CachedPrefix:
        """Blocks whose log-probabilities are stored too, all but the last token.

        That of the next token needs the logits at the last cached one, which is therefore computed again, into a copy
        of its block. Source and copy are held at once: one block more than the sequence needs by itself.
        """
        num_tokens = len(sequence.token_ids)
        if -(-num_tokens // self.block_size) + 1 > self._num_usable_blocks:
            return NOTHING_CACHED
        num_blocks = num_tokens // self.block_size
        self.prefix_cache.extend_keys(sequence.block_keys, sequence.token_ids, num_blocks)
        block_ids = self.prefix_cache.find_scored(sequence.block_keys, num_blocks, depth)
        next_key = sequence.block_keys[len(block_ids) + 1] if len(block_ids) < num_blocks else None
        if not block_ids:
            return CachedPrefix([], 0, next_key=next_key)
        return CachedPrefix(block_ids, len(block_ids) * self.block_size - 1, copies_last=True, next_key=next_key)

    def num_blocks_to_start(self, prefix: CachedPrefix, num_tokens: int) -> int:
        """Free blocks it takes to start from a cached prefix and hold `num_tokens` tokens; a free one is revived."""
        pool = self.pool
        unused = [block_id for block_id in prefix.block_ids if block_id and pool.ref_counts[block_id] == 0]
        num_revived = len(unused) - sum(map(pool.is_fenced, unused))
        return -(-num_tokens // self.block_size) - prefix.num_shared_blocks + num_revived

    def start(self, sequence: Sequence, prefix: CachedPrefix, num_tokens: int) -> None:
        """Give a waiting sequence its cached prefix and blocks for its first `num_tokens` tokens."""
        table = sequence.block_table
        if prefix.copies_last:
            table.adopt_and_copy_last(prefix.block_ids)
            self._copying.append(table)
        else:
            table.adopt(prefix.block_ids)
        table.grow(table.num_missing_blocks(num_tokens))
        sequence.num_computed_tokens = prefix.num_tokens
        self._log_table(sequence)

    def grow(self, sequence: Sequence, num_blocks: int) -> None:
        """Give a running sequence blocks, which must be free."""
        table = sequence.block_table
        start = len(table.block_ids)
        self._updates.append(BlockTableUpdate(sequence.row, start, table.grow(num_blocks)))

    def look_ahead(self, sequence: Sequence, num_tokens: int, num_reserved: int) -> int:
        """Give a running sequence blocks for tokens that are only guessed, if `num_reserved` blocks stay free without
        taking any from others; how many tokens fit then. It keeps them, whatever becomes of the guesses."""
        table = sequence.block_table
        if table.num_missing_blocks(num_tokens):
            self.release_out_of_window(sequence)
            num_missing = table.num_missing_blocks(num_tokens)
            if num_missing + num_reserved <= self.pool.num_free_blocks:
                self.grow(sequence, num_missing)
        return table.capacity

    def release_out_of_window(self, sequence: Sequence) -> None:
        """Let go of the leading blocks that no token to be computed can see."""
        table = sequence.block_table
        start = table.num_released
        end = first_block_in_window(sequence.num_computed_tokens, self.window, self.block_size)
        if self._steps.batches:
            self._fence(sequence, table.block_ids[start:end])
        table.release_before(end)
        if table.num_released > start:
            self._updates.append(BlockTableUpdate(sequence.row, start, [0] * (table.num_released - start)))

    def release(self, sequence: Sequence) -> None:
        """Take all blocks from a sequence; what a step in flight uses of them is not free before it has retired."""
        if self._steps.batches:
            self._fence(sequence, reversed(sequence.block_table.held_block_ids()))
        sequence.block_table.release()

    def _fence(self, sequence: Sequence, block_ids: Iterable[int]) -> None:
        step_id = self._steps.last_step_of(sequence)
        if step_id is not None:
            self.pool.fence(block_ids, step_id)

    def fork(self, leader: Sequence, follower: Sequence, num_tokens: int) -> None:
        """Share the first `num_tokens` tokens, which the leader has computed. Takes one free block."""
        follower.block_table = leader.block_table.fork(num_tokens)
        follower.num_computed_tokens = num_tokens
        follower.block_keys = leader.block_keys[: 1 + num_tokens // self.block_size]
        self._copying.append(follower.block_table)
        self._log_table(follower)

    def cache_full_blocks(self, sequence: Sequence, start: int, end: int) -> None:
        """Make the blocks that were filled by computing tokens [start, end) findable.

        Not those that have left the window in a step scheduled ahead: they are held no longer. Of a prompt that is
        scored, log-probabilities are stored for whole blocks only.
        """
        first, last = start // self.block_size, end // self.block_size
        if first == last or not self.caching:
            return
        block_keys, table = sequence.block_keys, sequence.block_table
        block_ids = table.block_ids
        if table.num_released > first:
            first = table.num_released
        self.prefix_cache.extend_keys(block_keys, sequence.token_ids, last)
        num_scored = 0 if sequence.scoring_depth is None else sequence.num_prompt_tokens // self.block_size
        for index in range(first, last):
            depth = sequence.scoring_depth if index < num_scored else None
            self.prefix_cache.insert(block_keys[index + 1], block_ids[index], depth)

    def distrust(self, sequence: Sequence) -> None:
        """Make nothing findable that a failed sequence has read or written."""
        for block_id in sequence.block_table.held_block_ids():
            self.prefix_cache.forget(block_id)
        self.prefix_cache.forget_keys(sequence.block_keys)

    def take_changes(self, step_id: int) -> tuple[list[tuple[int, int]], list[BlockTableUpdate]]:
        """Page copies and table entries that the engine has not been told of yet: for this step."""
        copies = [copy for table in self._copying if (copy := table.take_copy(step_id)) is not None]
        updates = self._updates
        self._copying, self._updates = [], []
        return copies, updates

    def _log_table(self, sequence: Sequence) -> None:
        self._updates.append(BlockTableUpdate(sequence.row, 0, list(sequence.block_table.block_ids)))
