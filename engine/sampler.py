"""From logits to tokens: a chain of small pure functions, each skipped when no row needs it.

Every filter is a threshold on the row's own scaled logits, and the draw walks the vocabulary in order. So nothing
depends on how a sort breaks ties or on which options the neighbours use. Tokens that tie with the last one kept stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from quire.engine.random_numbers import uniform
from quire.engine.sample_rows import SampleRows, sample_rows
from quire.scheduler.output import SampledTokens, ScheduledBatch
from quire.scheduler.sequence import Sequence


@dataclass(slots=True)
class SamplingOptions:
    """Options of R rows on the host; built by `SamplingRows.select`."""

    temperature: npt.NDArray[np.float32]  # [R]
    top_k: npt.NDArray[np.int64]  # [R], 0 is off
    top_p: npt.NDArray[np.float32]  # [R]
    min_p: npt.NDArray[np.float32]  # [R]
    uniform: npt.NDArray[np.float64]  # [R], in (0, 1); read only where temperature > 0


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
    """temperature, top_k, top_p, min_p, draw: for the rows whose temperature is above 0."""

    def to_device(values: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(values[rows]).to(logits.device)

    logits = scale(logits, to_device(options.temperature))
    if (options.top_k[rows] > 0).any():
        logits = keep(logits, top_k_threshold(logits, to_device(options.top_k)))
    if (options.top_p[rows] < 1.0).any():
        logits = keep(logits, top_p_threshold(logits, to_device(options.top_p)))
    if (options.min_p[rows] > 0.0).any():
        logits = keep(logits, min_p_threshold(logits, to_device(options.min_p)))
    return draw(logits, to_device(options.uniform))


class SamplingRows:
    """The sampling options of all running sequences, kept by row so that a step only gathers."""

    def __init__(self, max_num_seqs: int) -> None:
        self._sequences: list[Sequence | None] = [None] * max_num_seqs
        self._temperature = np.zeros(max_num_seqs, np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int64)
        self._top_p = np.ones(max_num_seqs, np.float32)
        self._min_p = np.zeros(max_num_seqs, np.float32)
        self._seed = np.zeros(max_num_seqs, np.uint64)
        self._choice_index = np.zeros(max_num_seqs, np.uint64)

    def select(self, sample_rows: SampleRows) -> SamplingOptions:
        sequences = sample_rows.sequences
        for sequence in sequences:
            if self._sequences[sequence.row] is not sequence:
                self._place(sequence)
        rows = np.array([sequence.row for sequence in sequences], np.int64)
        temperature = self._temperature[rows]
        if temperature.any():
            numbers = uniform(self._seed[rows], self._choice_index[rows], sample_rows.positions())
        else:
            numbers = np.zeros(len(rows))
        return SamplingOptions(temperature, self._top_k[rows], self._top_p[rows], self._min_p[rows], numbers)

    def _place(self, sequence: Sequence) -> None:
        row, params = sequence.row, sequence.request.params
        self._sequences[row] = sequence
        self._temperature[row] = params.temperature
        self._top_k[row] = max(params.top_k, 0)
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._seed[row] = sequence.request.seed % 2**64
        self._choice_index[row] = sequence.choice_index


class Sampler:
    """Samples the rows that a batch asks for. Holds only what saves work between steps."""

    def __init__(self, max_num_seqs: int) -> None:
        self._rows = SamplingRows(max_num_seqs)

    def sample(self, logits: torch.Tensor, batch: ScheduledBatch) -> SampledTokens:
        """logits: [R, V] float32, R as `sample_rows` has it, overwritten by the masks."""
        if not batch.sampling:
            return SampledTokens([])
        rows = sample_rows(batch)
        mask_early_stops(logits, rows)
        token_ids, finite = sample(logits, self._rows.select(rows))
        packed: list[int] = torch.where(finite, token_ids, -1).tolist()
        return SampledTokens([token_id if token_id >= 0 else None for token_id in packed])


def mask_early_stops(logits: torch.Tensor, rows: SampleRows) -> None:
    """Before `min_tokens` output tokens, what would end the sequence cannot be chosen. In place on [R, V]."""
    for row, sequence in enumerate(rows.sequences):
        if sequence.num_output_tokens + len(rows.drafts.get(row, ())) < sequence.request.params.min_tokens:
            logits[row, list(sequence.stop_token_ids)] = -torch.inf
