"""The work of one completion request: what the engine brings becomes the whole answer, or the events of a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec

from quire.engine.delta_queue import Sink
from quire.engine.text_delta import TextDelta
from quire.server.answer_log_probs import AnswerLogProbs
from quire.server.context import RequestState, ServerContext
from quire.server.generation import DeltaBatch, generate
from quire.server.lifecycle import OpenRequest
from quire.server.log_probs import LogProbs, join
from quire.server.prompts import PromptJob, is_echo_only
from quire.server.responses import ChunkTemplate, Completion, CompletionChoice, EffectiveParams, warnings_for
from quire.server.schemas import CompletionRequest, StreamOptions
from quire.server.sinks import AnswerSink, EventSink
from quire.server.sse import DONE, EventStream, event
from quire.server.tally import Tally


@dataclass(slots=True)
class Plan:
    """One request, checked and ready to run."""

    context: ServerContext
    state: RequestState
    request: CompletionRequest
    jobs: list[PromptJob]
    echoes: list[str]
    ignored: list[str]
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def n(self) -> int:
        return self.jobs[0].params.n

    def completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=f"cmpl-{self.request.request_id or self.state.request_id}",
            created=self.created,
            model=self.request.model or self.context.settings.model_name,
            choices=choices,
        )

    def effective_params(self) -> EffectiveParams:
        return EffectiveParams.of(self.jobs[0].params)

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-quire-ignored", ",".join(self.ignored).encode("ascii"))] if self.ignored else []


class Run:
    """The work of one plan."""

    __slots__ = (
        "_begun",
        "_has_deltas",
        "_job",
        "_log_probs",
        "_options",
        "_plan",
        "_request",
        "_stream",
        "open_request",
        "tally",
    )

    def __init__(self, plan: Plan, open_request: OpenRequest, tally: Tally) -> None:
        self._plan = plan
        self._request = plan.request
        self._job = plan.jobs[0]
        self.open_request = open_request
        self.tally = tally
        self._options = plan.request.stream_options or StreamOptions()
        self._log_probs = AnswerLogProbs(plan.context, plan.request, plan.echoes)
        self._begun: set[int] = set()
        self._has_deltas = False
        self._stream: EventStream | None = None

    async def _batches(self, sink: Sink) -> AsyncGenerator[DeltaBatch, None]:
        """What the engine says; for a request that only echoes, one end per choice."""
        plan, request = self._plan, self._request
        if is_echo_only(request):
            yield [(job, TextDelta(choice, "", [], "length")) for job in plan.jobs for choice in range(plan.n)]
            return
        context, state = plan.context, plan.state
        salt = context.authenticator.cache_salt(state.key_digest, request.cache_salt or "")
        batches = generate(
            context.client,
            plan.jobs,
            priority=request.priority or 0,
            cache_salt=salt,
            sink=sink,
        )
        async with aclosing(batches):
            async for batch in batches:
                if not self.open_request.started:
                    self.open_request.started = True
                    state.ticket.started()
                for job, delta in batch:
                    await self._log_probs.take_prompt(job, delta)
                    self._has_deltas = True
                yield batch

    async def collect(self) -> bytes:
        """The whole answer."""
        plan = self._plan
        sink = AnswerSink(self._keep_at_once, self.tally, plan.context.metrics)
        async with aclosing(self._batches(sink)) as batches:
            async for batch in batches:
                for job, delta in batch:
                    self._keep(job, delta)
        if not self.tally.all_finished:
            raise RuntimeError("the engine ended a request without finishing it")
        completion = plan.completion(
            [self._whole_choice(job, choice_index) for job in plan.jobs for choice_index in range(plan.n)]
        )
        completion.usage = self.tally.usage()
        completion.warnings = warnings_for(plan.ignored)
        if self._request.return_effective_params:
            completion.effective_params = plan.effective_params()
        return msgspec.json.encode(completion)

    def _keep(self, job: PromptJob, delta: TextDelta) -> None:
        choice = self.tally.add(job, delta)
        choice.texts.append(delta.text)
        choice.token_ids += delta.token_ids
        if (log_probs := self._log_probs.of_delta(job, delta)) is not None:
            choice.log_probs = choice.log_probs or LogProbs([], [], [], [])
            choice.log_probs.extend(log_probs)

    def _keep_at_once(self, deltas: list[TextDelta]) -> bool:
        """Take what a step brought into a whole answer, unless the reader is to do it."""
        if not self._is_middle(deltas):
            return False
        for delta in deltas:
            self._keep(self._job, delta)
        return True

    def _write_at_once(self, deltas: list[TextDelta]) -> bool:
        """Write what a step brought, unless the reader is to do it."""
        stream = self._stream
        if stream is None or not stream.ready() or not self._is_middle(deltas):
            return False
        events = b""
        for delta in deltas:
            events += self._event(self._job, delta)
        stream.write_part(events)
        return True

    def _is_middle(self, deltas: list[TextDelta]) -> bool:
        """Whether these are neither a choice's last nor the first, with which the prompt's log-probabilities come."""
        for delta in deltas:
            if delta.finish_reason is not None:
                return False
        return self._has_deltas and bool(deltas)

    async def stream(self, stream: EventStream) -> None:
        """One event per choice and step, one write per step; the last write holds the end."""
        self._stream = stream
        sink = EventSink(self._write_at_once, stream.parts, self.tally, self._plan.context.metrics)
        async with aclosing(self._batches(sink)) as batches:
            async for batch in batches:
                data = b"".join([self._event(job, delta) for job, delta in batch])
                if not self.tally.all_finished:
                    if data:
                        await stream.write(data)
                    continue
                if self._options.include_usage:
                    last = self._plan.completion([])
                    last.usage = self.tally.usage()
                    data += event(msgspec.json.encode(last))
                await stream.write(data + DONE, end=True)
                return
        raise RuntimeError("the engine ended a request without finishing it")

    def _event(self, job: PromptJob, delta: TextDelta) -> bytes:
        tally = self.tally.add(job, delta)
        if tally.template is not None and delta.finish_reason is None:
            return tally.template.fill(delta.text)
        index = tally.index
        first = index not in self._begun
        self._begun.add(index)
        echoes = first and bool(self._request.echo)
        log_probs = join(self._log_probs.of_echo(job) if echoes else None, self._log_probs.of_delta(job, delta))
        choice = CompletionChoice(index, delta.text, log_probs, delta.finish_reason, delta.stop_reason)
        token_ids = delta.token_ids
        if echoes:
            choice.text = self._plan.echoes[job.prompt_index] + delta.text
            token_ids = job.token_ids + token_ids
        if self._request.return_token_ids:
            choice.token_ids = token_ids
            choice.prompt_token_ids = job.token_ids if first else None
        if job.params.use_beam_search and delta.finish_reason is not None:
            choice.cumulative_logprob = delta.cumulative_log_prob
        chunk = self._plan.completion([choice])
        if self._options.continuous_usage_stats:
            chunk.usage = self.tally.choice_usage(job, tally)
        if first and index == 0 and self._request.return_effective_params:
            chunk.effective_params = self._plan.effective_params()
        if first and self._tells_text_only():
            tally.template = ChunkTemplate(self._plan.completion([CompletionChoice(index, "")]))
        return event(msgspec.json.encode(chunk))

    def _tells_text_only(self) -> bool:
        """Whether events other than the first and the last of a choice differ in their text alone."""
        request = self._request
        return request.logprobs is None and not request.return_token_ids and not self._options.continuous_usage_stats

    def _whole_choice(self, job: PromptJob, choice_index: int) -> CompletionChoice:
        index = self.tally.index(job, choice_index)
        tally = self.tally.choices[index]
        text = self._plan.echoes[job.prompt_index] + "".join(tally.texts)
        echoed = self._log_probs.of_echo(job) if self._request.echo else None
        log_probs = join(echoed, tally.log_probs)
        choice = CompletionChoice(index, text, log_probs, tally.finish_reason, tally.stop_reason)
        if self._request.return_token_ids:
            choice.token_ids = job.token_ids + tally.token_ids if self._request.echo else tally.token_ids
            choice.prompt_token_ids = job.token_ids
        if self._request.prompt_logprobs is not None:
            choice.prompt_logprobs = self._log_probs.of_prompt(job)
        if job.params.use_beam_search:
            choice.cumulative_logprob = tally.cumulative_log_prob
        return choice
