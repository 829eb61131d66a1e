"""What must hold of the scheduler's bookkeeping at every moment between two calls.

I1   The null block is never allocated, freed, cached or referenced.
I2   No reference count is negative.
I3   A block's reference count is the number of tables, and of planned copies, that hold it.
I4   Free, used and fenced blocks and the null block add up to the pool.
I5   A block is in the free list, once, exactly if nobody holds it and it is not fenced.
I6   Cache keys and cached blocks are a bijection; eviction removes both sides.
I7   No block is twice in one table, and none in a table is free.
I8   A table covers what is computed and at most what is known, or guessed and still to be generated; only what is out
     of the window was let go.
I9   0 <= computed <= known tokens; computed falls only at a preemption.
I10  A step writes only to blocks that one table holds and no key finds.
I11  Every slot before `computed` holds the content of exactly this salt and these tokens.
I12  Who waits holds no blocks, and nothing of it counts as computed.
I13  At most max_num_seqs run, each in a row of its own.
I14  A step stays within the token budget, and everybody in it computes at least one token. Drafts are for who decodes,
     never more than it may have, nor past its last token.
I15  A live sequence is in exactly one of waiting and running.
I16  Every choice has exactly one end, and nothing is told of it afterwards.
I17  While anything is live, a step computes something; without new requests everything ends.
I18  Running and waiting are in order. Nobody who waits is overtaken by a lower priority, or more often than may be, or
     after a preemption, unless the step computes for another what it would begin with, or another prompt about as long.
I19  A victim is never the oldest, and with it, or with its group, nobody holds some block any more.
I20  When nothing is live, nothing is held.
I21  Eviction takes the least recently used free block.
I23  At least the last known token is left to be computed, so there are logits to sample from; a beam that has its
     candidates waits for the others of its group.
I24  Only full blocks are cached; equal keys mean equal prefixes.
I25  Caching, chunking and preemption never change a token.
I26  What a failed step wrote is never found.
I28  A block that several tables share is at the same position in all of them.
I29  A request is told the log-probabilities of its prompt once, and those that the prompt alone would have been told.
I30  A block that is cached with log-probabilities has them, to its depth, and a deeper block takes over its key.
I31  Nobody begins to compute a block that a prompt in the same step, or in the step in flight, computes.
I32  Who decodes is in every step, as far as budget and blocks go; beside decodes prompts take no more than they may.
I33  No block is handed out while a step is in flight that reads or writes it; with none in flight, no block is fenced.
I34  A token that is not known is the last one of a sequence that samples it in a step in flight.

I2, I4, I13 and I14 are O(1) and checked in production, where the numbers change. `check_integrity` and `check_batch`
walk what can be seen in the bookkeeping of one moment; the simulator in tests/scheduler adds contents of pages (I11,
I25, I26, I29, I30) and the order of events (I9, I16 to I19, I21, I31 to I33). Not here: I22 (a child is evicted before
its parent) does not always hold, and I27 needs adapters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.config import SchedulerConfig
from quire.scheduler.output import UNKNOWN_TOKEN
from quire.scheduler.status import RUNNING, WAITING

if TYPE_CHECKING:
    from quire.scheduler.output import ScheduledBatch
    from quire.scheduler.scheduler import Scheduler
    from quire.scheduler.sequence import Sequence

NULL_BLOCK = 0


class InvariantError(RuntimeError):
    """The bookkeeping is broken; the message begins with the invariant's name."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


def check_limits(config: SchedulerConfig, num_tokens: int, num_running: int) -> None:
    """I13 and I14 in O(1), with every step."""
    if num_running > config.max_num_seqs:
        raise InvariantError("I13", f"{num_running} sequences run, {config.max_num_seqs} may")
    if not 0 < num_tokens <= config.max_num_batched_tokens:
        raise InvariantError("I14", f"{num_tokens} tokens in a step of {config.max_num_batched_tokens}")


def check_integrity(scheduler: Scheduler) -> None:
    """Everything that holds between any two calls.

    Raises:
        InvariantError: something does not hold.
    """
    check_pool(scheduler)
    check_prefix_cache(scheduler)
    check_sequences(scheduler)
    check_unknown_tokens(scheduler)
    check_queues(scheduler)
    check_keys(scheduler)


def check_pool(scheduler: Scheduler) -> None:
    """I1 to I5 and I20: every block is either free or held as often as its reference count says."""
    pool = scheduler.blocks.pool
    ref_counts, free = pool.ref_counts, pool.free_block_ids()
    num_held = [0] * pool.num_blocks
    for sequence in scheduler.running:
        for block_id in sequence.block_table.held_block_ids():
            num_held[block_id] += 1
    if ref_counts[NULL_BLOCK] or num_held[NULL_BLOCK] or NULL_BLOCK in free:
        raise InvariantError("I1", "the null block is in use")
    if min(ref_counts) < 0:
        raise InvariantError("I2", f"negative reference count: {ref_counts}")
    if num_held != ref_counts:
        wrong = [b for b in range(pool.num_blocks) if num_held[b] != ref_counts[b]]
        raise InvariantError("I3", f"reference counts of blocks {wrong} are not the number of their holders")
    if len(set(free)) != len(free) or any(map(ref_counts.__getitem__, free)):
        raise InvariantError("I5", f"a block in the free list is in use, or there twice: {free}")
    fenced = [block_id for block_id in range(pool.num_blocks) if pool.is_fenced(block_id)]
    if (fenced and not scheduler.steps.batches) or not set(fenced).isdisjoint(free):
        raise InvariantError("I33", f"blocks {fenced} are fenced, and free or not used by any step in flight")
    pool.check_count()
    num_used = pool.num_blocks - ref_counts.count(0)
    if len(free) != pool.num_free_blocks or num_used != pool.num_used_blocks:
        raise InvariantError(
            "I4", f"{len(free)} blocks in the free list and {num_used} in use; counted {pool.num_free_blocks} free"
        )
    if not scheduler.live:
        num_rows = scheduler.config.max_num_seqs
        if num_used or scheduler.running or scheduler.waiting or len(scheduler.free_rows) != num_rows:
            raise InvariantError("I20", f"no request is live and {num_used} blocks are held")


def check_prefix_cache(scheduler: Scheduler) -> None:
    """I1, I6 and I30: keys and cached blocks are a bijection, and only cached blocks count as scored."""
    cache = scheduler.blocks.prefix_cache
    cached = cache.items()
    for key, block_id in cached:
        if cache.key_of(block_id) != key:
            raise InvariantError("I6", f"block {block_id} is found by a key that is not its own")
    if cache.num_keyed_blocks() != len(cached):
        raise InvariantError("I6", "a block has a key by which it is not found")
    for block_id in range(scheduler.config.num_blocks):
        if cache.depth_of(block_id) is not None and cache.key_of(block_id) is None:
            raise InvariantError("I30", f"block {block_id} is not cached, but its log-probabilities are")
    if cache.key_of(NULL_BLOCK) is not None:
        raise InvariantError("I1", "the null block is cached")


def check_sequences(scheduler: Scheduler) -> None:
    """I7 to I9, I12, I23, I28: each sequence has the blocks for what it has computed, and no others."""
    ref_counts = scheduler.blocks.pool.ref_counts
    index_of: dict[int, int] = {}
    for sequence in scheduler.running:
        _check_table(scheduler, sequence)
        table = sequence.block_table
        held = table.block_ids[table.num_released :]
        if len(set(held)) != len(held):
            raise InvariantError("I7", f"a block twice in one table: {sequence}")
        for index, block_id in enumerate(held, table.num_released):
            if ref_counts[block_id] == 0:
                raise InvariantError("I7", f"block {block_id} is free and in a table: {sequence}")
            if index_of.setdefault(block_id, index) != index:
                raise InvariantError("I28", f"block {block_id} is shared at two different positions: {sequence}")
    for leader in scheduler.waiting:
        for sequence in (leader, *leader.followers):
            _check_holds_nothing(sequence)
    for leader in scheduler.running:
        for sequence in leader.followers:
            _check_holds_nothing(sequence)


def check_unknown_tokens(scheduler: Scheduler) -> None:
    """I34."""
    sampling = [batch.sequences[index] for batch in scheduler.steps.batches for index in batch.sampling]
    for sequence in scheduler.running:
        if UNKNOWN_TOKEN in sequence.token_ids[:-1]:
            raise InvariantError("I34", f"an unknown token is not the last: {sequence}")
        if sequence.token_ids[-1] == UNKNOWN_TOKEN and sequence not in sampling:
            raise InvariantError("I34", f"a token is unknown, and no step in flight samples it: {sequence}")
    for leader in scheduler.waiting:
        for sequence in (leader, *leader.followers):
            if UNKNOWN_TOKEN in sequence.token_ids:
                raise InvariantError("I34", f"waits with an unknown token: {sequence}")


def _check_table(scheduler: Scheduler, sequence: Sequence) -> None:
    table, computed, block_size = sequence.block_table, sequence.num_computed_tokens, scheduler.config.block_size
    num_tokens, num_blocks = len(sequence.token_ids), len(table.block_ids)
    if not 0 <= computed <= num_tokens:
        raise InvariantError("I9", f"computed is out of range: {sequence}")
    waits_for_its_group = sequence.beam is not None and sequence.beam.candidates is not None
    if computed == num_tokens and not waits_for_its_group:
        raise InvariantError("I23", f"nothing is left to compute: {sequence}")
    num_wanted = max(num_tokens, min(num_tokens + sequence.max_num_drafts, sequence.max_num_tokens - 1))
    if table.capacity != num_blocks * block_size or not computed <= table.capacity < num_wanted + block_size:
        raise InvariantError("I8", f"too few or too many blocks for {table.capacity} tokens: {sequence}")
    num_released = table.num_released
    if num_released or NULL_BLOCK in table.block_ids:
        if table.block_ids.count(NULL_BLOCK) != num_released or any(table.block_ids[:num_released]):
            raise InvariantError("I8", f"released entries are not the leading {num_released}: {sequence}")
        window = scheduler.config.sliding_window or num_tokens
        if num_released * block_size > computed - window + 1:
            raise InvariantError("I8", f"a block was released that the window still sees: {sequence}")


def _check_holds_nothing(sequence: Sequence) -> None:
    if sequence.block_table.held_block_ids() or sequence.num_computed_tokens:
        raise InvariantError("I12", f"waits, but holds blocks or counts as computed: {sequence}")


def check_queues(scheduler: Scheduler) -> None:
    """I13, I15, I18: every live sequence is in one place, in order, and has its own row while it runs."""
    running, waiting = scheduler.running, list(scheduler.waiting)
    seated = [member for leader in running for member in (leader, *leader.followers)]
    queued = [member for leader in waiting for member in (leader, *leader.followers)]
    in_place = {*seated, *queued}
    live = {sequence for choices in scheduler.live.values() for sequence in choices}
    if len(in_place) != len(seated) + len(queued) or in_place != live:
        raise InvariantError("I15", "a live sequence is not in exactly one of waiting and running")
    for sequence in running:
        if sequence.status is not RUNNING:
            raise InvariantError("I15", f"in running: {sequence}")
    for sequence in queued:
        if sequence.status is not WAITING:
            raise InvariantError("I15", f"in waiting: {sequence}")
    rows = {sequence.row for sequence in seated}.union(scheduler.free_rows)
    num_rows = scheduler.config.max_num_seqs
    if len(rows) != num_rows or len(seated) + len(scheduler.free_rows) != num_rows or not rows <= set(range(num_rows)):
        raise InvariantError("I13", f"rows are lost or given twice: {scheduler.free_rows} free, running {running}")
    for name, sequences in (("running", running), ("waiting", waiting)):
        order = [sequence.order for sequence in sequences]
        if order != sorted(order):
            raise InvariantError("I18", f"{name} is out of order: {order}")


def check_keys(scheduler: Scheduler) -> None:
    """I24: only full blocks are cached, under the key of exactly their prefix."""
    cache, block_size = scheduler.blocks.prefix_cache, scheduler.config.block_size
    for sequence in scheduler.running:
        table, num_full = sequence.block_table, sequence.num_computed_tokens // block_size
        expected = [cache.root_key(sequence.request.cache_salt)]
        cache.extend_keys(expected, sequence.token_ids, num_full)
        for index in range(table.num_released, len(table.block_ids)):
            key = cache.key_of(table.block_ids[index])
            if key is not None and (index >= num_full or key != expected[index + 1]):
                raise InvariantError("I24", f"block {table.block_ids[index]} is cached as something else: {sequence}")


def check_batch(scheduler: Scheduler, batch: ScheduledBatch) -> None:
    """I10, I13, I14, I17: a step does something, within its limits, and writes only where nobody else reads.

    For the time between schedule() and update().
    """
    pool, cache, block_size = scheduler.blocks.pool, scheduler.blocks.prefix_cache, scheduler.config.block_size
    if not batch.sequences:
        raise InvariantError("I17", "the step computes nothing")
    check_limits(scheduler.config, batch.num_tokens, len(scheduler.running))
    counts = batch.num_scheduled_tokens
    num_decodes = sum(
        num_tokens == 1 and sequence.scoring_depth is None
        for sequence, num_tokens in zip(batch.sequences, counts, strict=True)
    )
    if min(counts) < 1 or len(set(batch.sequences)) != len(counts) or num_decodes != batch.num_decodes:
        raise InvariantError("I14", f"token counts {counts}, of which {batch.num_decodes} decodes")
    sampling = []
    for position, (sequence, num_tokens) in enumerate(zip(batch.sequences, counts, strict=True)):
        start = sequence.num_computed_tokens
        end = start + num_tokens
        drafts = batch.drafts.get(position, [])
        if end == len(sequence.token_ids) + len(drafts):
            sampling.append(position)
        if drafts and not (
            num_tokens == 1 + len(drafts)
            and len(drafts) <= sequence.max_num_drafts
            and len(sequence.token_ids) + len(drafts) < sequence.max_num_tokens
        ):
            raise InvariantError("I14", f"{len(drafts)} drafts, {num_tokens} tokens to compute: {sequence}")
        if end > sequence.block_table.capacity:
            raise InvariantError("I8", f"no block to write to: {sequence}")
        for block_id in sequence.block_table.block_ids[start // block_size : (end - 1) // block_size + 1]:
            if pool.ref_counts[block_id] != 1 or cache.key_of(block_id) is not None:
                raise InvariantError("I10", f"writes to block {block_id}, which others may read: {sequence}")
    if any(sequence.scoring_depth is not None for sequence in batch.sequences[: batch.num_decodes]):
        raise InvariantError("I14", "a prompt that is scored goes with the decodes")
    if sampling != batch.sampling or any(count != 1 for count in counts[: batch.num_decodes]):
        raise InvariantError("I23", f"rows {batch.sampling} sample instead of {sampling}")
    if list(batch.drafts) != sampling[len(sampling) - len(batch.drafts) :]:
        raise InvariantError("I23", f"rows {list(batch.drafts)} have drafts, which are not the last of {sampling}")
    targets = [target for _, target in batch.block_copies]
    if len(set(targets)) != len(targets) or not {source for source, _ in batch.block_copies}.isdisjoint(targets):
        raise InvariantError("I10", f"copies overwrite each other: {batch.block_copies}")
