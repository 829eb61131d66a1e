"""From logits to tokens: a chain of small steps, each skipped when no row needs it.

Penalties, biases and masks change logits in place; what follows the temperature is one kernel. Every filter is a
threshold on the row's own scaled logits, and the draw walks the vocabulary in order. So nothing depends on how a sort
breaks ties or on which options the neighbours use. Tokens that tie with the last one kept stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from quire.engine.grammar.factory import GrammarFactory
from quire.engine.grammar_rows import GrammarRows, GrammarStep
from quire.engine.host_values import to_device
from quire.engine.penalties import Penalties
from quire.engine.sample_rows import sample_rows
from quire.engine.sampled_log_probs import RawLogits, best_of_beams, read_candidates, read_chosen, row_indices
from quire.engine.sampling_options import SampleRow, SamplingOptions, SamplingRows, StepRows
from quire.engine.token_masks import add_biases, ban_tokens, keep_allowed
from quire.kernels.argmax import argmax
from quire.kernels.sample import sample as draw
from quire.scheduler.output import ErrorCode, SampledTokens, ScheduledBatch


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


@dataclass(slots=True)
class SamplePlan:
    """What one step samples: filled in by `Sampler.plan`, and by `Sampler.choose` where that alone knows."""

    rows: StepRows | None
    """None: every row takes its most probable token, and nothing else is asked for."""
    vocab_size: int = 0
    grammars: GrammarStep = field(default_factory=GrammarStep)


class Sampler:
    """Samples the rows that a batch asks for. Holds only what saves work between steps."""

    def __init__(self, max_num_seqs: int, grammars: GrammarFactory) -> None:
        self._rows = SamplingRows(max_num_seqs)
        self._penalties = Penalties(max_num_seqs)
        self._grammars = GrammarRows(max_num_seqs, grammars)

    def plan(self, batch: ScheduledBatch) -> SamplePlan:
        """Take in what the batch's rows ask for, before its sequences move on."""
        if not batch.sampling:
            return SamplePlan(None)
        chosen = sample_rows(batch)
        return SamplePlan(None if self._rows.are_greedy(chosen.sequences) else self._rows.select(chosen))

    def choose(self, logits: torch.Tensor, plan: SamplePlan, best: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Choose the plan's tokens; nothing waits for the device.

        Args:
            logits: [R, V] float32, R as `sample_rows` has it, overwritten by what adjusts them.
            best: `argmax(logits)`, if it is known.

        Returns:
            What `read` takes, on the device: first of all the tokens, [R] int64, -1 where there is none.
        """
        rows = plan.rows
        plan.vocab_size = logits.shape[-1]
        if rows is None:
            return [argmax(logits) if best is None else best] if len(logits) else []
        raw = RawLogits(logits, rows)
        finite, plan.grammars = self._adjust(logits, rows)
        token_ids = torch.where(finite, sample(logits, rows.options), -1)
        return [token_ids, finite, *raw.of_chosen(token_ids), *best_of_beams(logits, raw, rows.beams)]

    def read(self, plan: SamplePlan, tensors: list[torch.Tensor]) -> SampledTokens:
        """What `choose` gave, now on the host."""
        if not tensors:
            return SampledTokens([])
        packed: list[int] = tensors[0].tolist()
        if plan.rows is None:
            return SampledTokens(_tokens(packed))
        rows, parts = plan.rows, iter(tensors)
        _, finite = next(parts), next(parts)
        return SampledTokens(
            _tokens(packed),
            read_chosen(rows.scored, packed, parts),
            read_candidates(rows.beams, packed, plan.vocab_size, parts),
            failures(packed, finite, rows.adjusted, plan.grammars),
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
            indices = row_indices(rows.beams, logits.device)
            logits[indices] = logits[indices].log_softmax(dim=-1)
        self._penalties.apply(logits, rows.adjusted)
        add_biases(logits, rows.adjusted)
        keep_allowed(logits, rows.adjusted)
        grammars = self._grammars.mask(logits, rows.adjusted)
        ban_tokens(logits, rows.adjusted, grammars.complete)
        return finite, grammars


def _tokens(packed: list[int]) -> list[int | None]:
    return [token_id if token_id >= 0 else None for token_id in packed]


def failures(
    token_ids: list[int], finite: torch.Tensor, rows: list[SampleRow], grammars: GrammarStep
) -> dict[int, ErrorCode]:
    """Why adjusted rows have no token though their logits were finite."""
    failed = [row.index for row in rows if token_ids[row.index] < 0]
    if not failed:
        return {}
    were_finite: list[bool] = finite.tolist()
    return {index: grammars.failures.get(index, "no_token_allowed") for index in failed if were_finite[index]}
