"""`best_of`: more choices are computed than are returned, and the best are known only at the end."""

from __future__ import annotations

import math
from dataclasses import replace

from quire.engine.text_delta import TextDelta, join
from quire.sampling_params import SamplingParams
from quire.scheduler.output import FinishReason

_JOIN_LENGTH = 64
_JOIN_SHARE = 8


def ranks_choices(params: SamplingParams) -> bool:
    """The front picks the best `n` of the choices. (Of beams the scheduler sends the best ones only.)"""
    return not params.use_beam_search and params.num_sequences > params.n


def comes_late(params: SamplingParams) -> bool:
    """Most of the answer comes at its end, so that silence until then means nothing."""
    return params.use_beam_search or ranks_choices(params)


def engine_params(params: SamplingParams) -> SamplingParams:
    """What the engine is asked: choices can be ranked only by log-probabilities, whether or not they are shown."""
    if ranks_choices(params) and params.logprobs is None:
        return replace(params, logprobs=0)
    return params


class BestOf:
    """Keeps the choices of one request until all have ended, then hands out the best ones.

    The best has the highest mean log-probability of its tokens, as far as a stop string left them; of equal ones the
    first. A choice that failed comes last.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._parts: dict[int, list[TextDelta]] = {}

    def add(self, delta: TextDelta) -> None:
        parts = self._parts.setdefault(delta.choice_index, [])
        parts.append(delta)
        # A join comes only once the text has grown by a share of itself, so that the cost stays linear in its length.
        if len(parts) >= max(_JOIN_LENGTH, delta.num_output_tokens // _JOIN_SHARE):
            self._parts[delta.choice_index] = [join(parts)]

    def pick(self) -> list[TextDelta]:
        """The `n` best, best first and numbered in this order, each as one delta."""
        whole = sorted((join(parts) for parts in self._parts.values()), key=_rank)
        best, others = whole[: self._n], whole[self._n :]
        for index, delta in enumerate(best):
            delta.choice_index = index
        best[0].num_discarded_tokens = sum(delta.num_output_tokens for delta in others)
        return best


def _rank(delta: TextDelta) -> tuple[float, int]:
    if delta.finish_reason == FinishReason.ERROR.value:
        return math.inf, delta.choice_index
    return -(delta.cumulative_log_prob or 0.0) / max(1, delta.num_output_tokens), delta.choice_index
