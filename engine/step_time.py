"""How long steps take, learned from those that ran, and how much of a prompt still fits beside decodes."""

from __future__ import annotations

from quire.scheduler.output import ScheduledBatch

DECAY = 0.97
"""Weight of a step after the next one: about 30 steps are remembered, so that longer contexts are followed."""
MAX_SURPRISE = 3.0
"""A step counts as no longer than so many times what was expected: the machine may have been busy otherwise."""
HEADROOM = 0.9
"""Share of the target that is planned for: steps vary."""
MIN_PROMPT_TOKENS = 16
"""A prompt gets on by so many tokens a step even if the target cannot be kept."""


class StepTimeModel:
    """Seconds of a step = base + per decode * decodes + per prompt token * prompt tokens; no term is ever negative.

    The first two come from steps that only decode, by least squares; the third from what other steps take beyond that.
    Before any step has only decoded it holds the whole time of a step, and too few tokens are planned until they fit.
    """

    __slots__ = ("_decodes", "_decodes_seconds", "_decodes_squared", "_extra", "_prompt_tokens", "_seconds", "_weight")

    def __init__(self) -> None:
        self._weight = self._decodes = self._decodes_squared = self._decodes_seconds = self._seconds = 0.0
        self._prompt_tokens = self._extra = 0.0

    def observe(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """A step ran."""
        expected = self.seconds(num_decodes, num_prompt_tokens)
        if expected > 0 and (self._prompt_tokens if num_prompt_tokens else self._weight) > 0:
            seconds = min(seconds, MAX_SURPRISE * expected)
        if num_prompt_tokens:
            extra = max(seconds - self.seconds(num_decodes, 0), 0.0)
            self._extra = DECAY * self._extra + extra
            self._prompt_tokens = DECAY * self._prompt_tokens + num_prompt_tokens
            return
        self._weight = DECAY * self._weight + 1
        self._decodes = DECAY * self._decodes + num_decodes
        self._decodes_squared = DECAY * self._decodes_squared + num_decodes**2
        self._decodes_seconds = DECAY * self._decodes_seconds + num_decodes * seconds
        self._seconds = DECAY * self._seconds + seconds

    def seconds(self, num_decodes: int, num_prompt_tokens: int) -> float:
        """What such a step is expected to take; 0 while nothing is known."""
        seconds = self.seconds_per_prompt_token * num_prompt_tokens
        if self._weight == 0:
            return seconds
        mean_decodes, mean_seconds = self._decodes / self._weight, self._seconds / self._weight
        variance = self._decodes_squared / self._weight - mean_decodes**2
        covariance = self._decodes_seconds / self._weight - mean_decodes * mean_seconds
        slope = max(covariance / variance, 0.0) if variance > 1e-6 else 0.0
        return seconds + max(mean_seconds + slope * (num_decodes - mean_decodes), 0.0)

    @property
    def seconds_per_prompt_token(self) -> float:
        return self._extra / self._prompt_tokens if self._prompt_tokens else 0.0


class StepPacer:
    """Keeps steps that decode within a target: by the size of what they compute of prompts.

    Args:
        target: seconds.
        max_num_tokens: of a step.
    """

    def __init__(self, target: float, max_num_tokens: int) -> None:
        self._target = target
        self._max_num_tokens = max_num_tokens
        self._model = StepTimeModel()

    def observe(self, batch: ScheduledBatch, seconds: float) -> int:
        """A step took so long; how many tokens of prompts the next may compute, if as many decode in it."""
        num_sampling = batch.num_decodes + sum(1 + len(drafts) for drafts in batch.drafts.values())
        self._model.observe(num_sampling, batch.num_tokens - num_sampling, seconds)
        return self.max_prompt_tokens(len(batch.sampling))

    def max_prompt_tokens(self, num_decodes: int) -> int:
        """Never more than a step may have, never so few that prompts would not get on."""
        per_token = self._model.seconds_per_prompt_token
        left = HEADROOM * self._target - self._model.seconds(num_decodes, 0)
        num_tokens = self._max_num_tokens if per_token == 0 else int(left / per_token)
        return min(max(num_tokens, MIN_PROMPT_TOKENS), self._max_num_tokens)
