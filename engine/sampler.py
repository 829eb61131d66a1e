"""From logits to tokens: a chain of small pure functions, each skipped when no row needs it.

Every filter is a threshold on the row's own scaled logits, and the draw walks the vocabulary in order. So nothing
depends on how a sort breaks ties or on which options the neighbours use. Tokens that tie with the last one kept stay.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from quire.engine.log_probs import LogProbRows
from quire.engine.penalties import Penalties
from quire.engine.sampling_options import SampleRow, SamplingOptions, SamplingRows
from quire.engine.token_masks import add_biases, ban_tokens, keep_allowed
from quire.scheduler.output import Candidates, SampledTokens, ScheduledBatch, TokenLogProbs


def scale(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Divide by the temperature; [R, V] float32."""
    return logits / temperature[:, None]


def top_k_threshold(logits: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """The k-th largest logit of each row, [R, 1]; minus infinity where top_k is 0. Fan et al., arXiv 1805.04833."""
    vocab_size = logits.shape[-1]
    k = top_k.clamp(max=vocab_size)
    largest = logits.topk(int(k.max()), dim=-1).values
    kth = largest.gather(1, (k - 1).clamp(min=0)[:, None])
    return kth.masked_fill((k == 0)[:, None], -torch.inf)


def top_p_threshold(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest logit of the nucleus, [R, 1]: the fewest tokens whose mass reaches top_p.

    Holtzman et al., "The curious case of neural text degeneration", arXiv 1904.09751.
    """
    ordered = logits.sort(dim=-1, descending=True).values
    mass = ordered.double().softmax(dim=-1).cumsum(dim=-1)
    last = (mass < top_p.double()[:, None]).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return ordered.gather(1, last).masked_fill((top_p >= 1.0)[:, None], -torch.inf)


def min_p_threshold(logits: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Logit of a token with min_p times the best one's probability, [R, 1]. Nguyen et al., arXiv 2407.01082."""
    return logits.max(dim=-1, keepdim=True).values + min_p.log()[:, None]


def typical_threshold(logits: torch.Tensor, typical_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How far each token's surprise is from the entropy, [R, V], and the largest distance that is typical, [R, 1].

    The fewest tokens, the most typical first, whose mass reaches typical_p. Meister et al., arXiv 2202.00666.
    """
    log_probs = logits.double().log_softmax(dim=-1)
    entropy = -(log_probs.exp() * log_probs).nansum(dim=-1, keepdim=True)
    distance = (-log_probs - entropy).abs()
    ordered, order = distance.sort(dim=-1)
    mass = log_probs.gather(1, order).exp().cumsum(dim=-1)
    last = (mass < typical_p.double()[:, None]).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return distance, ordered.gather(1, last).masked_fill((typical_p >= 1.0)[:, None], torch.inf)


def keep(logits: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(logits < threshold, -torch.inf)


def draw(logits: torch.Tensor, uniform_numbers: torch.Tensor) -> torch.Tensor:
    """Invert the cumulative distribution in float64, in vocabulary order; [R] int64."""
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    target = uniform_numbers[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def sample(logits: torch.Tensor, options: SamplingOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose one token a row.

    Args:
        logits: [R, V] float32; token masks are already applied as minus infinity.
        options: of the same R rows.

    Returns:
        token ids [R] int64, and [R] bool: whether the row's logits were finite at their largest (NaN is never hidden).
    """
    best = logits.max(dim=-1)
    token_ids, finite = best.indices, best.values.isfinite()
    random_rows = np.flatnonzero(options.temperature > 0)
    if random_rows.size == 0:
        return token_ids, finite
    rows = torch.from_numpy(random_rows).to(logits.device)
    token_ids[rows] = sample_random(logits[rows], options, random_rows)
    return token_ids, finite


def sample_random(logits: torch.Tensor, options: SamplingOptions, rows: npt.NDArray[np.int64]) -> torch.Tensor:
    """temperature, top_k, top_p, min_p, typical_p, draw: for the rows whose temperature is above 0."""

    def to_device(values: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values[rows]).to(logits.device)

    logits = scale(logits, to_device(options.temperature))
    if (options.top_k[rows] > 0).any():
        logits = keep(logits, top_k_threshold(logits, to_device(options.top_k)))
    if (options.top_p[rows] < 1.0).any():
        logits = keep(logits, top_p_threshold(logits, to_device(options.top_p)))
    if (options.min_p[rows] > 0.0).any():
        logits = keep(logits, min_p_threshold(logits, to_device(options.min_p)))
    if (options.typical_p[rows] < 1.0).any():
        distance, threshold = typical_threshold(logits, to_device(options.typical_p))
        logits = logits.masked_fill(distance > threshold, -torch.inf)
    return draw(logits, to_device(options.uniform))


class Sampler:
    """Samples the rows that a batch asks for. Holds only what saves work between steps."""

    def __init__(self, max_num_seqs: int) -> None:
        self._rows = SamplingRows(max_num_seqs)
        self._penalties = Penalties(max_num_seqs)

    def sample(self, logits: torch.Tensor, batch: ScheduledBatch) -> SampledTokens:
        """logits: [R, V] float32, R = len(batch.sampling), overwritten by what adjusts them."""
        if not batch.sampling:
            return SampledTokens([])
        rows = self._rows.select([batch.sequences[index] for index in batch.sampling])
        raw = raw_log_probs(logits, rows.scored + rows.beams)
        finite = self._adjust(logits, rows.adjusted, rows.beams)
        token_ids, still_finite = sample(logits, rows.options)
        packed: list[int] = torch.where(finite & still_finite, token_ids, -1).tolist()
        return SampledTokens(
            [token_id if token_id >= 0 else None for token_id in packed],
            log_probs_of_chosen(raw, rows.scored, packed),
            candidates_of_beams(logits, raw, len(rows.scored), rows.beams, packed),
        )

    def _adjust(self, logits: torch.Tensor, rows: list[SampleRow], beams: list[SampleRow]) -> torch.Tensor:
        """All that comes before the temperature, in place; which rows were finite before masks could hide it, [R]."""
        if not rows:
            return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        finite = logits.amax(dim=-1).isfinite()
        if beams:
            indices = _indices(beams, logits)
            logits[indices] = logits[indices].log_softmax(dim=-1)
        self._penalties.apply(logits, rows)
        add_biases(logits, rows)
        keep_allowed(logits, rows)
        ban_tokens(logits, rows)
        return finite


def raw_log_probs(logits: torch.Tensor, rows: list[SampleRow]) -> LogProbRows | None:
    """Of the rows that want `logprobs`, in their order; those of beams that do not are left empty."""
    if not any(row.params.logprobs is not None for row in rows):
        return None
    return LogProbRows(logits[_indices(rows, logits)], [row.params.logprobs or 0 for row in rows])


def log_probs_of_chosen(
    raw: LogProbRows | None, rows: list[SampleRow], token_ids: list[int]
) -> dict[int, TokenLogProbs]:
    """By index of the logits row; rows that were not finite have none."""
    if raw is None:
        return {}
    return {
        row.index: raw.of(place, [token_ids[row.index]])[0]
        for place, row in enumerate(rows)
        if token_ids[row.index] >= 0
    }


def candidates_of_beams(
    logits: torch.Tensor, raw: LogProbRows | None, first: int, rows: list[SampleRow], token_ids: list[int]
) -> dict[int, Candidates]:
    """The best continuations of each beam whose row was finite.

    Args:
        logits: [R, V], in the rows of beams adjusted log-probabilities.
        first: place of the first beam among the rows of `raw`.
    """
    if not rows:
        return {}
    counts = [num_candidates(row, logits.shape[-1]) for row in rows]
    best = logits[_indices(rows, logits)].topk(max(counts), dim=-1)
    result = {}
    for place, (row, count, values, ids) in enumerate(
        zip(rows, counts, best.values.tolist(), best.indices.tolist(), strict=True)
    ):
        if token_ids[row.index] < 0:
            continue
        count -= values[:count].count(-float("inf"))
        wants_raw = raw is not None and row.params.logprobs is not None
        log_probs = raw.of(first + place, ids[:count]) if raw is not None and wants_raw else None
        result[row.index] = Candidates(ids[:count], values[:count], log_probs)
    return result


def num_candidates(row: SampleRow, vocab_size: int) -> int:
    """As in Hugging Face's beam search: twice the width, or more when several tokens can end a sequence."""
    return min(row.params.num_sequences * max(2, 1 + len(row.sequence.stop_token_ids)), vocab_size)


def _indices(rows: list[SampleRow], logits: torch.Tensor) -> torch.Tensor:
    return torch.tensor([row.index for row in rows], device=logits.device)
