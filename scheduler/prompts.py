"""The part of a step that computes prompts: chunks of those that run, and the admission of those that wait."""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING

from quire.scheduler.batch_builder import BatchBuilder
from quire.scheduler.budget import PromptBudget
from quire.scheduler.cached_prefix import CachedPrefix
from quire.scheduler.request_queue import BY_ORDER
from quire.scheduler.sequence import Sequence
from quire.scheduler.status import RUNNING
from quire.scheduler.waiting_order import WaitingOrder
from quire.scheduler.window import first_block_in_window

if TYPE_CHECKING:
    from quire.scheduler.scheduler import Scheduler

MAX_NUM_PASSED_OVER = 64
"""Waiting sequences that a step leaves waiting for their own good; it looks no further."""


class Prompts:
    """The scheduler's collaborator for all that is not decoding: prompts, and what was preempted and comes back."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._config = scheduler.config
        self.order = WaitingOrder(scheduler.waiting, scheduler.blocks)
        self.max_num_tokens: int | None = None
        """Most tokens of prompts in a step that decodes too; None: what its budget leaves, and tokens cost next to
        nothing. Only for chunks."""

    def budget(self, builder: BatchBuilder) -> PromptBudget:
        """Of a step whose decodes are known."""
        most = self._config.max_num_batched_tokens
        one_by_one = self.max_num_tokens is not None and self._config.enable_chunked_prefill
        if self.max_num_tokens is not None and one_by_one:
            most = min(most, self.max_num_tokens)
        num_tokens = min(builder.budget, most) if builder.decodes else builder.budget
        return PromptBudget(num_tokens, most, one_by_one=one_by_one)

    def schedule_running(self, sequences: list[Sequence], builder: BatchBuilder, budget: PromptBudget) -> None:
        """Chunks for running sequences, the oldest first, that have not one token left to compute but more, or, if they
        are beams that wait for the others of their group, none."""
        for position, sequence in enumerate(sequences, 1):
            start = sequence.num_computed_tokens
            num_left = len(sequence.token_ids) - start
            if sequence.status is not RUNNING or num_left == 0:
                continue
            others_wait = position < len(sequences) or bool(self._scheduler.waiting)
            num_tokens = self._limit_chunk(start, num_left, budget.share(num_left, others_wait=others_wait))
            if num_tokens and self._scheduler.make_room(sequence, start + num_tokens):
                budget.spend(sequence, num_tokens)
                builder.add(sequence, num_tokens)

    def schedule_waiting(self, builder: BatchBuilder, budget: PromptBudget) -> None:
        """In their order: if one does not fit, nobody else is admitted. Who is better off waiting is passed over."""
        scheduler = self._scheduler
        waiting = scheduler.waiting
        num_passed_over = 0
        for sequence in self.order.candidates() if budget.num_tokens and scheduler.free_rows else ():
            if budget.num_tokens == 0 or 1 + len(sequence.followers) > len(scheduler.free_rows):
                break
            prefix = scheduler.blocks.find_cached_prefix(sequence)
            start = prefix.num_tokens
            num_left = len(sequence.token_ids) - start
            if self._should_wait(sequence, prefix, num_left, builder, budget):
                num_passed_over += 1
                if num_passed_over == MAX_NUM_PASSED_OVER:
                    break
                continue
            num_tokens = budget.share(num_left, others_wait=len(waiting) > 1)
            num_tokens = self._limit_chunk(start, num_left, num_tokens)
            if num_tokens == 0 or not self._has_room(sequence, prefix, start + num_tokens):
                break
            self.order.admit(sequence)
            if sequence.num_preemptions == 0:
                builder.started.append(sequence.request_id)
            self._admit(sequence, prefix, num_tokens)
            budget.spend(sequence, num_tokens)
            builder.add(sequence, num_tokens)

    def top_up(self, builder: BatchBuilder, budget: PromptBudget) -> None:
        """What is left goes to the long prompt that gave way, if there are blocks for it that nobody else needs."""
        sequence = budget.long
        if sequence is None or budget.num_tokens == 0 or sequence not in builder.chunks:
            return
        start, num_tokens = sequence.num_computed_tokens, builder.chunks[sequence]
        num_left, blocks = len(sequence.token_ids) - start, self._scheduler.blocks
        end = start + self._limit_chunk(start, num_left, num_tokens + budget.num_tokens)
        num_missing = sequence.block_table.num_missing_blocks(end)
        num_rows = self._config.max_num_seqs - len(self._scheduler.free_rows)
        if num_missing + num_rows <= blocks.pool.num_free_blocks:
            if num_missing:
                blocks.grow(sequence, num_missing)
            budget.spend(sequence, end - start - num_tokens)
            builder.extend(sequence, end - start - num_tokens)

    def _should_wait(
        self, sequence: Sequence, prefix: CachedPrefix, num_left: int, builder: BatchBuilder, budget: PromptBudget
    ) -> bool:
        """Whether this step computes another prompt about as long, or this one or the one in flight what the sequence
        would begin with.

        The latter it finds cached a little later, and no later than it could have computed it. Only who computes in
        these very steps makes others wait: whoever is aborted, fails or is preempted does so no more.
        """
        if not budget.gives_way_to(num_left):
            return True
        blocks, in_flight = self._scheduler.blocks, self._scheduler.steps.prompts
        writers = [(writer, writer.num_computed_tokens) for writer in builder.chunks]
        return any(blocks.is_computing(*writer, sequence, prefix) for writer in writers + in_flight)

    def _limit_chunk(self, start: int, num_tokens: int, budget: int) -> int:
        """How many of `num_tokens` tokens from `start` on to compute at once."""
        config = self._config
        if num_tokens > budget and not config.enable_chunked_prefill:
            return 0
        first_block = first_block_in_window(start, config.sliding_window, config.block_size)
        end_of_pool = (first_block + config.num_usable_blocks) * config.block_size
        return min(num_tokens, budget, end_of_pool - start)

    def _has_room(self, sequence: Sequence, prefix: CachedPrefix, end: int) -> bool:
        """Whether all its tokens fit now; with a sliding window, those up to `end`.

        Every row in use must keep a block to grow into, or the newest would be preempted as soon as it has begun:
        that is a fifth of the preemptions, or fewer, at no loss of speed (benchmarks/paging.py, "pressure").
        """
        scheduler = self._scheduler
        num_tokens = len(sequence.token_ids) if self._config.sliding_window is None else end
        num_blocks = scheduler.blocks.num_blocks_to_start(prefix, num_tokens)
        num_blocks += scheduler.beams.num_blocks_to_fork(sequence)
        if scheduler.running:
            num_blocks += self._config.max_num_seqs - len(scheduler.free_rows) + len(sequence.followers)
        return num_blocks <= scheduler.blocks.pool.num_free_blocks

    def _admit(self, sequence: Sequence, prefix: CachedPrefix, num_tokens: int) -> None:
        scheduler = self._scheduler
        for member in (sequence, *sequence.followers):
            member.row = scheduler.free_rows.pop()
        start = prefix.num_tokens
        scheduler.blocks.start(sequence, prefix, start + num_tokens)
        sequence.run()
        insort(scheduler.running, sequence, key=BY_ORDER)
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = start
        scheduler.count_prefix_hit(sequence, start)
