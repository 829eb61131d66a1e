"""Log-probabilities of prompt tokens: computed with the chunks of a prompt, kept with its pages, told at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from quire.engine.host_values import to_device
from quire.engine.log_prob_pages import LogProbEntries, LogProbPages
from quire.kernels.log_probs import log_probs
from quire.scheduler.output import MIN_LOG_PROB, SampledTokens, ScheduledBatch, TokenLogProbs
from quire.scheduler.sequence import Sequence

MAX_LOGITS_BYTES = 64 * 2**20
"""Of the logits that exist at once."""

LogitsFunction = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class ScoredChunk:
    """A part of a prompt that one step computes and whose logits say how probable the tokens after it were."""

    index: int
    """Into `ScheduledBatch.sequences`."""
    sequence: Sequence
    depth: int
    start: int
    end: int
    """The step computes the tokens [start, end)."""
    num_rows: int
    """The first so many of them have a prompt token after them."""
    block_ids: list[int]
    """A copy: when the step retires the sequence may hold them no longer, but nobody else does."""

    @property
    def next_token_ids(self) -> list[int]:
        return self.sequence.token_ids[self.start + 1 : self.start + 1 + self.num_rows]


def scored_chunks(batch: ScheduledBatch) -> list[ScoredChunk]:
    """The chunks of a batch whose requests ask for `prompt_logprobs`, in the batch's order; they are never decodes."""
    chunks = []
    for index in range(batch.num_decodes, len(batch.sequences)):
        sequence = batch.sequences[index]
        if sequence.scoring_depth is not None:
            start = sequence.num_computed_tokens
            end = start + batch.num_scheduled_tokens[index]
            num_rows = min(end, sequence.num_prompt_tokens - 1) - start
            block_ids = sequence.block_table.block_ids[:]
            chunks.append(ScoredChunk(index, sequence, sequence.scoring_depth, start, end, num_rows, block_ids))
    return chunks


def num_score_tensors(chunks: list[ScoredChunk]) -> int:
    """How many tensors `PromptLogProbs.compute` gives."""
    return 4 if any(chunk.num_rows for chunk in chunks) else 0


def rows_at_once(vocab_size: int) -> int:
    """Rows whose logits exist at once."""
    return max(MAX_LOGITS_BYTES // (4 * vocab_size), 1)


def log_prob_entries(
    hidden: torch.Tensor, token_ids: torch.Tensor, depth: int, vocab_size: int, logits: LogitsFunction
) -> list[torch.Tensor]:
    """What each row's distribution says of a token, and its `depth` most probable ones.

    Args:
        hidden: [R, hidden_size], R > 0: what `logits` takes.
        token_ids: [R] int64, on the same device.

    Returns:
        log-probs [R] float32, top ids [R, depth] int64, their log-probs [R, depth] float32, and [R] bool: whether the
        row's logits are finite at their largest.
    """
    parts: list[tuple[torch.Tensor, ...]] = []
    num_rows = rows_at_once(vocab_size)
    for rows, row_token_ids in zip(hidden.split(num_rows), token_ids.split(num_rows), strict=True):
        parts.append(_entries_of_rows(logits(rows), row_token_ids, depth))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _entries_of_rows(logits: torch.Tensor, token_ids: torch.Tensor, depth: int) -> tuple[torch.Tensor, ...]:
    """log-probs [R] float32, top ids [R, depth] int64, their log-probs [R, depth] float32, finite [R] bool."""
    chosen, top_ids, top = log_probs(logits, token_ids, depth)
    bounded = (values.nan_to_num(nan=MIN_LOG_PROB).clamp(min=MIN_LOG_PROB) for values in (chosen, top))
    log_prob, top_log_probs = bounded
    return log_prob, top_ids, top_log_probs, logits.amax(dim=-1).isfinite()


class PromptScores:
    """What is known so far of one prompt's tokens: entries of the positions before `num_known`."""

    __slots__ = ("entries", "finite", "num_known", "sequence")

    def __init__(self, sequence: Sequence, depth: int) -> None:
        self.sequence = sequence
        self.entries = LogProbEntries.zeros(sequence.num_prompt_tokens, depth)
        self.num_known = 1
        """Nothing says how probable the first token is: its entry is never looked at."""
        self.finite = True

    def extend(self, entries: LogProbEntries) -> None:
        end = self.num_known + len(entries.log_prob)
        self.entries.put(slice(self.num_known, end), entries)
        self.num_known = end

    def told(self) -> list[TokenLogProbs]:
        """Of all tokens but the first."""
        entries = self.entries.part(slice(1, None), self.entries.top_token_ids.shape[1])
        token_ids = self.sequence.token_ids[1 : self.sequence.num_prompt_tokens]
        columns = (entries.log_prob.tolist(), entries.top_token_ids.tolist(), entries.top_log_probs.tolist())
        return [TokenLogProbs(*fields) for fields in zip(token_ids, *columns, strict=True)]


class PromptLogProbs:
    """Follows the prompts that are scored, by row. A window may let go of pages that are still to be told of."""

    def __init__(self, pages: LogProbPages, max_num_seqs: int, vocab_size: int, logits: LogitsFunction) -> None:
        self._pages = pages
        self._vocab_size = vocab_size
        self._logits = logits
        self._scores: list[PromptScores | None] = [None] * max_num_seqs

    def compute(self, hidden: torch.Tensor, chunks: list[ScoredChunk]) -> list[torch.Tensor]:
        """What this step says of prompt tokens, on the device; nothing if it says nothing.

        Args:
            hidden: of the rows that `chunks` count, one chunk after the other.
        """
        token_ids = [token_id for chunk in chunks for token_id in chunk.next_token_ids]
        if not token_ids:
            return []
        wanted = to_device(np.array(token_ids, np.int64), hidden.device)
        depth = max(chunk.depth for chunk in chunks)
        return log_prob_entries(hidden, wanted, depth, self._vocab_size, self._logits)

    def collect(
        self, computed: list[torch.Tensor], chunks: list[ScoredChunk], batch: ScheduledBatch, sampled: SampledTokens
    ) -> None:
        """Store what `compute` gave, now on the host; `sampled` gets what is complete.

        A prompt with logits that were not finite fails: it loses its sampled token, or candidates.
        """
        if computed:
            log_prob, top_ids, top_log_probs, finite = computed
            entries = LogProbEntries(log_prob.numpy(), top_ids.int().numpy(), top_log_probs.numpy())
        else:
            entries, finite = LogProbEntries.zeros(0, max(chunk.depth for chunk in chunks)), torch.ones(0)
        row = 0
        for chunk in chunks:
            rows = slice(row, row + chunk.num_rows)
            self._take(chunk, entries.part(rows, chunk.depth), bool(finite[rows].all()))
            row = rows.stop
        for position, index in enumerate(batch.sampling):
            scores = self._scores[batch.sequences[index].row]
            if scores is not None and scores.sequence is batch.sequences[index]:
                sampled.prompt_log_probs[index] = scores.told()
                if not scores.finite:
                    sampled.token_ids[position] = None
                    sampled.candidates.pop(position, None)
                    sampled.failures.pop(position, None)
                self._scores[scores.sequence.row] = None

    def remember(self, chunks: list[ScoredChunk]) -> None:
        """In place of `collect`: the chunks will be computed later, and their sequences may have let go of pages then
        that only hold what is to be told."""
        for chunk in chunks:
            self._known(chunk)

    def _known(self, chunk: ScoredChunk) -> PromptScores:
        """What is known before a chunk: that of its first token, too, from logits or pages."""
        sequence = chunk.sequence
        scores = self._scores[sequence.row]
        if scores is None or scores.sequence is not sequence or scores.num_known != chunk.start + 1:
            scores = self._scores[sequence.row] = PromptScores(sequence, chunk.depth)
            if chunk.start:
                scores.extend(self._pages.read(chunk.block_ids, 1, chunk.start + 1, chunk.depth))
        return scores

    def _take(self, chunk: ScoredChunk, entries: LogProbEntries, finite: bool) -> None:
        """Pages get the entries of the chunk's own tokens."""
        scores = self._known(chunk)
        scores.extend(entries)
        scores.finite = scores.finite and finite
        self._pages.write(
            chunk.block_ids, chunk.start, chunk.end, scores.entries.part(slice(chunk.start, chunk.end), chunk.depth)
        )
