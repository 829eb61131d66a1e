"""Who is in a step and who is not: I18, I31, I32, judged from tokens alone."""

from __future__ import annotations

from collections import Counter

from quire.scheduler.budget import LONG_PROMPT_STEPS
from quire.scheduler.invariants import InvariantError
from quire.scheduler.output import ScheduledBatch
from quire.scheduler.sequence import Sequence
from simulation.watched import WatchedScheduler


class OrderChecks:
    def __init__(self, scheduler: WatchedScheduler) -> None:
        self._scheduler = scheduler
        self._num_evictions = 0
        self._decoding: list[Sequence] = []
        self._in_flight: list[tuple[Sequence, int]] = []
        """Who computes a prompt in the step in flight, and from which token on."""
        self._overtakes: Counter[Sequence] = Counter()

    def before_step(self, batches: list[ScheduledBatch]) -> None:
        """With what is in flight."""
        scheduler = self._scheduler
        self._num_evictions = scheduler.marks["eviction"]
        decoding = {sequence: decodes(sequence) for sequence in scheduler.running}
        self._in_flight = []
        for batch in batches:
            for index, (sequence, num_tokens) in enumerate(
                zip(batch.sequences, batch.num_scheduled_tokens, strict=True)
            ):
                if sequence in decoding:
                    decoding[sequence] = decodes_next(sequence, num_tokens, samples=index in batch.sampling)
                    if index >= batch.num_decodes:
                        self._in_flight.append((sequence, sequence.num_computed_tokens))
        self._decoding = [sequence for sequence, is_decoding in decoding.items() if is_decoding]

    def check(self, batch: ScheduledBatch) -> None:
        """I32."""
        scheduler, marks = self._scheduler, self._scheduler.marks
        computing = set(batch.sequences)
        num_decodes = sum(sequence in computing for sequence in self._decoding)
        left_out = [sequence for sequence in self._decoding if sequence not in computing]
        left_out = [sequence for sequence in left_out if sequence in scheduler.running]
        if num_decodes < scheduler.step_budget.num_tokens and not scheduler.sat_out.issuperset(left_out):
            raise InvariantError("I32", f"could decode, and is not in the step: {left_out}")
        num_drafts = sum(map(len, batch.drafts.values()))
        num_prompt_tokens = batch.num_tokens - num_decodes - num_drafts
        limit = scheduler.prompts.max_num_tokens
        if num_decodes and limit is not None:
            if num_prompt_tokens > limit:
                raise InvariantError("I32", f"{num_prompt_tokens} tokens of prompts beside decodes, {limit} may be")
            marks["prompts limited beside decodes"] += num_prompt_tokens == limit

    def check_admitted(self, sequence: Sequence, batch: ScheduledBatch) -> None:
        """I18 and I31, of one that begins in this step, and not as a fork."""
        scheduler, marks = self._scheduler, self._scheduler.marks
        block_size = scheduler.config.block_size
        position = batch.sequences.index(sequence)
        writers = [] if position < batch.num_decodes else batch.sequences[batch.num_decodes : position]
        num_found = sequence.num_computed_tokens // block_size
        if sequence.scoring_depth is not None:  # its last cached token is computed again
            num_found = (sequence.num_computed_tokens + 1) // block_size
        end = (num_found + 1) * block_size
        starts = [(writer, writer.num_computed_tokens) for writer in writers] + self._in_flight
        starts = [(writer, start) for writer, start in starts if len(writer.block_keys) > end // block_size]
        if any(writes_for(*start, sequence, end) for start in starts) and can_hit(scheduler, sequence, end):
            raise InvariantError("I31", f"computes what another does: {sequence}")
        for waiting in scheduler.waiting:
            if waiting.order >= sequence.order:
                break
            if self._waits_for_good_reason(waiting, batch):
                marks["overtaking for a good reason"] += 1
                continue
            self._overtakes[waiting] += 1
            is_fair = waiting.order[0] == sequence.order[0] and waiting.num_preemptions == 0
            if not is_fair or self._overtakes[waiting] > scheduler.prompts.order.max_overtakes:
                raise InvariantError("I18", f"{sequence} overtook {waiting}")
            marks["overtaking by a longer cached prefix"] += 1

    def _waits_for_good_reason(self, waiting: Sequence, batch: ScheduledBatch) -> bool:
        scheduler = self._scheduler
        others = [other for other in batch.sequences if not decodes(other)]
        block_size = scheduler.config.block_size
        for writer, start in [(other, other.num_computed_tokens) for other in others] + self._in_flight:
            first = start // block_size
            if scheduler.marks["eviction"] == self._num_evictions:
                missing = [
                    index for index, key in enumerate(waiting.block_keys[1:]) if not is_found(scheduler, key, waiting)
                ]
                if scheduler.config.sliding_window is None and missing and missing[0] < first:
                    continue
            if writes_for(writer, start, waiting, (first + 1) * block_size) and scheduler.config.enable_prefix_caching:
                return True
        long_from = scheduler.config.max_num_batched_tokens
        if scheduler.prompts.max_num_tokens is not None:
            long_from = min(long_from, scheduler.prompts.max_num_tokens)
        lengths = [len(other.token_ids) - other.num_computed_tokens for other in others]
        return len(waiting.token_ids) > LONG_PROMPT_STEPS * long_from < max(lengths, default=0)


def decodes(sequence: Sequence) -> bool:
    return len(sequence.token_ids) - sequence.num_computed_tokens == 1 and sequence.scoring_depth is None


def is_found(scheduler: WatchedScheduler, key: bytes, sequence: Sequence) -> bool:
    cache = scheduler.blocks.prefix_cache
    block_id = cache._block_ids.get(key)
    if block_id is None or sequence.scoring_depth is None:
        return block_id is not None
    stored = cache.depth_of(block_id)
    return stored is not None and stored >= sequence.scoring_depth


def decodes_next(sequence: Sequence, num_tokens: int, *, samples: bool) -> bool:
    """Whether the step in flight, which computes `num_tokens` of it, leaves it one token to compute, known or not."""
    if not samples:
        return sequence.scoring_depth is None and (
            len(sequence.token_ids) - sequence.num_computed_tokens - num_tokens == 1
        )
    if sequence.beam is not None or sequence.scoring_depth is not None or sequence.followers:
        return False
    return not sequence.max_num_drafts and len(sequence.token_ids) + 1 < sequence.max_num_tokens


def writes_for(writer: Sequence, start: int, sequence: Sequence, end: int) -> bool:
    """Whether the writer, from token `start` on, computes the block that ends at `end`, with the sequence's content."""
    depth = sequence.scoring_depth
    return (
        writer is not sequence
        and start < end <= len(writer.token_ids)
        and writer.token_ids[:end] == sequence.token_ids[:end]
        and writer.request.cache_salt == sequence.request.cache_salt
        and (depth is None or (writer.scoring_depth is not None and writer.scoring_depth >= depth))
    )


def can_hit(scheduler: WatchedScheduler, sequence: Sequence, end: int) -> bool:
    """Whether a prefix hit could cover `end` tokens."""
    if not scheduler.config.enable_prefix_caching:
        return False
    if sequence.scoring_depth is None:
        return end <= sequence.num_hittable_tokens
    return end <= len(sequence.token_ids) <= scheduler.config.max_pool_tokens - scheduler.config.block_size
