"""StepOutput to TextDelta: detokenizing, stop strings, token counts. Used by the front process and by LLM alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from quire.engine.detokenizer import DetokenizerFactory, IncrementalDetokenizer, StopMatcher, StopStrings
from quire.engine.tokenizer import Tokenizer
from quire.sampling_params import SamplingParams
from quire.scheduler.output import FinishReason, StepOutput, TokenLogProbs


@dataclass(slots=True)
class TextDelta:
    """What one step brought to one choice, as text.

    `text` lags behind `token_ids` while a character is incomplete or a stop string may have begun. The concatenation of
    the texts is the choice's text; after a stop string it is what stands before it (or the string too, if included).
    """

    choice_index: int
    text: str
    token_ids: list[int]
    """Up to and including the token that completed a stop string, and the end-of-sequence or stop token."""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the choice; None for end-of-sequence, length and errors."""
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    """Output tokens of this choice so far."""
    log_probs: list[TokenLogProbs] | None = None
    """One for each of `token_ids`, if the request asks for `logprobs`."""
    prompt_log_probs: list[TokenLogProbs] | None = None
    """Once for a request that asks for `prompt_logprobs`: of all prompt tokens but the first."""
    cumulative_log_prob: float | None = None
    """With the finish of a beam: its log-probability, without length penalty."""
    started_at: float | None = None
    """When the engine first scheduled the request, in seconds of time.monotonic(); None where nobody measured."""


@dataclass(slots=True)
class ProcessedStep:
    """What one step brought to all requests."""

    deltas: dict[str, list[TextDelta]] = field(default_factory=dict)
    """By request id."""
    aborts: list[tuple[str, int]] = field(default_factory=list)
    """(request id, choice index) of choices that a stop string ended here and that the engine must abort."""
    finished: list[str] = field(default_factory=list)
    """Ids of requests whose choices have all ended; the processor has forgotten them."""


class OutputProcessor:
    """Text state of all open requests. One thread only."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._detokenizers = DetokenizerFactory(tokenizer)
        self._requests: dict[str, RequestState] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self._requests[request_id] = RequestState(self._detokenizers, prompt_token_ids, params)

    def remove(self, request_id: str) -> None:
        """Forget a request; an unknown id is a no-op. Outputs still on their way for it are dropped."""
        self._requests.pop(request_id, None)

    def process(self, outputs: Iterable[StepOutput]) -> ProcessedStep:
        """Turn one step's outputs into text. What concerns no open request or an ended choice is dropped."""
        step = ProcessedStep()
        for output in outputs:
            request = self._requests.get(output.request_id)
            choice = None if request is None else request.choices.get(output.choice_index)
            if request is None or choice is None:
                continue
            delta = choice.advance(output)
            step.deltas.setdefault(output.request_id, []).append(delta)
            if delta.finish_reason is None:
                continue
            del request.choices[output.choice_index]
            if output.finish_reason is None:
                step.aborts.append((output.request_id, output.choice_index))
            if not request.choices:
                del self._requests[output.request_id]
                step.finished.append(output.request_id)
        return step


class RequestState:
    """The choices of one request that have not ended, by index."""

    __slots__ = ("choices",)

    def __init__(
        self, detokenizers: DetokenizerFactory, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        stop = StopStrings(params.stop, include_in_output=params.include_stop_str_in_output) if params.stop else None
        created = detokenizers.create_many(prompt_token_ids, params.skip_special_tokens, params.n)
        self.choices = {
            index: ChoiceState(index, params, detokenizer, None if stop is None else StopMatcher(stop))
            for index, detokenizer in enumerate(created)
        }


class ChoiceState:
    """Text state of one choice."""

    __slots__ = ("_detokenizer", "_index", "_num_output_tokens", "_params", "_stop")

    def __init__(
        self, index: int, params: SamplingParams, detokenizer: IncrementalDetokenizer, stop: StopMatcher | None
    ) -> None:
        self._index = index
        self._params = params
        self._detokenizer = detokenizer
        self._stop = stop
        self._num_output_tokens = 0

    def advance(self, output: StepOutput) -> TextDelta:
        """The text of one step. A stop string that the step's tokens complete overrules the engine's finish reason.

        The token that ended the choice in the engine (end of sequence or a stop token) counts but has no text, unless
        stop strings are to be included.
        """
        delta = TextDelta(self._index, "", output.token_ids, num_cached_tokens=output.num_cached_tokens)
        delta.prompt_log_probs = output.prompt_log_probs
        silent = -1
        if output.finish_reason is FinishReason.STOP and not self._params.include_stop_str_in_output:
            silent = len(output.token_ids) - 1
        for position, token_id in enumerate(output.token_ids):
            self._num_output_tokens += 1
            if position == silent:
                continue
            self._show(self._detokenizer.push(token_id), delta)
            if delta.finish_reason is not None:
                delta.token_ids = output.token_ids[: position + 1]
                break
        else:
            if output.finish_reason is not None:
                self._finish(output, delta)
        delta.num_output_tokens = self._num_output_tokens
        return delta

    def _show(self, text: str, delta: TextDelta) -> None:
        if self._stop is None or not text:
            delta.text += text
            return
        delta.text += self._stop.push(text, may_stop=self._num_output_tokens > self._params.min_tokens)
        if self._stop.matched is not None:
            delta.finish_reason = FinishReason.STOP.value
            delta.stop_reason = self._stop.matched

    def _finish(self, output: StepOutput, delta: TextDelta) -> None:
        self._show(self._detokenizer.finish(), delta)
        if delta.finish_reason is None and output.finish_reason is not None:
            if self._stop is not None:
                delta.text += self._stop.finish()
            delta.finish_reason = output.finish_reason.value
            delta.stop_reason = output.stop_reason
