"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quire.engine.best_of import comes_late
from quire.server.completion_run import Plan, Run
from quire.server.context import ServerContext, context_of, state_of
from quire.server.errors import JSON_CONTENT_TYPE, ApiError
from quire.server.generation import ClientTooSlowError
from quire.server.lifecycle import ClientLeftError
from quire.server.parameters import check_model_name, check_unknown_fields, refuse_unsupported
from quire.server.prompts import PromptJob, plan_jobs
from quire.server.schemas import CompletionRequest, parse_body
from quire.server.sse import EventStream
from quire.server.tally import Tally
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
        run = Run(plan, open_request, tally)
        try:
            if plan.request.stream:
                await self._stream(run, scope, receive, send)
            else:
                watch = self._watch(run, scope, receive, None)
                body = await open_request.run(run.collect(), watch.run)
                await _send_json(send, body, plan.headers())
        except ClientLeftError:
            pass
        finally:
            tally.observe_end()
            lifecycle.leave(open_request)

    async def _stream(self, run: Run, scope: Scope, receive: Receive, send: Send) -> None:
        plan = self._plan
        stream = EventStream(send, plan.headers(), scope.get("extensions", {}).get("quire.parts"))
        watch = self._watch(run, scope, receive, stream)
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

    def _watch(self, run: Run, scope: Scope, receive: Receive, stream: EventStream | None) -> Watch:
        context = self._plan.context
        late = comes_late(self._plan.jobs[0].params)
        progress_age = context.client.progress_age if late else None
        return Watch(run.open_request, run.tally, context.settings, scope, receive, stream, progress_age)

    async def _end_with_error(self, stream: EventStream, watch: Watch, error: Exception) -> None:
        if stream.ended:
            return
        try:
            async with asyncio.timeout(_LAST_WORDS_TIMEOUT):
                await stream.fail(error if isinstance(error, ApiError) else ApiError("internal_error"))
        except TimeoutError:
            watch.cut_off()


async def _send_json(send: Send, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    headers = [(b"content-type", JSON_CONTENT_TYPE), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
