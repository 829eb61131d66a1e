"""Collects one step: who computes how many tokens."""

from __future__ import annotations

from quire.scheduler.output import BlockTableUpdate, ScheduledBatch
from quire.scheduler.sequence import Sequence
from quire.scheduler.status import RUNNING


class BatchBuilder:
    """Takes sequences in the order they are scheduled and sorts them into the order of a batch.

    That order is: one token and it samples; one token and it does not (a chunk cut short by the budget); more tokens;
    one token and drafts. A prompt that is scored goes with those of more tokens even by single ones: its numbers must
    not depend on how it was cut, and the engine attends for decodes with another kernel.
    """

    __slots__ = ("_single_chunks", "budget", "chunks", "decodes", "drafted", "started")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        """Tokens that may still be scheduled."""
        self.decodes: list[Sequence] = []
        """Those whose last known token is the only one left to compute; written to directly, for speed."""
        self.drafted: list[tuple[Sequence, list[int]]] = []
        """Those that were decodes until drafts were found for them, with these; written to by the speculator."""
        self.started: list[str] = []
        """As in ScheduledBatch; written to directly."""
        self._single_chunks: list[Sequence] = []
        self.chunks: dict[Sequence, int] = {}
        """Those that compute more than one token, and how many; only `add` and `extend` write to it."""

    @property
    def empty(self) -> bool:
        return not (self.decodes or self._single_chunks or self.chunks or self.drafted)

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        self.budget -= num_tokens
        if num_tokens > 1 or sequence.scoring_depth is not None:
            self.chunks[sequence] = num_tokens
        elif sequence.num_computed_tokens + 1 == len(sequence.token_ids):
            self.decodes.append(sequence)
        else:
            self._single_chunks.append(sequence)

    def extend(self, sequence: Sequence, num_tokens: int) -> None:
        """So many more for one of `chunks`."""
        self.budget -= num_tokens
        self.chunks[sequence] += num_tokens

    def drop_preempted(self) -> None:
        """Take out whoever was preempted after its turn: for an older prompt, or with its beam group."""
        num_tokens = self._num_tokens()
        self.decodes = [sequence for sequence in self.decodes if sequence.status is RUNNING]
        self._single_chunks = [sequence for sequence in self._single_chunks if sequence.status is RUNNING]
        self.chunks = {sequence: count for sequence, count in self.chunks.items() if sequence.status is RUNNING}
        self.budget += num_tokens - self._num_tokens()

    def _num_tokens(self) -> int:
        return len(self.decodes) + len(self._single_chunks) + sum(self.chunks.values())

    def build(
        self, step_id: int, block_copies: list[tuple[int, int]], block_table_updates: list[BlockTableUpdate]
    ) -> ScheduledBatch:
        sequences = self.decodes + self._single_chunks
        num_singles = len(sequences)
        num_scheduled_tokens = [1] * num_singles
        sampling = list(range(len(self.decodes)))
        for index, (sequence, num_tokens) in enumerate(self.chunks.items(), num_singles):
            sequences.append(sequence)
            num_scheduled_tokens.append(num_tokens)
            if sequence.num_computed_tokens + num_tokens == len(sequence.token_ids):
                sampling.append(index)
        drafts: dict[int, list[int]] = {}
        for index, (sequence, its_drafts) in enumerate(self.drafted, len(sequences)):
            sequences.append(sequence)
            num_scheduled_tokens.append(1 + len(its_drafts))
            sampling.append(index)
            drafts[index] = its_drafts
        return ScheduledBatch(
            step_id,
            sequences,
            num_scheduled_tokens,
            num_singles,
            sampling,
            block_copies,
            block_table_updates,
            self.started,
            drafts,
        )
