"""Pages that hold fingerprints instead of keys and values, and a model that reads nothing but them.

The content of a slot is a function of the salt and of all tokens up to its position. The model computes the content of
a new token from the page slot before it, and the next token from all slots in the window: so whatever goes wrong with
pages changes tokens, and is also seen directly.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from zlib import crc32

from quire.config import SchedulerConfig
from quire.scheduler.invariants import InvariantError
from quire.scheduler.output import FinishReason, SampledTokens, ScheduledBatch
from quire.scheduler.request import Request
from quire.scheduler.sequence import Sequence
from simulation.beam_oracle import Told, candidates_after, search

UNWRITTEN = -3
POISON = -5


def root_fingerprint(request: Request) -> int:
    return crc32(request.cache_salt.encode())


def fingerprint(previous: int, token_id: int) -> int:
    return hash((previous, token_id))


def next_token(visible: list[int], request: Request, choice_index: int, vocab_size: int) -> int:
    """The larger the seed, the more often it is the last one of the vocabulary, so that some texts can be guessed."""
    drawn = hash((hash(tuple(visible)), request.seed, choice_index)) % (vocab_size * (1 + request.seed))
    return min(drawn, vocab_size - 1)


@dataclass(frozen=True, slots=True)
class Poison:
    """A sampling sequence of a batch whose values are not finite, from its `first_row`th row of logits on."""

    sequence: Sequence
    first_row: int = 0

    def fails_a_search(self, request_id: str) -> bool:
        """One beam whose values are not finite ends its whole group."""
        return self.sequence.beam is not None and self.sequence.request_id == request_id


class GhostModel:
    """Runs batches the way the engine does: through its own copy of the block tables, kept up by the updates.

    A draft's slot holds what the draft would have meant. Nothing but its content tells it from a token's: one that is
    rejected, and not overwritten before it is read, is seen as content of another text (I11).
    """

    def __init__(self, config: SchedulerConfig, vocab_size: int) -> None:
        self.marks: Counter[str] = Counter()
        self.pages = [[UNWRITTEN] * config.block_size for _ in range(config.num_blocks)]
        self.written_by: list[str | None] = [None] * config.num_blocks
        self._rows: list[list[int]] = [[] for _ in range(config.max_num_seqs)]
        self._block_size = config.block_size
        self._window = config.sliding_window
        self._vocab_size = vocab_size
        self._expected: dict[Sequence, tuple[list[int], list[int]]] = {}

    def scramble(self, block_id: int) -> None:
        """A block that is handed out anew holds nothing that may be read."""
        self.pages[block_id] = [UNWRITTEN] * self._block_size
        self.written_by[block_id] = None

    def forward(self, batch: ScheduledBatch, poison: Poison | None) -> SampledTokens:
        """Copy, write, read, sample: for each row of logits; from the first poisoned one on there is no token, and no
        candidates."""
        for update in batch.block_table_updates:
            row = self._rows[update.row]
            row[update.start : update.start + len(update.block_ids)] = update.block_ids
        for source, target in batch.block_copies:
            self.pages[target] = self.pages[source][:]
        sampling = set(batch.sampling)
        sampled = SampledTokens([])
        for index, (sequence, num_tokens) in enumerate(zip(batch.sequences, batch.num_scheduled_tokens, strict=True)):
            drafts = batch.drafts.get(index, [])
            num_good = num_tokens
            if poison is not None and poison.sequence is sequence:
                num_good = poison.first_row if drafts else 0
            content = self._compute(sequence, num_tokens, drafts, num_good)
            if index not in sampling:
                continue
            for row in range(1 + len(drafts)):
                end = len(sequence.token_ids) + row
                visible = content[0 if self._window is None else max(0, end - self._window) : end]
                token_id = next_token(visible, sequence.request, sequence.choice_index, self._vocab_size)
                is_good = row < num_good
                if sequence.beam is not None and is_good:
                    sampled.candidates[len(sampled.token_ids)] = candidates_after(
                        visible, sequence.request, sequence.num_output_tokens, self._vocab_size
                    )
                sampled.token_ids.append(token_id if is_good else None)
        return sampled

    def forget(self, sequence: Sequence) -> None:
        self._expected.pop(sequence, None)

    def _compute(self, sequence: Sequence, num_tokens: int, drafts: list[int], num_good: int) -> list[int]:
        """Write the next slots, all but the first `num_good` with poison; the content of all slots so far."""
        block_size, pages, token_ids = self._block_size, self.pages, sequence.token_ids + drafts
        start = sequence.num_computed_tokens
        end = start + num_tokens
        table = sequence.block_table
        block_ids = self._rows[sequence.row][: -(-end // block_size)]
        if block_ids != table.block_ids[: len(block_ids)]:
            raise InvariantError("I11", f"the engine's row is {block_ids}: {sequence}")
        content: list[int] = []
        for block_id in block_ids:
            content += pages[block_id]
        expected = self._expect(sequence)
        held_from = table.num_released * block_size
        if content[held_from:start] != expected[held_from:start]:
            name = "I26" if POISON in content[held_from:start] else "I11"
            raise InvariantError(name, f"pages hold something else than the tokens' content: {sequence}")
        previous = content[start - 1] if start else root_fingerprint(sequence.request)
        for position in range(start, end):
            previous = fingerprint(previous, token_ids[position]) if position - start < num_good else POISON
            self.marks["wrong draft overwritten"] += content[position] not in (UNWRITTEN, previous)
            block_id = block_ids[position // block_size]
            pages[block_id][position % block_size] = content[position] = previous
            self.written_by[block_id] = sequence.request_id
        return content

    def _expect(self, sequence: Sequence) -> list[int]:
        token_ids, expected = self._expected.get(sequence, ([], []))
        if token_ids is not sequence.token_ids:
            expected = []
            self._expected[sequence] = (sequence.token_ids, expected)
        previous = expected[-1] if expected else root_fingerprint(sequence.request)
        for token_id in sequence.token_ids[len(expected) :]:
            previous = fingerprint(previous, token_id)
            expected.append(previous)
        return expected


def fingerprints(request: Request, token_ids: list[int]) -> list[int]:
    """Content of all slots of a sequence."""
    previous = root_fingerprint(request)
    content = []
    for token_id in token_ids:
        previous = fingerprint(previous, token_id)
        content.append(previous)
    return content


def oracle(request: Request, choice_index: int, max_num_tokens: int, window: int | None, vocab_size: int) -> Told:
    """What the model says when each request has the machine to itself and nothing is ever cached."""
    params = request.params
    if params.use_beam_search:
        choices = search(request, max_num_tokens, window, vocab_size, lambda ids: fingerprints(request, ids))
        return choices[choice_index]
    content = fingerprints(request, request.prompt_token_ids)
    output: list[int] = []
    while True:
        visible = content if window is None else content[-window:]
        token_id = next_token(visible, request, choice_index, vocab_size)
        output.append(token_id)
        if len(output) > params.min_tokens:
            if token_id in request.eos_token_ids and not params.ignore_eos:
                return output, FinishReason.STOP, None, None
            if token_id in params.stop_token_ids:
                return output, FinishReason.STOP, token_id, None
        if len(content) + 1 == max_num_tokens:
            return output, FinishReason.LENGTH, None, None
        content.append(fingerprint(content[-1], token_id))
