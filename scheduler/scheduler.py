"""Continuous batching over a paged KV-cache, as integer bookkeeping.

There is no prefill phase and no decode phase. Every sequence has `num_computed_tokens`, which chases the number of its
tokens; a step hands out a budget of tokens to compute. Chunked prefill, prefix hits, forks, preempted sequences that
come back and plain decoding are all the same loop. (The idea is that of vLLM's v1 scheduler.) Decodes come first in a
step, so that no prompt delays them by more than what a step may compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from quire.config import SchedulerConfig
from quire.scheduler import invariants
from quire.scheduler.admission import max_sequence_tokens
from quire.scheduler.batch_builder import BatchBuilder
from quire.scheduler.beam import BeamGroup
from quire.scheduler.beam_search import BeamSearch
from quire.scheduler.block_manager import BlockManager
from quire.scheduler.budget import StepBudget
from quire.scheduler.choices import Choices
from quire.scheduler.output import (
    ErrorCode,
    FinishReason,
    SampledTokens,
    ScheduledBatch,
    SchedulerStats,
    StepOutput,
    StepOutputs,
    TokenLogProbs,
    TokenRow,
)
from quire.scheduler.preemption import MAX_PREEMPTIONS, choose_victims
from quire.scheduler.prompts import Prompts
from quire.scheduler.request import AdmissionError, Request
from quire.scheduler.request_queue import RequestQueue
from quire.scheduler.sequence import Sequence
from quire.scheduler.speculation import Speculator
from quire.scheduler.status import FINISHED, RUNNING, WAITING
from quire.scheduler.steps_in_flight import MAX_STEPS_IN_FLIGHT, StepsInFlight


class Scheduler:
    """Decides what each step computes. Pure and deterministic: no clock, no device.

    `update()` answers what `schedule()` hands out, in order. One more step may be scheduled while one is in flight: see
    `StepsInFlight`. `add()` and `abort()` may come between them at any point.
    """

    def __init__(self, config: SchedulerConfig, *, max_preemptions: int = MAX_PREEMPTIONS) -> None:
        self.config = config
        self.max_preemptions = max_preemptions
        self.steps = StepsInFlight()
        self.blocks = BlockManager(config, self.steps)
        self.waiting = RequestQueue()
        self.running: list[Sequence] = []
        """In order, the oldest first; followers are reached through their leader."""
        self.live: dict[str, list[Sequence]] = {}
        """The choices that have not ended, by request."""
        self.free_rows = list(reversed(range(config.max_num_seqs)))
        most = config.max_num_batched_tokens
        self.step_budget = StepBudget(most, 1 if config.enable_chunked_prefill else most)
        self.prompts = Prompts(self)
        self.choices = Choices(self)
        self.beams = BeamSearch(self)
        self._num_arrivals = 0
        self._num_live = 0
        self._counters = SchedulerStats()
        self.speculator = Speculator(config, self.blocks, self._counters)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            AdmissionError: it can never run here, or its id is in use.
        """
        max_num_tokens = max_sequence_tokens(request, self.config)
        if request.request_id in self.live:
            raise AdmissionError("A request with this id is live.", code="duplicate_request_id", param="request_id")
        priority = request.priority if self.config.policy == "priority" else 0
        root_key = self.blocks.prefix_cache.root_key(request.cache_salt)
        sequences = [
            Sequence(
                request,
                choice_index,
                order=(priority, self._num_arrivals, choice_index),
                max_num_tokens=max_num_tokens,
                block_table=self.blocks.new_table(),
                block_keys=[root_key],
            )
            for choice_index in range(request.params.num_sequences)
        ]
        self._num_arrivals += 1
        self._num_live += len(sequences)
        self.live[request.request_id] = sequences
        if request.params.use_beam_search:
            BeamGroup(request, sequences)
        for sequence in sequences:
            self.speculator.watch(sequence)
        self.choices.enqueue(sequences)

    def abort(self, request_id: str, choice_index: int | None = None) -> None:
        """End a request, or one choice of it, without output. What is not live is ignored.

        Beams are no choices before they have ended: a beam search ends when all its choices are aborted.
        """
        group = self._beam_group(request_id)
        if group is not None:
            if choice_index is None or group.renounce(choice_index):
                self.beams.end(group)
            return
        for sequence in self.live.get(request_id, [])[::-1]:  # followers first: they need no new leader
            if choice_index is None or sequence.choice_index == choice_index:
                self.choices.abort(sequence)

    def has_work(self) -> bool:
        return bool(self.live)

    def schedule(self) -> ScheduledBatch | None:
        """Choose what the next step computes; None if there is nothing to do, or nothing before update() is called."""
        builder = BatchBuilder(self.step_budget.num_tokens)
        num_preemptions, candidates = self._counters.num_preemptions, self.running
        if self.steps.batches:
            # Who was preempted with a step in flight must not run again before that step's row of it was passed over.
            num_preemptions, candidates = self.steps.num_preemptions, self._run_ahead()
        others = self._schedule_decodes(candidates, builder)
        budget = self.prompts.budget(builder)
        self.prompts.schedule_running(others, builder, budget)
        if self._counters.num_preemptions == num_preemptions:
            self.prompts.schedule_waiting(builder, budget)
            self.prompts.top_up(builder, budget)
        else:
            builder.drop_preempted()
        if self.speculator.active:
            self.speculator.add_drafts(builder, self.config.max_num_seqs - len(self.free_rows))
        if builder.empty:
            self.steps.move_back()
            return None
        step_id = self._counters.num_steps
        batch = builder.build(step_id, *self.blocks.take_changes(step_id))
        self.steps.add(batch, self._counters.num_preemptions)
        self._counters.num_steps += 1
        num_tokens = self.step_budget.num_tokens - builder.budget
        self._counters.num_scheduled_tokens += num_tokens
        invariants.check_limits(self.config, num_tokens, len(self.running))
        return batch

    def _run_ahead(self) -> list[Sequence]:
        """Who may be scheduled while a step is in flight; those of its sequences that go on are moved ahead."""
        if len(self.steps.batches) == MAX_STEPS_IN_FLIGHT:
            raise RuntimeError(f"schedule() was called with {MAX_STEPS_IN_FLIGHT} steps in flight.")
        staying = self.steps.run_ahead()
        return [sequence for sequence in self.running if sequence not in staying]

    def _schedule_decodes(self, candidates: list[Sequence], builder: BatchBuilder) -> list[Sequence]:
        """The oldest first; who needs a block that is not there takes it from the newest.

        Returns:
            The others that run.
        """
        decodes, budget = builder.decodes, builder.budget
        others = []
        for sequence in tuple(candidates):
            if sequence.status is not RUNNING:
                continue
            start = sequence.num_computed_tokens
            if len(sequence.token_ids) - start != 1 or sequence.scoring_depth is not None:
                others.append(sequence)
            elif budget and (start < sequence.block_table.capacity or self.make_room(sequence, start + 1)):
                decodes.append(sequence)
                budget -= 1
        builder.budget = budget
        return others

    def count_prefix_hit(self, sequence: Sequence, num_tokens: int) -> None:
        if self.config.enable_prefix_caching:
            self._counters.prefix_cache_queries += len(sequence.token_ids)
            self._counters.prefix_cache_hits += num_tokens

    def make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence blocks for its first `num_tokens` tokens; False if it cannot run in this step."""
        if self.config.sliding_window is not None:
            self.blocks.release_out_of_window(sequence)
        num_missing, pool = sequence.block_table.num_missing_blocks(num_tokens), self.blocks.pool
        while num_missing > pool.num_free_blocks:
            if num_missing <= pool.num_free_blocks + pool.num_fenced_blocks:
                return False  # there will be enough as soon as the step in flight has retired
            victims = self.choose_victims(sequence)
            for victim in victims:
                self.preempt(victim)
            if not victims or sequence in victims:
                return False
        if num_missing:
            self.blocks.grow(sequence, num_missing)
        return True

    def choose_victims(self, requester: Sequence) -> list[Sequence]:
        """Who is to give way for `requester`: see scheduler.preemption."""
        return choose_victims(self.running, requester, self.blocks.pool.ref_counts, self.max_preemptions)

    def preempt(self, sequence: Sequence) -> None:
        """Back to the queue, followers and all, to be computed again; whatever is still cached then is found."""
        if sequence.status is not RUNNING:  # a beam whose group has gone already
            return
        self._counters.num_preemptions += 1
        if sequence.beam is not None:
            self.beams.preempt(sequence.beam.group)
            return
        self.running.remove(sequence)
        self.free_rows += [member.row for member in (sequence, *sequence.followers)]
        self.blocks.release(sequence)
        sequence.drop_unknown_token()
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        sequence.status = WAITING
        self.waiting.push(sequence)

    def update(self, batch: ScheduledBatch, sampled: SampledTokens) -> StepOutputs:
        """Take in what a step computed; what was aborted since schedule() is passed over.

        Only here do blocks become findable in the prefix cache: the step that wrote them has retired.
        """
        self.steps.retire(batch)
        self.blocks.pool.retire(batch.step_id)
        if self.step_budget.is_short:
            self.step_budget.grow()
        if len(batch.sampling) < len(batch.sequences):
            self._advance_chunks(batch)
        tokens: list[TokenRow] = []
        others: list[StepOutput] = []
        sequences, log_probs = batch.sequences, sampled.log_probs
        without_drafts = batch.sampling[: len(batch.sampling) - len(batch.drafts)]
        rows = zip(without_drafts, sampled.token_ids, strict=not batch.drafts)
        for row, (index, token_id) in enumerate(rows):
            sequence = sequences[index]
            if sequence.status is not RUNNING:
                continue
            token_ids = sequence.token_ids
            end = len(token_ids)
            may_end = end >= sequence.next_review or token_id in sequence.stop_token_ids
            if token_id is None or row in log_probs or (may_end and not self._only_fills_block(sequence, token_id)):
                others += self._take_row(sequence, batch, sampled, row)
            else:
                token_ids.append(token_id)
                if may_end:
                    self._review(sequence, end)
                sequence.num_computed_tokens = end
                tokens.append((sequence.request_id, sequence.choice_index, token_id, sequence.num_cached_tokens))
        others += self.speculator.verify(batch, sampled, self._take_tokens)
        if any(output.finish_reason is not None for output in others):
            self.running = [sequence for sequence in self.running if sequence.status is RUNNING]
        others += self.beams.advance()
        self.blocks.pool.check_count()
        return StepOutputs(tokens, others)

    def withdraw(self, batch: ScheduledBatch) -> bool:
        """In place of update(): the step did not fit into the device's memory, and nothing was submitted behind it.

        Its sequences are where they were before, its copies count as made, and steps are smaller for a while.

        Returns:
            False if they cannot be smaller.
        """
        self.steps.retire(batch)
        self.blocks.pool.retire(batch.step_id)
        return self.step_budget.shrink(batch.num_tokens)

    def _only_fills_block(self, sequence: Sequence, token_id: int) -> bool:
        """The token ends a block, and that is all there is to it."""
        return (
            len(sequence.token_ids) + 1 < sequence.max_num_tokens
            and token_id not in sequence.stop_token_ids
            and sequence.beam is None
            and sequence.scoring_depth is None
        )

    def _take_row(
        self, sequence: Sequence, batch: ScheduledBatch, sampled: SampledTokens, row: int
    ) -> Iterator[StepOutput]:
        """Take in a row with more to it than one more token; beams are told nothing before all of them are here."""
        token_id, prompt_log_probs = sampled.token_ids[row], sampled.prompt_log_probs.get(batch.sampling[row])
        if sequence.beam is not None:
            self.beams.take(sequence, sampled.candidates.get(row), sampled.failures.get(row))
            if sequence.scoring_depth is not None and row in sampled.candidates:
                yield self.beams.prompt_output(sequence, prompt_log_probs)
            return
        output = self._take_tokens(sequence, [token_id], sampled.failures.get(row, "numerical_error"))
        if row in sampled.log_probs:
            output.log_probs = [sampled.log_probs[row]][: len(output.token_ids)]
        if sequence.scoring_depth is not None and token_id is not None:
            output.prompt_log_probs = self.end_scoring(sequence, prompt_log_probs)
        yield output

    def _take_tokens(self, sequence: Sequence, token_ids: list[int | None], error: ErrorCode) -> StepOutput:
        """Append tokens as so many steps would have done, up to the first that ends the sequence."""
        taken: list[int] = []
        finish_reason = stop_reason = None
        for token_id in token_ids:
            if token_id is None:
                failed = self._fail(sequence, error)
                failed.token_ids = taken
                return failed
            end = len(sequence.token_ids)
            if end < sequence.max_num_tokens:  # a request may ask for none
                sequence.token_ids.append(token_id)
                taken.append(token_id)
            if end >= sequence.next_review or token_id in sequence.stop_token_ids:
                finish_reason, stop_reason = self._review(sequence, end)
            sequence.num_computed_tokens = end
            if finish_reason is not None:
                self.end_running(sequence)
                break
        return StepOutput(
            sequence.request_id,
            sequence.choice_index,
            taken,
            finish_reason,
            stop_reason,
            sequence.num_cached_tokens,
        )

    def _review(self, sequence: Sequence, end: int) -> tuple[FinishReason | None, int | None]:
        """A block is full, the prompt is computed, or the sequence may be at its end: `end` tokens are computed now."""
        self.blocks.cache_full_blocks(sequence, sequence.num_computed_tokens, end)
        if sequence.followers:
            self.choices.fork_followers(sequence)
        block_size = self.config.block_size
        sequence.next_review = min((end // block_size + 1) * block_size, sequence.max_num_tokens - 1)
        return sequence.finish_reason()

    def end_scoring(
        self, sequence: Sequence, prompt_log_probs: list[TokenLogProbs] | None
    ) -> list[TokenLogProbs] | None:
        """The prompt is computed: the request is told of it once, whichever of its choices came first."""
        for choice in self.live.get(sequence.request_id, ()):
            choice.scoring_depth = None
        return prompt_log_probs

    def _fail(self, sequence: Sequence, error: ErrorCode) -> StepOutput:
        """There is no token. If logits were not finite, what it has read or written is not to be found by others."""
        if error == "numerical_error":
            self.blocks.distrust(sequence)
        self.end_running(sequence)
        return StepOutput(
            sequence.request_id,
            sequence.choice_index,
            [],
            FinishReason.ERROR,
            num_cached_tokens=sequence.num_cached_tokens,
            error=error,
        )

    def _advance_chunks(self, batch: ScheduledBatch) -> None:
        """The sequences of a batch that do not sample: their prompt is not computed to its end yet."""
        sampling = set(batch.sampling)
        for index, (sequence, num_tokens) in enumerate(zip(batch.sequences, batch.num_scheduled_tokens, strict=True)):
            if index not in sampling and sequence.status is RUNNING:
                start = sequence.num_computed_tokens
                sequence.num_computed_tokens = start + num_tokens
                self.blocks.cache_full_blocks(sequence, start, start + num_tokens)
                if sequence.beam is not None:
                    self.beams.take_chunk(sequence.beam.group)

    def end_running(self, sequence: Sequence) -> None:
        """All that a running sequence holds goes back; the caller takes it out of `running`."""
        self.choices.orphan_followers(sequence)
        self.free_rows.append(sequence.row)
        self.blocks.release(sequence)
        self.forget(sequence)

    def _beam_group(self, request_id: str) -> BeamGroup | None:
        choices = self.live.get(request_id)
        return None if not choices or choices[0].beam is None else choices[0].beam.group

    def forget(self, sequence: Sequence) -> None:
        """It has ended, and holds nothing."""
        sequence.status = FINISHED
        self.speculator.forget(sequence)
        choices = self.live[sequence.request_id]
        choices.remove(sequence)
        self._num_live -= 1
        if not choices:
            del self.live[sequence.request_id]

    def reset_prefix_cache(self) -> None:
        """Nothing computed before is found again. Live sequences keep their blocks."""
        self.blocks.prefix_cache.clear()

    def stats(self) -> SchedulerStats:
        pool = self.blocks.pool
        num_running = self.config.max_num_seqs - len(self.free_rows)
        return replace(
            self._counters,
            num_running=num_running,
            num_waiting=self._num_live - num_running,
            num_free_blocks=pool.num_free_blocks,
            num_used_blocks=pool.num_used_blocks + pool.num_fenced_blocks,
        )

    def check_integrity(self) -> None:
        """Walk all bookkeeping; raises invariants.InvariantError."""
        invariants.check_integrity(self)
