"""The steps that were handed out and have not come back: one, or two while one is scheduled ahead."""

from __future__ import annotations

from quire.scheduler.output import UNKNOWN_TOKEN, ScheduledBatch
from quire.scheduler.sequence import Sequence
from quire.scheduler.status import RUNNING

MAX_STEPS_IN_FLIGHT = 2


class StepsInFlight:
    """Batches between schedule() and update(), the oldest first, and what is taken for granted of the oldest.

    To schedule the next step while one is in flight, those who compute in it are moved to where it will leave them:
    their tokens count as computed, and an `UNKNOWN_TOKEN` stands for the one they sample. update() first moves them
    back, so that it finds what it would have found without a step ahead. Who cannot go on without knowing that token
    waits until the step has retired.
    """

    def __init__(self) -> None:
        self.batches: list[ScheduledBatch] = []
        self.num_preemptions = 0
        """When the newest was handed out."""
        self.prompts: list[tuple[Sequence, int]] = []
        """Who computes a prompt in the step in flight, and from which token on, while another one is scheduled."""
        self._ahead: list[tuple[Sequence, int]] = []
        """Who was moved, and by how many tokens."""

    def add(self, batch: ScheduledBatch, num_preemptions: int) -> None:
        self.batches.append(batch)
        self.num_preemptions = num_preemptions

    def run_ahead(self) -> set[Sequence]:
        """Move on whoever computes in the step in flight.

        Returns:
            Those who cannot go on before it has retired.
        """
        (batch,) = self.batches
        sampling = set(batch.sampling)
        staying: set[Sequence] = set()
        for index, (sequence, num_tokens) in enumerate(zip(batch.sequences, batch.num_scheduled_tokens, strict=True)):
            if sequence.status is not RUNNING:
                continue
            if index >= batch.num_decodes:
                self.prompts.append((sequence, sequence.num_computed_tokens))
            samples = index in sampling
            if not can_go_on(sequence, samples=samples):
                staying.add(sequence)
                continue
            sequence.num_computed_tokens += num_tokens
            if samples:
                sequence.token_ids.append(UNKNOWN_TOKEN)
            self._ahead.append((sequence, num_tokens))
        return staying

    def move_back(self) -> None:
        """Undo `run_ahead`; whoever has ended or was preempted since is nowhere any more."""
        for sequence, num_tokens in self._ahead:
            if sequence.status is RUNNING:
                sequence.num_computed_tokens -= num_tokens
                sequence.drop_unknown_token()
        self._ahead.clear()
        self.prompts.clear()

    def retire(self, batch: ScheduledBatch) -> None:
        if not self.batches or batch is not self.batches[0]:
            raise RuntimeError("update() takes the oldest batch of schedule() that it has not answered.")
        del self.batches[0]
        if self._ahead or self.prompts:
            self.move_back()

    def last_step_of(self, sequence: Sequence) -> int | None:
        """Id of the newest step in flight that computes some of a sequence's tokens."""
        for batch in reversed(self.batches):
            if sequence in batch.sequences:
                return batch.step_id
        return None


def can_go_on(sequence: Sequence, *, samples: bool) -> bool:
    """Whether a sequence that computes in a step in flight can compute more before that step has retired.

    Who samples must have a further token to compute, whatever it is, and nothing that has to know it: beams are chosen
    together, drafts are guessed from the text, and until it is told what its prompt is worth a sequence counts as one.
    Followers fork from a leader that is where its prompt ends.
    """
    if not samples:
        return True
    if sequence.beam is not None or sequence.followers or sequence.max_num_drafts or sequence.reads_its_tokens:
        return False
    return sequence.scoring_depth is None and len(sequence.token_ids) + 1 < sequence.max_num_tokens
