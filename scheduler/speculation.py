"""Speculative decoding without a draft model: guess what follows from the sequence's own text.

A draft is what followed the last tokens where they occurred before (prompt look-up: Saxena 2023; Yang et al.,
"Inference with reference", arXiv 2304.04487). One step computes the last known token and the drafts behind it, and
samples after each as if the drafts before were right. The token sampled after a right prefix is the very one that a
step of its own would have sampled, for the random number is a function of (seed, choice index, position): so a draft
is accepted exactly if it equals the sampled token, and the output is the same with and without drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import eq

from quire.config import SchedulerConfig
from quire.scheduler.batch_builder import BatchBuilder
from quire.scheduler.block_manager import BlockManager
from quire.scheduler.output import ErrorCode, SampledTokens, ScheduledBatch, SchedulerStats, StepOutput
from quire.scheduler.sequence import Sequence
from quire.scheduler.status import RUNNING

GENERATION_TOKENS = 8192
"""Tokens after which an index begins anew: the last so many are always found, none after twice as many."""
MAX_INDEXED_TOKENS = 4096
"""Most tokens that all indexes together take in in one step: about a millisecond for each thousand."""
MAX_PAUSE = 32
"""Most steps without drafts between two attempts on text that does not repeat."""


class NgramIndex:
    """Where each n-gram of a growing text occurred last.

    Costs do not depend on the text's length: a new token is a dictionary entry for each n, a look-up a probe for each.
    Memory is bounded by two generations of entries. A text may only be appended to; preemption changes nothing.
    """

    __slots__ = ("_num_recent", "_older", "_recent", "_sizes", "num_indexed")

    def __init__(self, max_ngram: int, min_ngram: int) -> None:
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._recent: dict[int, int] = {}
        self._older: dict[int, int] = {}
        self._num_recent = 0
        self.num_indexed = 0
        """n-grams that end at or before this length are in the index, as far back as it remembers."""

    def extend(self, token_ids: list[int], most: int) -> int:
        """Take in up to `most` new tokens, all but the last token of the text at best; how many were taken in."""
        last = len(token_ids) - 1
        first = max(self.num_indexed, last - GENERATION_TOKENS)
        num_new = min(last - first, most)
        if self._num_recent + num_new > GENERATION_TOKENS:
            self._older, self._recent, self._num_recent = self._recent, {}, 0
        last, recent = first + num_new, self._recent
        for size in self._sizes:
            for end in range(max(first + 1, size), last + 1):
                recent[hash(tuple(token_ids[end - size : end]))] = end
        self._num_recent += num_new
        self.num_indexed = last
        return num_new

    def propose(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """What followed the latest earlier occurrence of the longest known n-gram that ends the text; often nothing.

        Where that runs into the text's end, it goes on with itself: a text of period p is continued for ever. Two
        n-grams of equal hashes give a useless draft, no wrong token.
        """
        length = len(token_ids)
        for size in self._sizes:
            if size >= length:
                continue
            key = hash(tuple(token_ids[length - size :]))
            start = self._recent.get(key) or self._older.get(key)
            if start is not None:
                drafts = token_ids[start : start + num_tokens]
                return drafts if len(drafts) == num_tokens else (drafts * num_tokens)[:num_tokens]
        return []


class DraftLength:
    """How many tokens to guess: one more after a step in which all were right, at most half after one in which none
    was. From nothing on it pauses, twice as long each time, before it tries one token again."""

    __slots__ = ("_length", "_limit", "_pause", "_wait")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._length = limit
        self._pause = 1
        self._wait = 0

    def next(self) -> int:
        if self._wait:
            self._wait -= 1
            return 0
        return self._length

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        if num_accepted:
            self._pause = 1
        if num_accepted == num_drafted:
            self._length = min(self._length + 1, self._limit)
            return
        self._length = max(num_accepted, self._length // 2)
        if self._length == 0:
            self._length = 1
            self._wait = self._pause
            self._pause = min(2 * self._pause, MAX_PAUSE)


class Drafter:
    """Of one sequence."""

    __slots__ = ("index", "length")

    def __init__(self, index: NgramIndex, length: DraftLength) -> None:
        self.index = index
        self.length = length


def reached_tokens(drafts: list[int], sampled: list[int | None]) -> list[int | None]:
    """Those of a sequence's 1 + len(drafts) sampled tokens before which all drafts were right.

    None stands for a row that was not finite; it ends what is reached, for it equals no draft.
    """
    for num_reached, (draft, token_id) in enumerate(zip(drafts, sampled, strict=False), 1):
        if token_id != draft:
            return sampled[:num_reached]
    return sampled


TakeTokens = Callable[[Sequence, list[int | None], ErrorCode], StepOutput]
"""Takes the tokens that a sequence has sampled, and the code of the error if the last is None."""


class Speculator:
    """Adds drafts to what a step computes anyway. They get what is left: budget, rows of logits, free blocks.

    Beams have none: their next tokens are chosen together.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, counters: SchedulerStats) -> None:
        self._config = config.speculative_config
        self._num_logits_rows = self._config.num_logits_rows(config.max_num_seqs)
        self._blocks = blocks
        self._counters = counters
        self._drafters: dict[Sequence, Drafter] = {}

    @property
    def active(self) -> bool:
        """Whether any live sequence wants drafts."""
        return bool(self._drafters)

    def watch(self, sequence: Sequence) -> None:
        params, config = sequence.request.params, self._config
        limit = params.num_speculative_tokens
        if limit is None:
            limit = config.num_speculative_tokens
        if limit and not params.use_beam_search:
            sequence.max_num_drafts = limit
            self._drafters[sequence] = Drafter(NgramIndex(config.max_ngram, config.min_ngram), DraftLength(limit))

    def forget(self, sequence: Sequence) -> None:
        self._drafters.pop(sequence, None)

    def add_drafts(self, builder: BatchBuilder, num_rows: int) -> None:
        """Give drafts to sequences that decode, the oldest first.

        Args:
            builder: everybody who computes something in this step is in it.
            num_rows: rows in use. Each may sample, and needs a block to grow into more than another needs drafts.
        """
        num_logits_rows, num_indexed = self._num_logits_rows - num_rows, 0
        decodes, builder.decodes = builder.decodes, []
        for sequence in decodes:
            drafts: list[int] = []
            drafter = self._drafters.get(sequence)
            if drafter is not None:
                num_indexed += drafter.index.extend(sequence.token_ids, MAX_INDEXED_TOKENS - num_indexed)
                if drafter.index.num_indexed == len(sequence.token_ids) - 1:
                    drafts = self._draft(sequence, drafter, min(builder.budget, num_logits_rows), num_rows)
            if drafts:
                builder.drafted.append((sequence, drafts))
                builder.budget -= len(drafts)
                num_logits_rows -= len(drafts)
            else:
                builder.decodes.append(sequence)

    def verify(self, batch: ScheduledBatch, sampled: SampledTokens, take: TakeTokens) -> Iterator[StepOutput]:
        """Hand on to `take` what each sequence with drafts has sampled after right ones; its answers.

        What was computed for the other drafts does not count as computed, and is overwritten.
        """
        row = len(batch.sampling) - len(batch.drafts)
        for index, drafts in batch.drafts.items():
            sequence, rows = batch.sequences[index], slice(row, row + 1 + len(drafts))
            if sequence.status is RUNNING:
                reached = reached_tokens(drafts, sampled.token_ids[rows])
                output = take(sequence, reached, sampled.failures.get(row + len(reached) - 1, "numerical_error"))
                if row in sampled.log_probs:
                    output.log_probs = [sampled.log_probs[row + j] for j in range(len(output.token_ids))]
                self._learn(sequence, len(drafts), sum(map(eq, output.token_ids, drafts)))
                yield output
            row = rows.stop
        if row != len(sampled.token_ids):
            raise ValueError(f"{len(sampled.token_ids)} tokens were sampled for {row} rows of logits.")

    def _learn(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        self._counters.num_draft_steps += 1
        self._counters.num_drafted_tokens += num_drafted
        self._counters.num_accepted_tokens += num_accepted
        drafter = self._drafters.get(sequence)
        if drafter is not None:
            drafter.length.learn(num_drafted, num_accepted)

    def _draft(self, sequence: Sequence, drafter: Drafter, most: int, num_reserved_blocks: int) -> list[int]:
        """Not past the last token that may be generated: it is sampled, but never computed."""
        num_tokens = len(sequence.token_ids)
        most = min(most, sequence.max_num_tokens - 1 - num_tokens)
        if most <= 0 or (num_drafts := min(drafter.length.next(), most)) == 0:
            return []
        drafts = drafter.index.propose(sequence.token_ids, num_drafts)
        if drafts:
            capacity = self._blocks.look_ahead(sequence, num_tokens + len(drafts), num_reserved_blocks)
            del drafts[capacity - num_tokens :]
        return drafts
