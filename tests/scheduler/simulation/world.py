"""A scheduler, the ghost model it drives, and what the outside has been told: everything is checked at every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from quire.config import SchedulerConfig
from quire.scheduler import invariants
from quire.scheduler.invariants import InvariantError
from quire.scheduler.output import (
    UNKNOWN_TOKEN,
    FinishReason,
    SampledTokens,
    ScheduledBatch,
    StepOutput,
    StepOutputs,
)
from quire.scheduler.preemption import MAX_PREEMPTIONS
from quire.scheduler.request import AdmissionError, Request
from quire.scheduler.sequence import Sequence
from quire.scheduler.status import FINISHED, RUNNING
from simulation.ghost import POISON, GhostModel, Poison, log_prob, oracle, oracle_of_prompt
from simulation.order_checks import OrderChecks
from simulation.watched import WatchedScheduler

KEYS_EVERY = 16
"""Steps between two recomputations of all keys; all other checks run at every step."""


def num_wanted(sequences: list[Sequence]) -> int:
    """Choices of one request that are still to be told something."""
    group = sequences[0].beam.group if sequences[0].beam is not None else None
    return len(sequences) if group is None else group.request.params.n - len(group.unwanted)


@dataclass(slots=True)
class Choice:
    """What the outside has been told of one choice of one request."""

    request: Request
    sequence: Sequence
    token_ids: list[int]


@dataclass(slots=True)
class Flight:
    """A step between schedule() and update(), which the ghost has computed already."""

    batch: ScheduledBatch
    sampled: SampledTokens
    poison: Poison | None


class World:
    """`marks` counts what has happened, so that a run can show that it was worth something."""

    def __init__(self, config: SchedulerConfig, vocab_size: int, max_preemptions: int = MAX_PREEMPTIONS) -> None:
        self.config = config
        self.vocab_size = vocab_size
        self.ghost = GhostModel(config, vocab_size)
        self.scheduler = WatchedScheduler(config, max_preemptions, self.ghost)
        self.marks: Counter[str] = self.scheduler.marks
        self.open: dict[tuple[str, int], Choice] = {}
        """Choices that have had no end yet: neither finished nor aborted."""
        self.flights: list[Flight] = []
        """The oldest first."""
        self.order = OrderChecks(self.scheduler)
        self.num_steps = 0
        self.max_preemptions_seen = 0
        self._num_preemptions = 0
        self._progress: dict[Sequence, tuple[int, int]] = {}
        self._told: set[str] = set()
        """Requests that were told the log-probabilities of their prompt."""
        self._depth_of_block: dict[int, tuple[bytes, int]] = {}
        self._content_of_key: dict[bytes, int] = {}
        self._key_of_content: dict[int, bytes] = {}

    def submit(self, request: Request) -> None:
        try:
            self.scheduler.add(request)
        except AdmissionError as error:
            self.marks[f"refused: {error.code}"] += 1
            return
        sequences = self.scheduler.live[request.request_id]
        num_choices = request.params.n if request.params.use_beam_search else len(sequences)
        for sequence in sequences[:num_choices]:
            self.open[request.request_id, sequence.choice_index] = Choice(request, sequence, [])

    def abort(self, request_id: str, choice_index: int | None, moment: str) -> None:
        """Abort what is open, twice: the second time it is no longer known."""
        ended = [key for key in self.open if key[0] == request_id and choice_index in (None, key[1])]
        for key in ended:
            self._mark_abort(self.open[key].sequence, moment)
        self.scheduler.abort(request_id, choice_index)
        for key in ended:
            self._end(key)
        self.scheduler.abort(request_id, choice_index)

    def reset_prefix_cache(self) -> None:
        self.marks["cache reset"] += 1
        self.scheduler.reset_prefix_cache()

    def step(
        self,
        poison: Callable[[ScheduledBatch], Poison | None] = lambda batch: None,
        in_flight: Callable[[], None] = lambda: None,
        *,
        ahead: bool = False,
        fits: bool = True,
    ) -> None:
        """One step with all checks.

        Args:
            poison: names values of a sampling sequence of the batch that are not to be finite.
            in_flight: what happens between schedule() and update().
            ahead: before the step retires another one is scheduled, and stays in flight.
            fits: whether the device has memory for the step; it is found not to have before another one is scheduled.
        """
        if not self.flights:
            self._launch(poison)
        if ahead and fits and self.flights:
            in_flight()
            self._launch(poison)
        if self.flights:
            in_flight()
            if fits or len(self.flights) > 1:
                self._retire()
            else:
                self._withdraw()

    def drain(self, *, ahead: bool = False) -> None:
        """Nothing more is submitted: everything must end (I17)."""
        bound = 16 + 2 * sum(
            choice.sequence.max_num_tokens * (2 + choice.sequence.num_preemptions) for choice in self.open.values()
        )
        while self.open:
            if bound == 0:
                raise InvariantError("I17", f"{len(self.open)} choices have not ended")
            self.step(ahead=ahead)
            bound -= 1
        while self.flights:
            self._retire()
        invariants.check_integrity(self.scheduler)

    def _launch(self, poison: Callable[[ScheduledBatch], Poison | None]) -> None:
        self.order.before_step([flight.batch for flight in self.flights])
        batch = self.scheduler.schedule()
        if batch is None:
            if self.open and not self.flights:
                raise InvariantError("I17", "there is work and nothing is scheduled")
            return
        self.num_steps += 1
        self.marks["step ahead"] += bool(self.flights)
        self.marks["token that only the device knows"] += any(
            sequence.token_ids[-1] == UNKNOWN_TOKEN for sequence in batch.sequences
        )
        self._check_scheduled(batch)
        poisoned = poison(batch)
        spoiled = {flight.poison.sequence for flight in self.flights if flight.poison is not None}
        self.marks["step of one that has failed in flight"] += not spoiled.isdisjoint(batch.sequences)
        sampled = self.ghost.forward(batch, poisoned, spoiled)
        num_computed = self._num_computed(batch, sampled.token_ids)
        for sequence, num_tokens in zip(batch.sequences, num_computed, strict=True):
            self._progress[sequence] = sequence.num_computed_tokens + num_tokens, sequence.num_preemptions
        self.flights.append(Flight(batch, sampled, poisoned))

    def _retire(self) -> None:
        flight = self.flights.pop(0)
        del self.ghost.uses[0]
        outputs = self.scheduler.update(flight.batch, flight.sampled)
        self._take(outputs, flight.poison)
        invariants.check_pool(self.scheduler)
        invariants.check_unknown_tokens(self.scheduler)
        self._check_cached_content()
        self._check_stored_log_probs()

    def _withdraw(self) -> None:
        """What the step may have written already is written again."""
        flight = self.flights.pop()
        del self.ghost.uses[0]
        self.ghost.withdraw(flight.batch)
        could_shrink = self.scheduler.withdraw(flight.batch)
        self.marks["step that does not fit"] += 1
        if could_shrink != (self.config.enable_chunked_prefill and flight.batch.num_tokens > 1):
            raise InvariantError("I14", f"after a step of {flight.batch.num_tokens} tokens")
        if could_shrink and self.scheduler.step_budget.num_tokens != flight.batch.num_tokens // 2:
            raise InvariantError("I14", f"{self.scheduler.step_budget.num_tokens} after {flight.batch.num_tokens}")
        for sequence in flight.batch.sequences:
            if sequence in self._progress:
                self._progress[sequence] = sequence.num_computed_tokens, sequence.num_preemptions
        invariants.check_integrity(self.scheduler)

    def _check_scheduled(self, batch: ScheduledBatch) -> None:
        scheduler = self.scheduler
        invariants.check_sequences(scheduler)
        invariants.check_unknown_tokens(scheduler)
        invariants.check_queues(scheduler)
        invariants.check_prefix_cache(scheduler)
        if self.num_steps % KEYS_EVERY == 0:
            invariants.check_keys(scheduler)
        num_live = sum(map(num_wanted, scheduler.live.values()))
        if num_live != len(self.open):
            raise InvariantError("I16", f"{num_live} choices are live, {len(self.open)} should be")
        invariants.check_batch(scheduler, batch)
        if batch.num_tokens > scheduler.step_budget.num_tokens:
            raise InvariantError("I14", f"{batch.num_tokens} tokens, {scheduler.step_budget.num_tokens} fit")
        self.order.check(batch)
        self.marks["copy of a partial block"] += len(batch.block_copies)
        self.marks["chunk"] += len(batch.sampling) < len(batch.sequences)
        self.marks["draft in a batch with a preemption"] += bool(
            batch.drafts and scheduler.stats().num_preemptions > self._num_preemptions
        )
        self._num_preemptions = scheduler.stats().num_preemptions
        block_size = self.config.block_size
        targets = {target for _, target in batch.block_copies}
        for sequence in batch.sequences:
            self.marks["look-ahead block"] += sequence.block_table.capacity >= len(sequence.token_ids) + block_size
            done = self._progress.get(sequence)
            if done != (sequence.num_computed_tokens, sequence.num_preemptions):
                self._check_start(sequence, done, targets, batch)

    def _num_computed(self, batch: ScheduledBatch, sampled: list[int | None]) -> list[int]:
        """What the step adds to each sequence's computed tokens: wrong drafts, and those behind them, do not count."""
        num_computed, marks = list(batch.num_scheduled_tokens), self.marks
        row = len(batch.sampling) - len(batch.drafts)
        for index, drafts in batch.drafts.items():
            own = sampled[row : row + 1 + len(drafts)]
            num_right = next((n for n, draft in enumerate(drafts) if own[n] != draft), len(drafts))
            num_computed[index] = 1 + num_right
            row += len(own)
            marks["draft accepted"] += num_right
            marks["draft rejected"] += len(drafts) - num_right
            marks["all of several drafts accepted"] += num_right == len(drafts) > 1
            marks["failure behind a wrong draft"] += None in own and own.index(None) > num_right
        if row != len(sampled):
            raise InvariantError("I23", f"{len(sampled)} rows of logits, {row} are wanted")
        return num_computed

    def _check_start(
        self,
        sequence: Sequence,
        done: tuple[int, int] | None,
        copy_targets: set[int],
        batch: ScheduledBatch,
    ) -> None:
        """A sequence that is not where the last step left it: admitted, forked, or back after a preemption."""
        computed, num_preemptions = sequence.num_computed_tokens, sequence.num_preemptions
        if done is not None and num_preemptions <= done[1] and (sequence.beam is None or computed < done[0]):
            raise InvariantError("I9", f"{done} were computed: {sequence}")
        self.max_preemptions_seen = max(self.max_preemptions_seen, num_preemptions)
        is_fork = sequence.choice_index > 0 and computed == sequence.num_prompt_tokens - 1
        if sequence.beam is not None and computed >= sequence.num_prompt_tokens:
            is_fork = True
            self.marks["beam forks" if num_preemptions == 0 else "beam forks after a preemption"] += 1
        if not is_fork:
            self.order.check_admitted(sequence, batch)
        marks, table = self.marks, sequence.block_table
        if sequence.scoring_depth is not None and computed:
            marks["scoring hit"] += 1
            marks["scoring hit after a preemption"] += num_preemptions > 0
            marks["scoring hit on a copied block"] += (
                table.block_ids[computed // self.config.block_size] in copy_targets
            )
            marks["scoring hit with a window"] += self.config.sliding_window is not None
        elif computed % self.config.block_size:
            marks["fork with a partial block"] += 1
        elif computed:
            marks["hit"] += 1
            first = table.block_ids[table.num_released]
            marks["hit on another request's block"] += self.ghost.written_by[first] != sequence.request_id
            marks["hit after a preemption"] += num_preemptions > 0
            marks["hit behind the window"] += table.num_released > 0

    def _take(self, outputs: StepOutputs, poison: Poison | None) -> None:
        for output in outputs:
            key = (output.request_id, output.choice_index)
            choice = self.open.get(key)
            if choice is None:
                raise InvariantError("I16", f"output for {key}, which has ended")
            num_good = None
            if poison is not None and choice.sequence is poison.sequence:
                num_good = len(choice.token_ids) + poison.first_row
            elif poison is not None and poison.fails_a_search(output.request_id):
                num_good = len(choice.token_ids)
            choice.token_ids += output.token_ids
            self._check_told(choice, output)
            if output.finish_reason is not None:
                self._end(key)
                self.marks[f"finish: {output.finish_reason.value}"] += 1
                self._compare(choice, output, num_good)

    def _check_told(self, choice: Choice, output: StepOutput) -> None:
        """I29: once, before anybody's end but by failure, and the right numbers."""
        request_id, depth = output.request_id, choice.request.params.prompt_logprobs
        if output.prompt_log_probs is not None:
            if depth is None or request_id in self._told:
                raise InvariantError("I29", f"{request_id} is told what it does not ask for, or told again")
            if output.prompt_log_probs != oracle_of_prompt(choice.request, depth):
                raise InvariantError("I29", f"wrong log-probabilities: {choice.sequence}")
            self._told.add(request_id)
        elif depth is not None and request_id not in self._told and output.finish_reason is not FinishReason.ERROR:
            raise InvariantError("I29", f"the prompt is computed, and {request_id} is told nothing of it")

    def _compare(self, choice: Choice, output: StepOutput, num_good: int | None) -> None:
        """The differential oracle, I25: what the request alone, without a cache, would have been told.

        If it ends in a step with poison, `num_good` output tokens come before the first that is not finite.
        """
        token_ids, finish_reason, stop_reason, log_prob = oracle(
            choice.request,
            output.choice_index,
            choice.sequence.max_num_tokens,
            self.config.sliding_window,
            self.vocab_size,
        )
        failed_search = choice.request.params.use_beam_search and num_good is not None
        dead_end = finish_reason is FinishReason.ERROR
        if failed_search or dead_end or (num_good is not None and num_good < max(len(token_ids), 1)):
            num_told = len(choice.token_ids) if num_good is None else num_good
            finish_reason, stop_reason, log_prob, token_ids = FinishReason.ERROR, None, None, token_ids[:num_told]
        told = (choice.token_ids, output.finish_reason, output.stop_reason, output.cumulative_log_prob)
        expected = (token_ids, finish_reason, stop_reason, log_prob)
        if choice.request.params.use_beam_search:
            self.marks["finish of a beam"] += 1
            self.marks["finish of a beam that never was"] += not token_ids
        if told != expected:
            raise InvariantError("I25", f"{told} instead of {expected}")

    def _end(self, key: tuple[str, int]) -> None:
        sequence = self.open.pop(key).sequence
        if sequence.request_id in self.scheduler.live and sequence.beam is not None:
            return  # other choices of the search are still wanted
        self._progress.pop(sequence, None)
        self.ghost.forget(sequence)
        if sequence.status is not FINISHED:
            raise InvariantError("I16", f"has ended: {sequence}")
        if sequence.block_table.held_block_ids():
            raise InvariantError("I3", f"has ended and holds blocks: {sequence}")

    def _mark_abort(self, sequence: Sequence, moment: str) -> None:
        if sequence.leader is not None:
            where = "a follower"
        elif sequence.followers:
            where = "a leader"
        else:
            where = "running" if sequence.status is RUNNING else "waiting"
        self.marks[f"abort of {where} {moment}"] += 1

    def _check_cached_content(self) -> None:
        """I24 and I26: a key stands for one content, a content for one key, and the block still holds it."""
        pages, content_of_key = self.ghost.pages, self._content_of_key
        for key, block_id in self.scheduler.blocks.prefix_cache.items():
            content = pages[block_id][-1]
            if content_of_key.get(key) != content:
                if content == POISON:
                    raise InvariantError("I26", f"block {block_id} was written by a failed step and is cached")
                if key in content_of_key or self._key_of_content.setdefault(content, key) != key:
                    raise InvariantError("I24", f"block {block_id} is cached, but holds something else")
                content_of_key[key] = content

    def _check_stored_log_probs(self) -> None:
        """I30: what counts as stored is there, deep enough and of these tokens."""
        cache, ghost = self.scheduler.blocks.prefix_cache, self.ghost
        for key, block_id in cache.items():
            depth = cache.depth_of(block_id)
            if depth is None or self._depth_of_block.get(block_id) == (key, depth):
                continue
            for content, entry in zip(ghost.pages[block_id], ghost.log_probs[block_id], strict=True):
                if entry is None or entry[0] != log_prob(content) or entry[1] < depth:
                    raise InvariantError("I30", f"block {block_id} is cached to depth {depth}, but holds {entry}")
            self._depth_of_block[block_id] = key, depth
