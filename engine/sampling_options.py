"""The rows that one step samples, and the options of all running sequences kept by row, so that a step only gathers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quire.engine.random_numbers import uniform
from quire.engine.sample_rows import SampleRows
from quire.sampling_params import SamplingParams
from quire.scheduler.sequence import Sequence

Rows = npt.NDArray[np.int64]


@dataclass(slots=True)
class SampleRow:
    """One row of logits whose options need a look at the tokens before it."""

    index: int
    """Of the logits row."""
    sequence: Sequence
    drafts: list[int]
    """Guessed tokens that stand between the sequence's own and the one to be sampled."""
    num_output_tokens: int
    """Before the one to be sampled, drafts included."""

    @property
    def params(self) -> SamplingParams:
        return self.sequence.request.params

    def last_tokens(self, count: int) -> list[int]:
        """Up to `count` tokens, prompt and output, right before the one to be sampled."""
        own = self.sequence.token_ids[-count:]
        return own if not self.drafts else (own + self.drafts)[-count:]


def make_row(index: int, sequence: Sequence, drafts: list[int]) -> SampleRow:
    return SampleRow(index, sequence, drafts, sequence.num_output_tokens + len(drafts))


@dataclass(slots=True)
class SamplingOptions:
    """Options of R rows on the host; built by `SamplingRows.select`."""

    temperature: npt.NDArray[np.float32]  # [R]
    top_k: npt.NDArray[np.int64]  # [R], 0 is off
    top_p: npt.NDArray[np.float32]  # [R]
    min_p: npt.NDArray[np.float32]  # [R]
    typical_p: npt.NDArray[np.float32]  # [R], 1 is off
    uniform: npt.NDArray[np.float64]  # [R], in (0, 1); read only where temperature > 0


@dataclass(slots=True)
class StepRows:
    """What one step asks of R logits rows."""

    options: SamplingOptions
    adjusted: list[SampleRow]
    """Rows with penalties, biases or masks, and all beams."""
    beams: list[SampleRow]
    scored: list[SampleRow]
    """Rows that want `logprobs` of the token they sample; not beams."""


class SamplingRows:
    """A sequence's options are read once, when it first samples from its row."""

    def __init__(self, max_num_seqs: int) -> None:
        self._sequences: list[Sequence | None] = [None] * max_num_seqs
        self._temperature = np.zeros(max_num_seqs, np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int64)
        self._top_p = np.ones(max_num_seqs, np.float32)
        self._min_p = np.zeros(max_num_seqs, np.float32)
        self._typical_p = np.ones(max_num_seqs, np.float32)
        self._seed = np.zeros(max_num_seqs, np.uint64)
        self._choice_index = np.zeros(max_num_seqs, np.uint64)
        self._adjusts = np.zeros(max_num_seqs, np.bool_)
        self._is_beam = np.zeros(max_num_seqs, np.bool_)
        self._is_scored = np.zeros(max_num_seqs, np.bool_)
        self._is_greedy = [False] * max_num_seqs

    def are_greedy(self, sequences: list[Sequence]) -> bool:
        """Whether all of them take the most probable token, and nothing else is asked for."""
        self._place_new(sequences)
        is_greedy = self._is_greedy
        return all(is_greedy[sequence.row] for sequence in sequences)

    def select(self, sample_rows: SampleRows) -> StepRows:
        sequences = sample_rows.sequences
        self._place_new(sequences)
        rows = np.array([sequence.row for sequence in sequences], np.int64)
        temperature = self._temperature[rows]
        if temperature.any():
            numbers = uniform(self._seed[rows], self._choice_index[rows], sample_rows.positions())
        else:
            numbers = np.zeros(len(rows))
        options = SamplingOptions(
            temperature, self._top_k[rows], self._top_p[rows], self._min_p[rows], self._typical_p[rows], numbers
        )

        def chosen(flags: npt.NDArray[np.bool_]) -> list[SampleRow]:
            indices: list[int] = np.flatnonzero(flags[rows]).tolist()
            return [make_row(index, sequences[index], sample_rows.drafts.get(index, [])) for index in indices]

        return StepRows(options, chosen(self._adjusts), chosen(self._is_beam), chosen(self._is_scored))

    def _place_new(self, sequences: list[Sequence]) -> None:
        placed = self._sequences
        for sequence in sequences:
            if placed[sequence.row] is not sequence:
                self._place(sequence)

    def _place(self, sequence: Sequence) -> None:
        row, params = sequence.row, sequence.request.params
        self._sequences[row] = sequence
        # A beam's tokens are chosen among its candidates: its row of the chain's end is that of a greedy request.
        self._temperature[row] = 0.0 if params.use_beam_search else params.temperature
        self._top_k[row] = max(params.top_k, 0)
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._typical_p[row] = params.typical_p
        self._seed[row] = sequence.request.seed % 2**64
        self._choice_index[row] = sequence.choice_index
        self._adjusts[row] = params.use_beam_search or adjusts_logits(params)
        self._is_beam[row] = params.use_beam_search
        self._is_scored[row] = params.logprobs is not None and not params.use_beam_search
        self._is_greedy[row] = not (self._temperature[row] or self._adjusts[row] or self._is_scored[row])


def adjusts_logits(params: SamplingParams) -> bool:
    """Whether anything before the temperature is on."""
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.allowed_token_ids is not None
        or params.bad_word_token_ids
        or params.grammar is not None
        or params.min_tokens
    )
