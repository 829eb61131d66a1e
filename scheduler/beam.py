"""Beam search: which beams go on, which hypotheses are kept, and when the search is over.

The rules are those of Hugging Face's `generate` (transformers, generation/utils.py, `_beam_search`): of the best
candidates of all beams, those that end become hypotheses if they are among the best `width`, and the best `width` of
those that do not end go on. Nothing here knows of blocks; scheduler/beam_search.py carries out what is decided here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from quire.scheduler.output import MIN_LOG_PROB, Candidates, ErrorCode, FinishReason, StepOutput, TokenLogProbs
from quire.scheduler.request import Request
from quire.scheduler.sequence import Sequence


@dataclass(slots=True)
class Beam:
    """What a sequence is in its search; `Sequence.beam`."""

    group: BeamGroup
    score: float = 0.0
    """Log-probability of its output."""
    log_probs: list[TokenLogProbs] = field(default_factory=list)
    """Of its output tokens, if the request asks for `logprobs`."""
    candidates: Candidates | None = None
    """Its continuations, once they are computed; it waits for the other beams then."""


@dataclass(slots=True)
class Survivor:
    """A candidate that goes on as a beam."""

    parent: Sequence
    token_id: int
    score: float
    log_probs: list[TokenLogProbs]


@dataclass(slots=True)
class Hypothesis:
    """A candidate that has ended."""

    token_ids: list[int]
    """Output tokens, the one that ended it included."""
    score: float
    """Log-probability divided by length ** length_penalty."""
    log_prob: float
    log_probs: list[TokenLogProbs]
    finish_reason: FinishReason
    stop_reason: int | None
    stopped_by_text: bool = False


class BeamGroup:
    """One beam search.

    `seats` are its sequences, one row each, from admission to the end. The `live` ones are beams, the best first; the
    others are idle: they follow a live one and hold nothing but their row.
    """

    def __init__(self, request: Request, seats: list[Sequence]) -> None:
        params = request.params
        self.request = request
        self.width = params.num_sequences
        self.seats = list(seats)
        self.live = seats[:1]
        self.fork_length = 0
        """Tokens that all live beams begin with; set when a preempted group waits."""
        self.hypotheses: list[Hypothesis] = []
        """The best that have ended, at most `width`, the best first."""
        self.failed = False
        """The logits of a beam were not finite."""
        self.failure: ErrorCode = "no_token_allowed"
        """Why a beam had no continuations, if one had none."""
        self._early_stopping = params.early_stopping
        self._length_penalty = params.length_penalty
        self._max_output_tokens = seats[0].max_num_tokens - len(request.prompt_token_ids)
        self._num_sent = 0
        self.unwanted: set[int] = set()
        """Choices that were aborted."""
        for seat in seats:
            seat.beam = Beam(self)

    @property
    def ready(self) -> bool:
        """Every beam has its candidates."""
        return all(seat.beam is not None and seat.beam.candidates is not None for seat in self.live)

    def advance(self) -> list[Survivor]:
        """Rank the candidates and keep what has ended.

        Returns:
            the beams that go on, the best first; none if the search is over.
        """
        survivors: list[Survivor] = []
        ended: list[Hypothesis] = []
        for rank, (score, parent, place) in enumerate(self._ranked()):
            if len(survivors) == self.width and rank >= self.width:
                break
            beam, candidates = _beam(parent), _candidates(parent)
            token_id = candidates.token_ids[place]
            log_probs = beam.log_probs if candidates.raw is None else [*beam.log_probs, candidates.raw[place]]
            end = self._end_of(parent, token_id)
            if end is not None:
                if rank < self.width:
                    token_ids = [*parent.token_ids[parent.num_prompt_tokens :], token_id]
                    ranked_by = self._normalised(score, len(token_ids))
                    ended.append(Hypothesis(token_ids, ranked_by, score, log_probs, *end))
            elif len(survivors) < self.width:
                survivors.append(Survivor(parent, token_id, score, log_probs))
        # Stable: of equal scores the hypothesis that ended first stays.
        self.hypotheses = sorted(self.hypotheses + ended, key=lambda each: -each.score)[: self.width]
        return survivors if self._goes_on(survivors) else []

    def _ranked(self) -> list[tuple[float, Sequence, int]]:
        """(score, beam, place among its candidates) of the best candidates of all beams; ties go to the better beam."""
        ranked = [
            (_beam(parent).score + log_prob, parent, place)
            for parent in self.live
            for place, log_prob in enumerate(_candidates(parent).log_probs)
        ]
        ranked.sort(key=lambda each: -each[0])
        return ranked[: self.width * max(2, 1 + len(self.seats[0].stop_token_ids))]

    def _end_of(self, parent: Sequence, token_id: int) -> tuple[FinishReason, int | None, bool] | None:
        """How `token_id` ends the beam, if it does: finish reason, stop token id, whether it was by a stop string."""
        finish_reason, stop_reason = parent.end_at(len(parent.token_ids) + 1, token_id)
        if finish_reason is not FinishReason.STOP and self.request.stop_texts is not None:
            output = [*parent.token_ids[parent.num_prompt_tokens :], token_id]
            if len(output) > self.request.params.min_tokens and self.request.stop_texts.ended(output):
                return FinishReason.STOP, None, True
        return None if finish_reason is None else (finish_reason, stop_reason, False)

    def _goes_on(self, survivors: list[Survivor]) -> bool:
        if not survivors:
            return False
        if len(self.hypotheses) < self.width:
            return True
        if self._early_stopping is True:
            return False
        length = self.live[0].num_output_tokens + 1
        if self._early_stopping == "never" and self._length_penalty > 0.0:
            length = self._max_output_tokens
        return self._normalised(survivors[0].score, length) > self.hypotheses[-1].score

    def _normalised(self, log_prob: float, length: int) -> float:
        return log_prob / math.pow(length, self._length_penalty)

    def certain_output(self, num_cached_tokens: int) -> StepOutput | None:
        """The tokens, not told yet, with which the first choice begins whichever beam or hypothesis wins."""
        outputs = [hypothesis.token_ids for hypothesis in self.hypotheses]
        num_prompt_tokens = self.live[0].num_prompt_tokens
        first = self.live[0].token_ids
        start = end = self._num_sent
        shortest = min([len(first) - num_prompt_tokens, *map(len, outputs)])
        while (
            end < shortest
            and all(each[end] == first[num_prompt_tokens + end] for each in outputs)
            and all(seat.token_ids[num_prompt_tokens + end] == first[num_prompt_tokens + end] for seat in self.live)
        ):
            end += 1
        if end == start or 0 in self.unwanted:
            return None
        self._num_sent = end
        output = StepOutput(self.request.request_id, 0, first[num_prompt_tokens:][start:end])
        output.num_cached_tokens = num_cached_tokens
        output.log_probs = self._of_request(_beam(self.live[0]).log_probs[start:end])
        return output

    def final_outputs(self, num_cached_tokens: int) -> list[StepOutput]:
        """All choices, the best first. One for which no hypothesis is left has no tokens and no probability."""
        request_id = self.request.request_id
        wanted = [index for index in range(self.request.params.n) if index not in self.unwanted]
        if self.failed or not self.hypotheses:
            error: ErrorCode = "numerical_error" if self.failed else self.failure
            return [
                StepOutput(request_id, index, [], FinishReason.ERROR, num_cached_tokens=num_cached_tokens, error=error)
                for index in wanted
            ]
        nothing = Hypothesis([], MIN_LOG_PROB, MIN_LOG_PROB, [], FinishReason.STOP, None)
        outputs = []
        for index in wanted:
            hypothesis = self.hypotheses[index] if index < len(self.hypotheses) else nothing
            start = self._num_sent if index == 0 else 0
            outputs.append(
                StepOutput(
                    request_id,
                    index,
                    hypothesis.token_ids[start:],
                    hypothesis.finish_reason,
                    hypothesis.stop_reason,
                    num_cached_tokens,
                    log_probs=self._of_request(hypothesis.log_probs[start:]),
                    stopped_by_text=hypothesis.stopped_by_text,
                    cumulative_log_prob=hypothesis.log_prob,
                )
            )
        return outputs

    def renounce(self, choice_index: int) -> bool:
        """One choice is no longer wanted; whether that was the last one."""
        if choice_index < self.request.params.n:
            self.unwanted.add(choice_index)
        return len(self.unwanted) == self.request.params.n

    def _of_request(self, log_probs: list[TokenLogProbs]) -> list[TokenLogProbs] | None:
        return None if self.request.params.logprobs is None else log_probs


def common_length(sequences: list[Sequence]) -> int:
    """How many tokens all of them begin with."""
    first = sequences[0].token_ids
    length = min(len(sequence.token_ids) for sequence in sequences)
    for sequence in sequences[1:]:
        if sequence.token_ids[:length] != first[:length]:
            length = next(i for i in range(length) if sequence.token_ids[i] != first[i])
    return length


def _beam(sequence: Sequence) -> Beam:
    if sequence.beam is None:
        raise RuntimeError(f"not a beam: {sequence}")
    return sequence.beam


def _candidates(sequence: Sequence) -> Candidates:
    candidates = _beam(sequence).candidates
    if candidates is None:
        raise RuntimeError(f"its candidates are not computed: {sequence}")
    return candidates
