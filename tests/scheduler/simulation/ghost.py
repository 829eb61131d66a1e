"""Pages that hold fingerprints instead of keys and values, and a model that reads nothing but them.

The content of a slot is a function of the salt and of all tokens up to its position. The model computes the content of
a new token from the page slot before it, and the next token from all slots in the window: so whatever goes wrong with
pages changes tokens, and is also seen directly. What is stored of a token's log-probability is a function of its
content, and how deep it was stored.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from zlib import crc32

from quire.config import SchedulerConfig
from quire.scheduler.invariants import InvariantError
from quire.scheduler.output import UNKNOWN_TOKEN, FinishReason, SampledTokens, ScheduledBatch, TokenLogProbs
from quire.scheduler.request import Request
from quire.scheduler.sequence import Sequence
from simulation.beam_oracle import Told, candidates_after, search

Entry = tuple[float, int]
"""What is stored of a token: its log-probability, and how many of the best there are beside it."""

UNWRITTEN = -3
POISON = -5


def root_fingerprint(request: Request) -> int:
    return crc32(request.cache_salt.encode())


def fingerprint(previous: int, token_id: int) -> int:
    return hash((previous, token_id))


def log_prob(content: int) -> float:
    return float(hash((content, "log-probability")) % 2**30)


def told(token_id: int, value: float, depth: int) -> TokenLogProbs:
    return TokenLogProbs(token_id, value, list(range(depth)), [value] * depth)


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
        self.log_probs: list[list[Entry | None]] = [[None] * config.block_size for _ in range(config.num_blocks)]
        self._scores: dict[int, tuple[Sequence, list[Entry | None]]] = {}
        """By row: entries of the prompt's tokens as far as they are known, as the engine keeps them."""
        self._rows: list[list[int]] = [[] for _ in range(config.max_num_seqs)]
        self._last_tokens = [0] * config.max_num_seqs
        """By row: the token that was sampled last, known here before the scheduler is told."""
        self.uses: list[set[int]] = []
        """Blocks that each step in flight reads or writes."""
        self._block_size = config.block_size
        self._window = config.sliding_window
        self._vocab_size = vocab_size
        self._expected: dict[Sequence, tuple[list[int], list[int]]] = {}

    def scramble(self, block_id: int) -> None:
        """A block that is handed out anew holds nothing that may be read."""
        self.pages[block_id] = [UNWRITTEN] * self._block_size
        self.written_by[block_id] = None
        self.log_probs[block_id] = [None] * self._block_size

    def forward(self, batch: ScheduledBatch, poison: Poison | None, spoiled: set[Sequence]) -> SampledTokens:
        """Copy, write, read, score, sample: for each row of logits; from the first poisoned on there is no token, and
        no candidates. Of those that a step in flight has `spoiled` nothing is right, and nobody will be told."""
        self.uses.append(blocks_of(batch))
        for update in batch.block_table_updates:
            row = self._rows[update.row]
            row[update.start : update.start + len(update.block_ids)] = update.block_ids
        for source, target in batch.block_copies:
            self.pages[target] = self.pages[source][:]
            self.log_probs[target] = self.log_probs[source][:]
        sampling = set(batch.sampling)
        sampled = SampledTokens([])
        for index, (sequence, num_tokens) in enumerate(zip(batch.sequences, batch.num_scheduled_tokens, strict=True)):
            drafts = batch.drafts.get(index, [])
            num_good = num_tokens
            if poison is not None and poison.sequence is sequence:
                num_good = poison.first_row if drafts else 0
            if sequence in spoiled:
                num_good = 0
            content = self._compute(sequence, num_tokens, drafts, num_good, check=sequence not in spoiled)
            if sequence.scoring_depth is not None:
                entries = self._score(sequence, sequence.scoring_depth, content)
                if index in sampling:
                    sampled.prompt_log_probs[index] = [
                        told(token_id, *(entry or (-1.0, 0)))
                        for token_id, entry in zip(sequence.token_ids[1:], entries[1:], strict=True)
                    ]
            if index not in sampling:
                continue
            for row in range(1 + len(drafts)):
                end = len(sequence.token_ids) + row
                visible = content[0 if self._window is None else max(0, end - self._window) : end]
                token_id = next_token(visible, sequence.request, sequence.choice_index, self._vocab_size)
                is_good = row < num_good
                if row == 0:
                    self._last_tokens[sequence.row] = token_id
                if sequence.beam is not None and is_good:
                    sampled.candidates[len(sampled.token_ids)] = candidates_after(
                        visible, sequence.request, sequence.num_output_tokens, self._vocab_size
                    )
                sampled.token_ids.append(token_id if is_good else None)
        return sampled

    def withdraw(self, batch: ScheduledBatch) -> None:
        """What was known of scored prompts before a step that did not fit is remembered."""
        for sequence in batch.sequences:
            holder, entries = self._scores.get(sequence.row, (None, []))
            if holder is sequence:
                del entries[sequence.num_computed_tokens + 1 :]

    def forget(self, sequence: Sequence) -> None:
        self._expected.pop(sequence, None)

    def _score(self, sequence: Sequence, depth: int, content: list[int]) -> list[Entry | None]:
        """Entries of the tokens known so far; those of the step's own tokens are written to the pages."""
        start, end, token_ids = sequence.num_computed_tokens, len(content), sequence.token_ids
        block_ids, block_size = sequence.block_table.block_ids, self._block_size
        holder, entries = self._scores.get(sequence.row, (None, []))
        if holder is not sequence or len(entries) != start + 1:
            entries = [(log_prob(fingerprint(root_fingerprint(sequence.request), token_ids[0])), depth)]
            for position in range(1, start + 1):
                stored = self.log_probs[block_ids[position // block_size]][position % block_size]
                entries.append(None if stored is None else (stored[0], min(stored[1], depth)))
            self._scores[sequence.row] = sequence, entries
        for position in range(start, min(end, sequence.num_prompt_tokens - 1)):
            entries.append((log_prob(fingerprint(content[position], token_ids[position + 1])), depth))
        for position in range(start, end):
            self.log_probs[block_ids[position // block_size]][position % block_size] = entries[position]
        return entries

    def known(self, sequence: Sequence) -> list[int]:
        """Its tokens, with the one that only the device knows."""
        if sequence.token_ids[-1] != UNKNOWN_TOKEN:
            return sequence.token_ids
        return [*sequence.token_ids[:-1], self._last_tokens[sequence.row]]

    def _compute(
        self, sequence: Sequence, num_tokens: int, drafts: list[int], num_good: int, *, check: bool
    ) -> list[int]:
        """Write the next slots, all but the first `num_good` with poison; the content of all slots so far."""
        block_size, pages, token_ids = self._block_size, self.pages, self.known(sequence) + drafts
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
        if check and content[held_from:start] != expected[held_from:start]:
            name = "I26" if POISON in content[held_from:start] else "I11"
            raise InvariantError(name, f"pages hold something else than the tokens' content: {sequence}")
        previous = content[start - 1] if start else root_fingerprint(sequence.request)
        for position in range(start, end):
            previous = fingerprint(previous, token_ids[position]) if position - start < num_good else POISON
            self.marks["wrong draft overwritten"] += content[position] not in (UNWRITTEN, previous)
            block_id = block_ids[position // block_size]
            pages[block_id][position % block_size] = content[position] = previous
            self.written_by[block_id] = sequence.request_id
        return content[:end]

    def _expect(self, sequence: Sequence) -> list[int]:
        token_ids, expected = self._expected.get(sequence, ([], []))
        if token_ids is not sequence.token_ids:
            expected = []
            self._expected[sequence] = (sequence.token_ids, expected)
        previous = expected[-1] if expected else root_fingerprint(sequence.request)
        for token_id in sequence.token_ids[len(expected) :]:
            if token_id == UNKNOWN_TOKEN:
                break
            previous = fingerprint(previous, token_id)
            expected.append(previous)
        return expected


def blocks_of(batch: ScheduledBatch) -> set[int]:
    """What a step that was just scheduled reads or writes."""
    used = {block_id for copy in batch.block_copies for block_id in copy}
    for sequence in batch.sequences:
        used.update(sequence.block_table.held_block_ids())
    return used


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
    if len(content) == max_num_tokens:
        return output, FinishReason.LENGTH, None, None
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


def oracle_of_prompt(request: Request, depth: int) -> list[TokenLogProbs]:
    """What the request is to be told of its prompt."""
    content = root_fingerprint(request)
    expected = []
    for token_id in request.prompt_token_ids:
        content = fingerprint(content, token_id)
        expected.append(told(token_id, log_prob(content), depth))
    return expected[1:]
