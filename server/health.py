"""Health and identity: /health, /health/live, /health/ready, /ping, /version, /load."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from quire import __version__
from quire.server.context import ServerContext, context_of
from quire.server.lifecycle import Phase
from quire.server.responses import json_response

router = APIRouter()


class Readiness(msgspec.Struct):
    status: str
    reason: str | None
    progress_age_s: float
    running: int
    waiting: int
    free_blocks: int


class Version(msgspec.Struct):
    version: str


class Load(msgspec.Struct):
    server_load: int


def unready_reason(context: ServerContext) -> str | None:
    """Why no request should be sent here now; None: ready. It asks for progress, not for a living process."""
    if context.lifecycle.phase is not Phase.READY:
        return "draining"
    if not context.client.alive:
        return "engine_unavailable"
    if context.client.progress_age() >= context.settings.limits.ready_progress_age:
        return "no_progress"
    if context.admission.full:
        return "queue_full"
    return None


@router.api_route("/health", methods=["GET", "HEAD"])
async def health(request: Request) -> Response:
    """Empty, as vLLM answers: 200 if the engine lives and moves, else 503. A full queue is no illness."""
    return Response(status_code=200 if unready_reason(context_of(request)) in (None, "queue_full") else 503)


@router.api_route("/ping", methods=["GET", "HEAD", "POST"])
async def ping(request: Request) -> Response:
    return await health(request)


@router.api_route("/health/live", methods=["GET", "HEAD"])
async def live() -> Response:
    """200 as long as the event loop turns: only a process that cannot answer this should be killed."""
    return json_response(Live("live"))


@router.api_route("/health/ready", methods=["GET", "HEAD"])
async def ready(request: Request) -> Response:
    context = context_of(request)
    reason = unready_reason(context)
    stats = context.client.stats()
    response = json_response(
        Readiness(
            "ready" if reason is None else "unready",
            reason,
            round(context.client.progress_age(), 3),
            stats.num_running,
            stats.num_waiting,
            stats.num_free_blocks,
        )
    )
    response.status_code = 200 if reason is None else 503
    return response


@router.get("/version")
async def version() -> Response:
    return json_response(Version(__version__))


@router.get("/load")
async def load(request: Request) -> Response:
    return json_response(Load(context_of(request).lifecycle.num_open))


class Live(msgspec.Struct):
    status: str
