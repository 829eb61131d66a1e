"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quire.engine.output_processor import TextDelta
from quire.server.context import RequestState, ServerContext, context_of, state_of
from quire.server.errors import JSON_CONTENT_TYPE, ApiError
from quire.server.generation import ClientTooSlowError, DeltaBatch, generate
from quire.server.lifecycle import ClientLeftError, OpenRequest
from quire.server.parameters import check_model_name, check_unknown_fields, refuse_unsupported
from quire.server.prompts import PromptJob, is_echo_only, plan_jobs
from quire.server.responses import Completion, CompletionChoice, EffectiveParams, warnings_for
from quire.server.schemas import CompletionRequest, StreamOptions, parse_body
from quire.server.sse import DONE, EventStream, event
from quire.server.tally import ChoiceTally, Tally
from quire.server.watch import Watch

logger = logging.getLogger("quire.server")
router = APIRouter()

_LAST_WORDS_TIMEOUT: Final = 1.0
"""Seconds that a client has to take the error which ends its stream."""


@router.post("/v1/completions")
async def create_completion(http_request: Request) -> Response:
    context, state = context_of(http_request), state_of(http_request)
    request = await parse_body(state.body, CompletionRequest, context.off_loop)
    ignored = check_unknown_fields(request, context.settings)
    if request.priority and context.settings.scheduling_policy != "priority":
        ignored.append("priority")
    check_model_name(request.model, context.settings)
    if request.stream_options is not None and not request.stream:
        raise ApiError("invalid_value", param="stream_options", reason="stream_options needs stream: true.")
    refuse_unsupported(request)
    jobs = await plan_jobs(context, request)
    state.ticket.add_prompts(len(jobs))
    state.ticket.queue_tokens(sum(len(job.token_ids) for job in jobs))
    echoes = await _echoed_texts(context, request, jobs)
    return CompletionResponse(Plan(context, state, request, jobs, echoes, ignored))


async def _echoed_texts(context: ServerContext, request: CompletionRequest, jobs: list[PromptJob]) -> list[str]:
    """What each choice's text begins with: the prompt, as sent or as its ids read, if the request says echo."""
    if not request.echo:
        return [""] * len(jobs)
    skip = request.skip_special_tokens is not False

    async def text_of(job: PromptJob) -> str:
        return job.text if job.text is not None else await context.client.tokenizer.decode(job.token_ids, skip)

    return list(await asyncio.gather(*map(text_of, jobs)))


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


class CompletionResponse(Response):
    """Runs its plan when it is sent: what fails before the first byte is still a plain error."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._plan = plan

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        plan, lifecycle = self._plan, self._plan.context.lifecycle
        open_request = lifecycle.enter()
        tally = Tally(plan.jobs, plan.n, plan.context.metrics)
        tally.observe_begin()
        run = _Run(plan, open_request, tally)
        try:
            if plan.request.stream:
                await self._stream(run, scope, receive, send)
            else:
                watch = Watch(open_request, tally, plan.context.settings, scope, receive, None)
                body = await open_request.run(run.collect(), watch.run)
                await _send_json(send, body, plan.headers())
        except ClientLeftError:
            pass
        finally:
            tally.observe_end()
            lifecycle.leave(open_request)

    async def _stream(self, run: _Run, scope: Scope, receive: Receive, send: Send) -> None:
        plan = self._plan
        stream = EventStream(send, plan.headers())
        watch = Watch(run.open_request, run.tally, plan.context.settings, scope, receive, stream)
        try:
            await run.open_request.run(run.stream(stream), watch.run)
        except ClientLeftError:
            raise
        except ClientTooSlowError:
            watch.cut_off()
        except Exception as error:
            if not stream.started:
                raise
            if not isinstance(error, ApiError):
                logger.exception("request %s failed", plan.state.request_id)
            await self._end_with_error(stream, watch, error)

    async def _end_with_error(self, stream: EventStream, watch: Watch, error: Exception) -> None:
        if stream.ended:
            return
        try:
            async with asyncio.timeout(_LAST_WORDS_TIMEOUT):
                await stream.fail(error if isinstance(error, ApiError) else ApiError("internal_error"))
        except TimeoutError:
            watch.cut_off()


class _Run:
    """The work of one plan."""

    def __init__(self, plan: Plan, open_request: OpenRequest, tally: Tally) -> None:
        self._plan = plan
        self._request = plan.request
        self.open_request = open_request
        self.tally = tally
        self._options = plan.request.stream_options or StreamOptions()
        self._begun: set[int] = set()

    async def _batches(self) -> AsyncGenerator[DeltaBatch, None]:
        """What the engine says; for a request that only echoes, one end per choice."""
        plan, request = self._plan, self._request
        if is_echo_only(request):
            yield [(job, _nothing_generated(choice)) for job in plan.jobs for choice in range(plan.n)]
            return
        context, state = plan.context, plan.state
        salt = context.authenticator.cache_salt(state.key_digest, request.cache_salt or "")
        batches = generate(context.client, plan.jobs, priority=request.priority or 0, cache_salt=salt)
        async with aclosing(batches):
            async for batch in batches:
                if not self.open_request.started:
                    self.open_request.started = True
                    state.ticket.started()
                yield batch

    async def collect(self) -> bytes:
        """The whole answer."""
        plan = self._plan
        async with aclosing(self._batches()) as batches:
            async for batch in batches:
                for job, delta in batch:
                    choice = self.tally.add(job, delta)
                    choice.texts.append(delta.text)
                    choice.token_ids += delta.token_ids
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

    async def stream(self, stream: EventStream) -> None:
        """One event per choice and step, one write per step; the last write holds the end."""
        async with aclosing(self._batches()) as batches:
            async for batch in batches:
                data = b"".join([self._event(job, delta) for job, delta in batch])
                if not self.tally.all_finished:
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
        index = self.tally.index(job, delta.choice_index)
        first = index not in self._begun
        self._begun.add(index)
        text, token_ids = delta.text, delta.token_ids
        choice = CompletionChoice(index, text, None, delta.finish_reason, delta.stop_reason)
        if first and self._request.echo:
            choice.text = self._plan.echoes[job.prompt_index] + text
            token_ids = job.token_ids + token_ids
        if self._request.return_token_ids:
            choice.token_ids = token_ids
            choice.prompt_token_ids = job.token_ids if first else None
        chunk = self._plan.completion([choice])
        if self._options.continuous_usage_stats:
            chunk.usage = self.tally.choice_usage(job, tally)
        if first and index == 0 and self._request.return_effective_params:
            chunk.effective_params = self._plan.effective_params()
        return event(msgspec.json.encode(chunk))

    def _whole_choice(self, job: PromptJob, choice_index: int) -> CompletionChoice:
        index = self.tally.index(job, choice_index)
        tally: ChoiceTally = self.tally.choices[index]
        text = self._plan.echoes[job.prompt_index] + "".join(tally.texts)
        choice = CompletionChoice(index, text, None, tally.finish_reason, tally.stop_reason)
        if self._request.return_token_ids:
            choice.token_ids = job.token_ids + tally.token_ids if self._request.echo else tally.token_ids
            choice.prompt_token_ids = job.token_ids
        return choice


def _nothing_generated(choice_index: int) -> TextDelta:
    return TextDelta(
        choice_index=choice_index,
        text="",
        token_ids=[],
        finish_reason="length",
        stop_reason=None,
        num_cached_tokens=0,
        num_output_tokens=0,
    )


async def _send_json(send: Send, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    headers = [(b"content-type", JSON_CONTENT_TYPE), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
