"""Running account of one request: what each choice has so far, what it costs, and when it came."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.server.log_probs import LogProbs
from quire.server.metrics import Metrics
from quire.server.prompts import PromptJob
from quire.server.responses import ChunkTemplate, Usage, usage

if TYPE_CHECKING:
    from quire.engine.text_delta import TextDelta


@dataclass(slots=True)
class ChoiceTally:
    index: int
    """In the answer."""
    template: ChunkTemplate | None = None
    """Of a stream's events that tell this choice's text and nothing else."""
    num_tokens: int = 0
    num_cached_tokens: int = 0
    started_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    finished: bool = False
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    log_probs: LogProbs | None = None
    cumulative_log_prob: float | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add_token(self, num_tokens: int, now: float, metrics: Metrics) -> None:
        """Account for a token that is neither the first nor the last; `num_tokens` with it, `now` as time.monotonic()
        says."""
        metrics.inter_token_latency.observe(now - self.last_token_at)
        metrics.generation_tokens.inc(1)
        self.num_tokens = num_tokens
        self.last_token_at = now


class Tally:
    """Of all choices of all prompts, keyed by the index that the answer gives them."""

    __slots__ = (
        "_jobs",
        "_last_progress",
        "_metrics",
        "_n",
        "_num_discarded_tokens",
        "_num_unfinished",
        "begin",
        "choices",
    )

    def __init__(self, jobs: list[PromptJob], n: int, metrics: Metrics) -> None:
        self._jobs = jobs
        self._n = n
        self._metrics = metrics
        self.begin = self._last_progress = time.monotonic()
        self.choices = [ChoiceTally(index) for index in range(len(jobs) * n)]
        self._num_unfinished = len(self.choices)
        self._num_discarded_tokens = 0

    def index(self, job: PromptJob, choice_index: int) -> int:
        return choice_index + job.prompt_index * self._n

    def add(self, job: PromptJob, delta: TextDelta) -> ChoiceTally:
        """Account for one delta; its text and token ids are kept by whoever needs them."""
        choice = self.choices[delta.choice_index + job.prompt_index * self._n]
        now = self._last_progress = time.monotonic()
        num_new_tokens = delta.num_output_tokens - choice.num_tokens
        if num_new_tokens > 0:
            if choice.num_tokens:
                self._metrics.inter_token_latency.observe(now - choice.last_token_at)
            else:
                self._observe_first_token(job, delta, choice, now)
            self._metrics.generation_tokens.inc(num_new_tokens)
            choice.last_token_at = now
        elif not delta.num_output_tokens and delta.choice_index == 0 and delta.started_at is not None:
            self._observe_prompt(job, delta)
        choice.num_tokens = delta.num_output_tokens
        choice.num_cached_tokens = delta.num_cached_tokens
        if delta.finish_reason is not None and not choice.finished:
            choice.finished = True
            choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
            choice.cumulative_log_prob = delta.cumulative_log_prob
            if delta.num_discarded_tokens:
                self._num_discarded_tokens += delta.num_discarded_tokens
                self._metrics.generation_tokens.inc(delta.num_discarded_tokens)
            self._num_unfinished -= 1
            self._observe_finished(choice)
        return choice

    @property
    def last_progress(self) -> float:
        """When something came last, in seconds of time.monotonic()."""
        return max(self._last_progress, *(choice.last_token_at for choice in self.choices))

    @property
    def all_finished(self) -> bool:
        return self._num_unfinished == 0

    def usage(self) -> Usage:
        """Of the whole request: each prompt counts once, however many choices it has, and of `best_of` the tokens of
        all choices, those that are not returned included, as with OpenAI."""
        return usage(
            sum(len(job.token_ids) for job in self._jobs),
            sum(choice.num_tokens for choice in self.choices) + self._num_discarded_tokens,
            sum(choice.num_cached_tokens for choice in self.choices[:: self._n]),
        )

    def choice_usage(self, job: PromptJob, choice: ChoiceTally) -> Usage:
        """Of one choice so far."""
        return usage(len(job.token_ids), choice.num_tokens, choice.num_cached_tokens)

    def observe_begin(self) -> None:
        for job in self._jobs:
            self._metrics.request_prompt_tokens.observe(len(job.token_ids))
            self._metrics.params_n.observe(job.params.n)
            self._metrics.params_max_tokens.observe(job.params.max_tokens or 0)

    def observe_end(self) -> None:
        for choice in self.choices:
            if not choice.finished:
                self._metrics.finished("abort")

    def _observe_first_token(self, job: PromptJob, delta: TextDelta, choice: ChoiceTally, now: float) -> None:
        metrics = self._metrics
        choice.first_token_at = now
        choice.started_at = now if delta.started_at is None else delta.started_at
        metrics.time_to_first_token.observe(now - self.begin)
        metrics.queue_time.observe(max(0.0, choice.started_at - self.begin))
        metrics.prefill_time.observe(now - choice.started_at)
        if delta.choice_index == 0:
            self._observe_prompt(job, delta)

    def _observe_prompt(self, job: PromptJob, delta: TextDelta) -> None:
        self._metrics.prompt_tokens.inc(len(job.token_ids))
        self._metrics.prompt_tokens_cached.inc(delta.num_cached_tokens)

    def _observe_finished(self, choice: ChoiceTally) -> None:
        self._metrics.finished(choice.finish_reason or "stop")
        self._metrics.request_generation_tokens.observe(choice.num_tokens)
        self._metrics.latency.observe(time.monotonic() - self.begin)
        decode_time = choice.last_token_at - choice.first_token_at
        self._metrics.decode_time.observe(decode_time)
        self._metrics.inference_time.observe(choice.last_token_at - choice.started_at)
        if choice.num_tokens > 1:
            self._metrics.time_per_output_token.observe(decode_time / (choice.num_tokens - 1))
