"""The engine in the caller's own process: `LLM(model).generate(prompts, SamplingParams(...))`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from quire.config import EngineConfig
from quire.engine.best_of import engine_params
from quire.engine.engine import Engine
from quire.engine.messages import EngineInfo
from quire.engine.output_processor import OutputProcessor
from quire.engine.scoring import (
    ContinuationScore,
    PerplexityResult,
    encode_pair,
    perplexity_result,
    score_of_continuation,
    windows,
)
from quire.engine.text_delta import TextDelta
from quire.engine.tokenizer import Tokenizer, with_bad_word_ids
from quire.models.hub import resolve_model
from quire.sampling_params import InvalidParameterError, SamplingParams
from quire.scheduler.output import SchedulerStats, TokenLogProbs
from quire.scheduler.request import Request


@dataclass(slots=True)
class CompletionOutput:
    """One choice of one prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None
    """Sum over the tokens, where log-probabilities were computed; of a beam, what the search ranked it by, without
    length penalty."""
    logprobs: list[TokenLogProbs] | None = None
    """One for each of `token_ids`, if asked for."""

    def extend(self, delta: TextDelta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        self.cumulative_logprob = delta.cumulative_log_prob
        if delta.log_probs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += delta.log_probs


@dataclass(slots=True)
class RequestOutput:
    """All choices of one prompt, in order of their index: of `best_of` and of a beam search the best first."""

    prompt: str | None
    """None if the prompt came as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogProbs] | None = None
    """One for each prompt token but the first, if asked for."""


SCORING = SamplingParams(max_tokens=0, prompt_logprobs=1)


class LLM:
    """A model loaded into this process.

    Args:
        model: directory of a Hugging Face checkpoint, or a hub name; without it the bundled model.
        **options: fields of `quire.config.EngineConfig`.

    Raises:
        ConfigError: the model or an option cannot be used; the message says what to do.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        if model is None:
            from quire.tales import MODEL_DIR

            model = MODEL_DIR
        directory = resolve_model(str(model))
        config = EngineConfig(model=str(directory), **options)
        self.tokenizer = Tokenizer(directory)
        self._engine = Engine(config)
        self._seeds = random.Random(config.seed)
        self._num_requests = 0

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def stats(self) -> SchedulerStats:
        return self._engine.stats()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        show_progress: bool = False,
    ) -> list[RequestOutput]:
        """Complete each prompt; all of them share the engine's batches.

        Args:
            prompts: a text, texts, or lists of token ids.
            sampling_params: one for all prompts, or one for each.
            show_progress: draw a progress bar on the terminal.

        Returns:
            one RequestOutput for each prompt, in their order.

        Raises:
            InvalidParameterError: a parameter or a token id is out of bounds.
            AdmissionError: a prompt can never fit, or a grammar cannot be used. Nothing was generated then.
        """
        each: list[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else [*prompts]
        params = self._one_for_each(sampling_params or SamplingParams(), len(each))
        results = [self._new_result(prompt, p) for prompt, p in zip(each, params, strict=True)]
        self._run(results, params, OutputProcessor(self.tokenizer), "generating", show_progress)
        return results

    def score(
        self, contexts: Sequence[str], continuations: Sequence[str], *, show_progress: bool = False
    ) -> list[ContinuationScore]:
        """How probable each continuation is after its context.

        Contexts that begin alike are computed once, as long as the KV-cache has room for them: put them side by side.

        Raises:
            InvalidParameterError: a continuation has no token of its own.
            AdmissionError: a pair is longer than the context length; nothing is cut off in silence.
        """
        if len(contexts) != len(continuations):
            raise ValueError(f"There are {len(contexts)} contexts but {len(continuations)} continuations.")
        pairs = [encode_pair(self.tokenizer, *pair) for pair in zip(contexts, continuations, strict=True)]
        scored = self._score([token_ids for token_ids, _ in pairs], show_progress)
        return [
            score_of_continuation(entries, num_context_tokens)
            for entries, (_, num_context_tokens) in zip(scored, pairs, strict=True)
        ]

    def perplexity(
        self, text: str | Sequence[int], *, stride: int | None = None, show_progress: bool = False
    ) -> PerplexityResult:
        """How probable a text, or token ids, of any length is.

        Args:
            text: encoded with the special tokens that the tokenizer adds. Its first token is not scored.
            stride: a text longer than the context is cut into windows that begin so many tokens after each other.
                Smaller is slower and closer to what an unlimited context would give; None is the fastest.

        Raises:
            InvalidParameterError: there is nothing to score, or `stride` would leave tokens out.
        """
        token_ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        cut = windows(len(token_ids), self._engine.info.max_model_len, stride)
        scored = self._score([token_ids[window.start : window.end] for window in cut], show_progress)
        log_probs = [
            entry.log_prob
            for entries, window in zip(scored, cut, strict=True)
            for entry in entries[len(entries) - window.num_scored :]
        ]
        return perplexity_result(log_probs, token_ids, self.tokenizer.decode)

    def _score(self, token_lists: list[list[int]], show_progress: bool) -> list[list[TokenLogProbs]]:
        """Of all tokens but the first of each list, with the best token at each position."""
        results = [self._new_result(token_ids, SCORING) for token_ids in token_lists]
        self._run(results, [SCORING] * len(results), OutputProcessor(self.tokenizer), "scoring", show_progress)
        scored = []
        for result in results:
            if result.prompt_logprobs is None:
                raise RuntimeError("The model's logits are not finite.")
            scored.append(result.prompt_logprobs)
        return scored

    def _run(
        self,
        results: list[RequestOutput],
        params: list[SamplingParams],
        processor: OutputProcessor,
        label: str,
        show_progress: bool,
    ) -> None:
        """Submit everything and step until it has ended; what comes is collected in `results`."""
        by_id = self._submit(results, params, processor)
        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            with Progress(*columns, disable=not show_progress) as progress:
                bar = progress.add_task("", total=len(results))
                while self._engine.has_work():
                    step = processor.process(self._engine.step())
                    for request_id, index in step.aborts:
                        self._engine.abort(request_id, index)
                    for request_id, deltas in step.deltas.items():
                        _collect(by_id[request_id], deltas)
                    progress.advance(bar, len(step.finished))
        finally:
            for request_id in by_id:
                self._engine.abort(request_id)

    def _new_result(self, prompt: str | Sequence[int], params: SamplingParams) -> RequestOutput:
        text = prompt if isinstance(prompt, str) else None
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not token_ids:
            raise InvalidParameterError("prompt", "The prompt must have at least one token.")
        vocab_size = self._engine.info.vocab_size
        if not all(0 <= token_id < vocab_size for token_id in token_ids):
            raise InvalidParameterError("prompt", f"Token ids must lie in the vocabulary: 0 to {vocab_size - 1}.")
        return RequestOutput(text, token_ids, [CompletionOutput(index) for index in range(params.n)])

    def _one_for_each(self, params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
        if isinstance(params, SamplingParams):
            return [with_bad_word_ids(params, self.tokenizer)] * count
        if len(params) != count:
            raise ValueError(f"There are {count} prompts but {len(params)} sampling_params.")
        return [with_bad_word_ids(p, self.tokenizer) for p in params]

    def _submit(
        self, results: list[RequestOutput], params: list[SamplingParams], processor: OutputProcessor
    ) -> dict[str, RequestOutput]:
        by_id: dict[str, RequestOutput] = {}
        try:
            for result, p in zip(results, params, strict=True):
                request_id = str(self._num_requests)
                self._num_requests += 1
                by_id[request_id] = result
                self._engine.add(
                    Request(
                        request_id=request_id,
                        prompt_token_ids=result.prompt_token_ids,
                        params=engine_params(p),
                        seed=self._seeds.getrandbits(64) if p.seed is None else p.seed,
                        eos_token_ids=tuple(self._engine.info.eos_token_ids),
                    )
                )
                processor.add(request_id, result.prompt_token_ids, p)
        except BaseException:
            for request_id in by_id:
                self._engine.abort(request_id)
            raise
        return by_id


def _collect(result: RequestOutput, deltas: list[TextDelta]) -> None:
    for delta in deltas:
        result.outputs[delta.choice_index].extend(delta)
        result.num_cached_tokens = max(result.num_cached_tokens, delta.num_cached_tokens)
        if delta.prompt_log_probs is not None:
            result.prompt_logprobs = delta.prompt_log_probs
