"""The scheduler with eyes on it: what is only visible at the moment it happens."""

from __future__ import annotations

from collections import Counter

from quire.config import SchedulerConfig
from quire.scheduler.block_pool import BlockPool
from quire.scheduler.choices import Choices
from quire.scheduler.invariants import InvariantError
from quire.scheduler.output import ErrorCode, StepOutput
from quire.scheduler.prefix_cache import PrefixCache
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sequence import Sequence
from quire.scheduler.status import RUNNING
from simulation.ghost import GhostModel


class WatchedPool(BlockPool):
    """Keeps the LRU order a second time, by time of release (I21), and scrambles what is handed out."""

    __slots__ = ("_ghost", "_released", "marks")

    def __init__(self, pool: BlockPool, ghost: GhostModel, marks: Counter[str]) -> None:
        super().__init__(pool.num_blocks, pool._prefix_cache)
        self._ghost = ghost
        self._released = dict.fromkeys(range(1, pool.num_blocks))
        self.marks = marks

    def allocate(self, num_blocks: int) -> list[int]:
        oldest = [block_id for block_id, _ in zip(self._released, range(num_blocks), strict=False)]
        self.marks["eviction"] += sum(self._prefix_cache.key_of(block_id) is not None for block_id in oldest)
        block_ids = super().allocate(num_blocks)
        if block_ids != oldest:
            raise InvariantError("I21", f"blocks {block_ids} are evicted, {oldest} are the least recently used")
        for block_id in block_ids:
            del self._released[block_id]
            if any(block_id in used for used in self._ghost.uses):
                raise InvariantError("I33", f"block {block_id} is handed out, and a step in flight uses it")
            self._ghost.scramble(block_id)
        return block_ids

    def share(self, block_id: int) -> None:
        super().share(block_id)
        self._released.pop(block_id, None)

    def release(self, block_ids) -> None:
        block_ids = list(block_ids)
        super().release(block_ids)
        for block_id in block_ids:
            if self.ref_counts[block_id] == 0 and not self.is_fenced(block_id):
                self._released[block_id] = None

    def retire(self, step_id: int) -> None:
        fenced = list(self._last_uses)
        super().retire(step_id)
        for block_id in fenced:
            if self.ref_counts[block_id] == 0 and not self.is_fenced(block_id):
                self._released[block_id] = None
                self.marks["fence lifted"] += 1


class WatchedPrefixCache(PrefixCache):
    """Sees that the deeper of two blocks is found (I30)."""

    __slots__ = ("marks",)

    def insert(self, key: bytes, block_id: int, depth: int | None = None) -> None:
        holder = self._block_ids.get(key)
        super().insert(key, block_id, depth)
        stored = self.depth_of(self._block_ids[key])
        if depth is not None and (stored is None or stored < depth):
            raise InvariantError("I30", f"block {block_id} has depth {depth}, the one that is found {stored}")
        self.marks["key taken over by a deeper block"] += holder not in (None, self._block_ids[key])


class WatchedChoices(Choices):
    def __init__(self, scheduler: Scheduler, marks: Counter[str]) -> None:
        super().__init__(scheduler)
        self.marks = marks

    def fork_followers(self, leader: Sequence) -> None:
        num_followers, num_running = len(leader.followers), len(self._scheduler.running)
        super().fork_followers(leader)
        num_forked = len(self._scheduler.running) - num_running
        self.marks["fork"] += num_forked
        self.marks["no block left to fork into"] += num_followers - num_forked


class WatchedScheduler(Scheduler):
    """Checks every victim (I19) and counts what happens, so that a run can say what it has covered."""

    def __init__(self, config: SchedulerConfig, max_preemptions: int, ghost: GhostModel) -> None:
        super().__init__(config, max_preemptions=max_preemptions)
        self.marks = ghost.marks
        self.choices = WatchedChoices(self, self.marks)
        cache = WatchedPrefixCache(
            config.num_blocks, config.block_size, namespace=config.cache_namespace, window=config.sliding_window
        )
        cache.marks = self.marks
        self.blocks.prefix_cache = self.blocks.pool._prefix_cache = cache
        self.blocks.pool = WatchedPool(self.blocks.pool, ghost, self.marks)
        self._freed_nothing: list[set[int]] = []
        self.sat_out: set[Sequence] = set()
        """Who found no block in the last step."""

    def schedule(self):
        self.sat_out.clear()
        batch = super().schedule()
        if self._freed_nothing:
            raise InvariantError("I19", "victims were preempted and no block came free")
        return batch

    def make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        num_preemptions = self._counters.num_preemptions
        done = super().make_room(sequence, num_tokens)
        self.marks["waits for a fence"] += not done and self.blocks.pool.num_fenced_blocks > 0
        if not done:
            self.sat_out.add(sequence)
        if not done and self._counters.num_preemptions == num_preemptions:
            self.marks["sits out a step"] += 1
        return done

    def _take_tokens(self, sequence: Sequence, token_ids: list[int | None], error: ErrorCode) -> StepOutput:
        output = super()._take_tokens(sequence, token_ids, error)
        if len(token_ids) > 1:
            self.marks["draft cut by a stop"] += len(output.token_ids) < len(token_ids) and None not in token_ids
            self.marks["draft cut by a failure"] += None in token_ids
            self.marks["draft after a preemption"] += sequence.num_preemptions > 0
        return output

    def preempt(self, sequence: Sequence) -> None:
        if sequence.status is not RUNNING:
            return
        unit = [sequence] if sequence.beam is None else sequence.beam.group.live
        if self.running[0] in unit:
            raise InvariantError("I19", f"the oldest is preempted: {sequence}")
        marks, ref_counts = self.marks, self.blocks.pool.ref_counts
        marks["preemption of a beam group"] += sequence.beam is not None and len(unit) > 1
        marks["preemption"] += 1
        marks["preemption of a leader with followers"] += bool(sequence.followers)
        marks["preemption of a pinned sequence"] += sequence.num_preemptions >= self.max_preemptions
        held = {block_id for member in unit for block_id in member.block_table.held_block_ids()}
        marks["preemption of shared blocks"] += any(ref_counts[block_id] > 1 for block_id in held)
        super().preempt(sequence)
        freed = {block_id for block_id in held if ref_counts[block_id] == 0}
        if not freed:
            self._freed_nothing.append(held)
            return
        if any(not group & freed for group in self._freed_nothing):
            raise InvariantError("I19", f"a victim gave nothing: blocks {self._freed_nothing}, then {freed}")
        marks["group of victims"] += bool(self._freed_nothing)
        self._freed_nothing.clear()
