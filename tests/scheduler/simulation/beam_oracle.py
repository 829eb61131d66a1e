"""Beam search as a textbook has it: whole sequences, no blocks, no batches. What the ghost model says is its model."""

from __future__ import annotations

from dataclasses import dataclass

from quire.sampling_params import SamplingParams
from quire.scheduler.output import MIN_LOG_PROB, Candidates, FinishReason
from quire.scheduler.request import Request

Told = tuple[list[int], FinishReason, int | None, float | None]
"""Output tokens, how they ended, and the log-probability of one choice."""


@dataclass(frozen=True)
class PairStops:
    """A stop string that two tokens in a row spell out."""

    pair: tuple[int, int]

    def ended(self, output_token_ids: list[int]) -> bool:
        return tuple(output_token_ids[-2:]) == self.pair


def candidates_after(visible: list[int], request: Request, num_output_tokens: int, vocab_size: int) -> Candidates:
    """Continuations by falling log-probability; of equal ones the lower id first. Some tokens are masked, by chance."""
    params = request.params
    state = hash((hash(tuple(visible)), request.seed))
    stops = stop_tokens(request)
    scored = []
    for token_id in range(vocab_size):
        value = hash((state, token_id))
        masked = value % 11 == 0 or (num_output_tokens < params.min_tokens and token_id in stops)
        if not masked:
            scored.append((-(value % 97) / 16, token_id))
    scored.sort(key=lambda each: (-each[0], each[1]))
    scored = scored[: num_candidates(request)]
    return Candidates([token_id for _, token_id in scored], [log_prob for log_prob, _ in scored])


def num_candidates(request: Request) -> int:
    return request.params.num_sequences * max(2, 1 + len(stop_tokens(request)))


def stop_tokens(request: Request) -> set[int]:
    return {*request.params.stop_token_ids, *(() if request.params.ignore_eos else request.eos_token_ids)}


def search(request: Request, max_num_tokens: int, window: int | None, vocab_size: int, fingerprints) -> list[Told]:
    """What each of the `n` choices is told. `fingerprints` gives the content of all slots of a sequence."""
    params = request.params
    width, prompt = params.num_sequences, list(request.prompt_token_ids)
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    last_alive: list[int] = []
    finished: list[tuple[float, list[int], FinishReason, int | None, float]] = []
    while True:
        continuations = []
        for score, output in beams:
            content = fingerprints(prompt + output)
            visible = content if window is None else content[-window:]
            candidates = candidates_after(visible, request, len(output), vocab_size)
            for token_id, log_prob in zip(candidates.token_ids, candidates.log_probs, strict=True):
                continuations.append((score + log_prob, [*output, token_id]))
        continuations.sort(key=lambda each: -each[0])
        continuations = continuations[: num_candidates(request)]
        ends = [end_of(output, request, max_num_tokens) for _, output in continuations]
        for (score, output), end in list(zip(continuations, ends, strict=True))[:width]:
            if end is not None:
                finished.append((score / len(output) ** params.length_penalty, output, *end, score))
        finished = sorted(finished, key=lambda each: -each[0])[:width]
        beams = [each for each, end in zip(continuations, ends, strict=True) if end is None][:width]
        last_alive = beams[0][1] if beams else last_alive
        if not beams or is_over(beams, finished, params, max_num_tokens - len(prompt)):
            break
    if not finished:  # masks have left no way on; what was certain until then may have been told
        return [(last_alive, FinishReason.ERROR, None, None)] + [([], FinishReason.ERROR, None, None)] * (params.n - 1)
    told: list[Told] = [(output, reason, stop, score) for _, output, reason, stop, score in finished[: params.n]]
    return told + [([], FinishReason.STOP, None, MIN_LOG_PROB)] * (params.n - len(told))


def end_of(output: list[int], request: Request, max_num_tokens: int) -> tuple[FinishReason, int | None] | None:
    params, token_id = request.params, output[-1]
    if len(output) > params.min_tokens:
        if token_id in request.eos_token_ids and not params.ignore_eos:
            return FinishReason.STOP, None
        if token_id in params.stop_token_ids:
            return FinishReason.STOP, token_id
        if request.stop_texts is not None and request.stop_texts.ended(output):
            return FinishReason.STOP, None
    if len(request.prompt_token_ids) + len(output) == max_num_tokens:
        return FinishReason.LENGTH, None
    return None


def is_over(beams, finished, params: SamplingParams, max_output_tokens: int) -> bool:
    if len(finished) < params.num_sequences:
        return False
    if params.early_stopping is True:
        return True
    best_score, output = beams[0]
    length = max_output_tokens if params.early_stopping == "never" and params.length_penalty > 0 else len(output)
    return best_score / length**params.length_penalty <= finished[-1][0]
