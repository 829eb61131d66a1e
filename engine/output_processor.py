"""StepOutput to TextDelta: detokenizing, stop strings, token counts. Used by the front process and by LLM alike."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.engine.best_of import BestOf, ranks_choices
from quire.engine.detokenizer import DetokenizerFactory, IncrementalDetokenizer, StopMatcher, StopStrings
from quire.engine.text_delta import TextDelta
from quire.engine.tokenizer import Tokenizer
from quire.sampling_params import SamplingParams
from quire.scheduler.output import FinishReason, StepOutput, StepOutputs, TokenLogProbs, TokenRow

if TYPE_CHECKING:
    from quire.engine.delta_queue import DeltaQueue, Sink


@dataclass(slots=True)
class ProcessedStep:
    """What one step brought to all requests."""

    deltas: dict[str, list[TextDelta]] = field(default_factory=dict)
    """By request id."""
    aborts: list[tuple[str, int | None]] = field(default_factory=list)
    """(request id, choice index) of choices that a stop string ended here and that the engine must abort; None: of a
    beam search, whose choices have all ended here before the search has."""
    finished: list[str] = field(default_factory=list)
    """Ids of requests whose choices have all ended; the processor has forgotten them."""


class OutputProcessor:
    """Text state of all open requests. One thread only."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._detokenizers = DetokenizerFactory(tokenizer)
        self._requests: dict[str, RequestState] = {}
        self._plain: dict[str, ChoiceState] = {}
        """The choices of those requests that have a sink and of which a TokenRow tells text alone: these take a short
        way, on which as few objects are touched as can be."""

    def __len__(self) -> int:
        return len(self._requests)

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        queue: DeltaQueue | None = None,
    ) -> None:
        """queue: what the request's deltas are put into; `process_step` may hand text to its sink by itself."""
        request = self._requests[request_id] = RequestState(self._detokenizers, prompt_token_ids, params)
        if queue is not None and queue.sink is not None and (choice := request.plain_choice(params)):
            choice.queue, choice.sink = queue, queue.sink
            self._plain[request_id] = choice

    def remove(self, request_id: str) -> None:
        """Forget a request; an unknown id is a no-op. Outputs still on their way for it are dropped."""
        self._requests.pop(request_id, None)
        self._plain.pop(request_id, None)

    def process_step(self, outputs: StepOutputs) -> ProcessedStep:
        """As `process`, but tokens that a queue's sink takes are not among the deltas."""
        step = ProcessedStep()
        rows = self._hand_on(outputs.tokens, step.deltas)
        self._advance(StepOutputs(rows, outputs.others), step)
        return step

    def _hand_on(self, rows: list[TokenRow], deltas: dict[str, list[TextDelta]]) -> list[TokenRow]:
        """Offer plain text to its queue, else add it to `deltas`; the rows that may tell more than text are left."""
        others: list[TokenRow] = []
        plain, now = self._plain, time.monotonic()
        for row in rows:
            request_id, _, token_id, num_cached_tokens = row
            choice = plain.get(request_id)
            if choice is None or (sink := choice.sink) is None or not sink.reader_waits:
                others.append(row)
                continue
            text = choice.detokenizer.push(token_id)
            choice.num_output_tokens = num_output_tokens = choice.num_output_tokens + 1
            try:
                taken = sink.take_text(text, token_id, num_output_tokens, now)
            except Exception as error:
                choice.fail(error)
            else:
                if not taken:
                    delta = TextDelta(0, text, [token_id], None, None, num_cached_tokens, num_output_tokens)
                    deltas[request_id] = [delta]
        return others

    def process(self, outputs: Iterable[StepOutput]) -> ProcessedStep:
        """Turn one step's outputs into text. What concerns no open request or an ended choice is dropped."""
        step = ProcessedStep()
        self._advance(outputs, step)
        return step

    def _advance(self, outputs: Iterable[StepOutput], step: ProcessedStep) -> None:
        for output in outputs:
            request = self._requests.get(output.request_id)
            choice = None if request is None else request.choices.get(output.choice_index)
            if request is None or choice is None:
                continue
            delta = choice.advance(output)
            has_ended = delta.finish_reason is not None
            if has_ended:
                del request.choices[output.choice_index]
            if deltas := request.release(delta):
                earlier = step.deltas.setdefault(output.request_id, deltas)
                if earlier is not deltas:
                    earlier += deltas
            if not has_ended:
                continue
            if output.finish_reason is None and not (request.searches_beams and request.choices):
                step.aborts.append((output.request_id, None if request.searches_beams else output.choice_index))
            if not request.choices:
                self.remove(output.request_id)
                step.finished.append(output.request_id)


class RequestState:
    """The choices of one request that have not ended, by index, and what is kept back for now."""

    __slots__ = (
        "_best_of",
        "_keeps_nothing",
        "_kept",
        "_prompt_log_probs",
        "_waits_for_prompt",
        "choices",
        "searches_beams",
    )

    def __init__(
        self, detokenizers: DetokenizerFactory, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        stop = StopStrings(params.stop, include_in_output=params.include_stop_str_in_output) if params.stop else None
        self.searches_beams = params.use_beam_search
        count = params.n if params.use_beam_search else params.num_sequences
        created = detokenizers.create_many(prompt_token_ids, params.skip_special_tokens, count)
        self.choices = {
            index: ChoiceState(index, params, detokenizer, None if stop is None else StopMatcher(stop))
            for index, detokenizer in enumerate(created)
        }
        self._best_of = BestOf(params.n) if ranks_choices(params) else None
        self._keeps_nothing = self._best_of is None and params.prompt_logprobs is None
        self._waits_for_prompt = params.prompt_logprobs is not None
        self._prompt_log_probs: list[TokenLogProbs] | None = None
        self._kept: list[TextDelta] = []

    def plain_choice(self, params: SamplingParams) -> ChoiceState | None:
        """The only choice, if nothing is kept back or told but its text and its end."""
        told = params.stop or params.logprobs is not None or params.use_beam_search
        if not self._keeps_nothing or len(self.choices) > 1 or told:
            return None
        return self.choices[0]

    def release(self, delta: TextDelta) -> list[TextDelta]:
        """What can be handed out, now that `delta` is there: nothing before the log-probabilities of the prompt, which
        come with the first delta whichever choice brought them, and nothing before the choices are ranked."""
        if self._keeps_nothing:
            return [delta]
        if delta.prompt_log_probs is not None:
            self._prompt_log_probs, delta.prompt_log_probs = delta.prompt_log_probs, None
            self._waits_for_prompt = False
        if self._best_of is None:
            self._kept.append(delta)
        else:
            self._best_of.add(delta)
            if self.choices:
                return []
            self._kept = self._best_of.pick()
        if self._waits_for_prompt and self.choices:
            return []
        deltas, self._kept = self._kept, []
        deltas[0].prompt_log_probs, self._prompt_log_probs = self._prompt_log_probs, None
        return deltas


class ChoiceState:
    """Text state of one choice."""

    __slots__ = (
        "_index",
        "_num_characters",
        "_params",
        "_stop",
        "_sum_of_log_probs",
        "detokenizer",
        "num_output_tokens",
        "queue",
        "sink",
    )

    def __init__(
        self, index: int, params: SamplingParams, detokenizer: IncrementalDetokenizer, stop: StopMatcher | None
    ) -> None:
        self._index = index
        self._params = params
        self.detokenizer = detokenizer
        self._stop = stop
        self.num_output_tokens = 0
        self._num_characters = 0
        self._sum_of_log_probs = 0.0
        self.queue: DeltaQueue | None = None
        self.sink: Sink | None = None
        """Of the queue; both for plain choices only."""

    def fail(self, error: Exception) -> None:
        """The sink raised `error`: the reader gets it."""
        if self.queue is not None:
            self.queue.fail(error)

    def advance(self, output: StepOutput) -> TextDelta:
        """The text of one step. A stop string that the step's tokens complete overrules the engine's finish reason.

        The token that ended the choice in the engine (end of sequence or a stop token) counts but has no text, unless
        stop strings are to be included.
        """
        if self._stop is None and output.finish_reason is None and output.log_probs is None:
            return self._advance_text(output)
        delta = TextDelta(self._index, "", output.token_ids, num_cached_tokens=output.num_cached_tokens)
        delta.prompt_log_probs = output.prompt_log_probs
        delta.error = output.error
        silent = -1
        if output.finish_reason is FinishReason.STOP and not (
            self._params.include_stop_str_in_output or output.stopped_by_text
        ):
            silent = len(output.token_ids) - 1
        offsets: list[int] = []
        for position, token_id in enumerate(output.token_ids):
            self.num_output_tokens += 1
            offsets.append(self._num_characters)
            if position == silent:
                continue
            self._show(self.detokenizer.push(token_id), delta)
            if delta.finish_reason is not None:
                delta.token_ids = output.token_ids[: position + 1]
                break
        else:
            if output.finish_reason is not None:
                self._finish(output, delta)
        delta.num_output_tokens = self.num_output_tokens
        if output.log_probs is not None:
            self._add_log_probs(output, delta, offsets)
        if delta.finish_reason is not None and output.cumulative_log_prob is not None:
            delta.cumulative_log_prob = output.cumulative_log_prob
        return delta

    def _advance_text(self, output: StepOutput) -> TextDelta:
        """What nearly every step brings: text that is shown as it is, and no end."""
        token_ids = output.token_ids
        push = self.detokenizer.push
        text = push(token_ids[0]) if len(token_ids) == 1 else "".join(map(push, token_ids))
        self._num_characters += len(text)
        self.num_output_tokens += len(token_ids)
        delta = TextDelta(
            self._index,
            text,
            token_ids,
            num_cached_tokens=output.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
        )
        delta.prompt_log_probs = output.prompt_log_probs
        return delta

    def _add_log_probs(self, output: StepOutput, delta: TextDelta, offsets: list[int]) -> None:
        """Those of the tokens that are left, to be shown only if the request asks for them."""
        log_probs = (output.log_probs or [])[: len(delta.token_ids)]
        self._sum_of_log_probs += sum(each.log_prob for each in log_probs)
        if delta.finish_reason is not None:
            delta.cumulative_log_prob = self._sum_of_log_probs
        if self._params.logprobs is not None:
            delta.log_probs, delta.text_offsets = log_probs, offsets

    def _show(self, text: str, delta: TextDelta) -> None:
        self._num_characters += len(text)
        if self._stop is None or not text:
            delta.text += text
            return
        delta.text += self._stop.push(text, may_stop=self.num_output_tokens > self._params.min_tokens)
        if self._stop.matched is not None:
            delta.finish_reason = FinishReason.STOP.value
            delta.stop_reason = self._stop.matched

    def _finish(self, output: StepOutput, delta: TextDelta) -> None:
        self._show(self.detokenizer.finish(), delta)
        if delta.finish_reason is None and output.finish_reason is not None:
            if self._stop is not None:
                delta.text += self._stop.finish()
            delta.finish_reason = output.finish_reason.value
            delta.stop_reason = output.stop_reason
