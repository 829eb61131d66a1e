"""From logits to tokens: a chain of small steps, each skipped when no row needs it.

Penalties, biases and masks change logits in place; what follows the temperature is one kernel. Every filter is a
threshold on the row's own scaled logits, and the draw walks the vocabulary in order. So nothing depends on how a sort
breaks ties or on which options the neighbours use. Tokens that tie with the last one kept stay.
"""

from __future__ import annotations

import numpy as np
import torch

from quire.engine.grammar.factory import GrammarFactory
from quire.engine.grammar_rows import GrammarRows, GrammarStep
from quire.engine.host_values import to_device
from quire.engine.log_probs import token_log_probs
from quire.engine.penalties import Penalties
from quire.engine.sample_rows import sample_rows
from quire.engine.sampling_options import SampleRow, SamplingOptions, SamplingRows, StepRows
from quire.engine.token_masks import add_biases, ban_tokens, keep_allowed
from quire.kernels.argmax import argmax
from quire.kernels.sample import sample as draw
from quire.scheduler.output import Candidates, ErrorCode, SampledTokens, ScheduledBatch, TokenLogProbs


def keep_typical(logits: torch.Tensor, options: SamplingOptions) -> None:
    """Of the rows with typical_p below 1, keep the fewest tokens, the most typical first, whose mass reaches it.

    A token is the more typical the closer its surprise, at the row's temperature, is to the entropy; ties with the last
    one kept stay. In place on [R, V] float32. Meister et al., "Locally typical sampling", arXiv 2202.00666.
    """
    chosen = np.flatnonzero((options.typical_p < 1.0) & (options.temperature > 0))
    if chosen.size == 0:
        return
    rows = to_device(chosen, logits.device)
    temperature, typical_p = (
        to_device(values[chosen], logits.device)[:, None]
        for values in (options.temperature, options.typical_p.astype(np.float64))
    )
    log_probs = (logits[rows] / temperature).double().log_softmax(dim=-1)
    entropy = -(log_probs.exp() * log_probs).nansum(dim=-1, keepdim=True)
    distance = (-log_probs - entropy).abs()
    ordered, order = distance.sort(dim=-1)
    mass = log_probs.gather(1, order).exp().cumsum(dim=-1)
    last = (mass < typical_p).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    logits[rows] = logits[rows].masked_fill(distance > ordered.gather(1, last), -torch.inf)


def sample(logits: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Choose one token a row: temperature, typical_p, top_k, top_p, min_p, draw.

    Args:
        logits: [R, V] float32; token masks are already applied as minus infinity.
        options: of the same R rows.

    Returns:
        token ids [R] int64, -1 where the row's logits are not finite at their largest (NaN is never hidden).
    """
    best = argmax(logits)
    if not options.temperature.any():
        return best
    keep_typical(logits, options)
    filters = (options.temperature, options.top_k, options.top_p, options.min_p, options.uniform)
    token_ids = draw(logits, *(to_device(values, logits.device) for values in filters))
    return torch.where(best >= 0, token_ids, -1)


class Sampler:
    """Samples the rows that a batch asks for. Holds only what saves work between steps."""

    def __init__(self, max_num_seqs: int, grammars: GrammarFactory) -> None:
        self._rows = SamplingRows(max_num_seqs)
        self._penalties = Penalties(max_num_seqs)
        self._grammars = GrammarRows(max_num_seqs, grammars)

    def sample(self, logits: torch.Tensor, batch: ScheduledBatch, best: torch.Tensor | None = None) -> SampledTokens:
        """Choose the batch's tokens.

        Args:
            logits: [R, V] float32, R as `sample_rows` has it, overwritten by what adjusts them.
            best: `argmax(logits)`, if it is known.
        """
        if not batch.sampling:
            return SampledTokens([])
        chosen = sample_rows(batch)
        if self._rows.are_greedy(chosen.sequences):
            return SampledTokens(_tokens((argmax(logits) if best is None else best).tolist()))
        rows = self._rows.select(chosen)
        raw = RawLogits(logits, rows)
        finite, grammars = self._adjust(logits, rows)
        packed: list[int] = torch.where(finite, sample(logits, rows.options), -1).tolist()
        return SampledTokens(
            _tokens(packed),
            raw.of_chosen(packed),
            candidates_of_beams(logits, raw, rows.beams, packed),
            failures(packed, finite, rows.adjusted, grammars),
        )

    def _adjust(self, logits: torch.Tensor, rows: StepRows) -> tuple[torch.Tensor, GrammarStep]:
        """All that comes before the temperature, in place.

        Returns:
            which rows were finite before masks could hide it, [R] bool, and what grammars say.
        """
        if not rows.adjusted:
            return torch.ones(len(logits), dtype=torch.bool, device=logits.device), GrammarStep()
        finite = argmax(logits) >= 0
        if rows.beams:
            indices = _indices(rows.beams, logits)
            logits[indices] = logits[indices].log_softmax(dim=-1)
        self._penalties.apply(logits, rows.adjusted)
        add_biases(logits, rows.adjusted)
        keep_allowed(logits, rows.adjusted)
        grammars = self._grammars.mask(logits, rows.adjusted)
        ban_tokens(logits, rows.adjusted, grammars.complete)
        return finite, grammars


def _tokens(packed: list[int]) -> list[int | None]:
    return [token_id if token_id >= 0 else None for token_id in packed]


class RawLogits:
    """The logits of the rows that want log-probabilities, as they were before anything changed them."""

    def __init__(self, logits: torch.Tensor, rows: StepRows) -> None:
        self._scored = rows.scored
        beams = [row for row in rows.beams if row.params.logprobs is not None]
        self._places = {row.index: place for place, row in enumerate(rows.scored + beams)}
        self._logits = logits[torch.tensor(list(self._places), device=logits.device)] if self._places else logits[:0]

    def of_chosen(self, token_ids: list[int]) -> dict[int, TokenLogProbs]:
        """Of the tokens that rows without beams have sampled; rows that have none are left out."""
        rows = [row for row in self._scored if token_ids[row.index] >= 0]
        if not rows:
            return {}
        found = token_log_probs(
            self._logits[[self._places[row.index] for row in rows]],
            [token_ids[row.index] for row in rows],
            [row.params.logprobs or 0 for row in rows],
        )
        return {row.index: each for row, each in zip(rows, found, strict=True)}

    def of_candidates(self, row: SampleRow, token_ids: list[int]) -> list[TokenLogProbs] | None:
        """Of several tokens in a beam's row; None if the request does not ask."""
        if row.index not in self._places:
            return None
        logits = self._logits[self._places[row.index]].expand(len(token_ids), -1)
        return token_log_probs(logits, token_ids, [row.params.logprobs or 0] * len(token_ids))


def candidates_of_beams(
    logits: torch.Tensor, raw: RawLogits, rows: list[SampleRow], token_ids: list[int]
) -> dict[int, Candidates]:
    """The best continuations of each beam that has any. logits: [R, V], in the rows of beams log-probabilities."""
    if not rows:
        return {}
    counts = [num_candidates(row, logits.shape[-1]) for row in rows]
    best = logits[_indices(rows, logits)].topk(max(counts), dim=-1)
    result = {}
    for row, count, values, ids in zip(rows, counts, best.values.tolist(), best.indices.tolist(), strict=True):
        if token_ids[row.index] >= 0:
            count -= values[:count].count(-float("inf"))
            result[row.index] = Candidates(ids[:count], values[:count], raw.of_candidates(row, ids[:count]))
    return result


def num_candidates(row: SampleRow, vocab_size: int) -> int:
    """As in Hugging Face's beam search: twice the width, or more when several tokens can end a sequence."""
    return min(row.params.num_sequences * max(2, 1 + len(row.sequence.stop_token_ids)), vocab_size)


def failures(
    token_ids: list[int], finite: torch.Tensor, rows: list[SampleRow], grammars: GrammarStep
) -> dict[int, ErrorCode]:
    """Why adjusted rows have no token though their logits were finite."""
    failed = [row.index for row in rows if token_ids[row.index] < 0]
    if not failed:
        return {}
    were_finite: list[bool] = finite.tolist()
    return {index: grammars.failures.get(index, "no_token_allowed") for index in failed if were_finite[index]}


def _indices(rows: list[SampleRow], logits: torch.Tensor) -> torch.Tensor:
    return to_device(np.array([row.index for row in rows], np.int64), logits.device)
