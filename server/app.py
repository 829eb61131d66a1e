"""The app factory: routes inside, the guard around them, and one context that they share."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from quire import __version__
from quire.engine.detokenizer import DetokenizerFactory
from quire.server import completions, health, metrics, models, tokenization
from quire.server.admission import Admission
from quire.server.auth import Authenticator
from quire.server.body import OffLoop
from quire.server.context import ServerContext
from quire.server.errors import ApiError
from quire.server.guard import Guard
from quire.server.lifecycle import Lifecycle
from quire.server.log_probs import TokenStrings
from quire.server.settings import ServerSettings

if TYPE_CHECKING:
    from quire.engine.client import EngineClient
    from quire.engine.grammar.compiler import GrammarCompiler


MIN_QUEUED_TOKENS: Final = 32768
"""A burst of prompts waits rather than being refused, however small the steps are."""
ROUTERS: Final = (completions.router, models.router, tokenization.router, health.router, metrics.router)


def create_app(client: EngineClient, settings: ServerSettings, grammar_compiler: GrammarCompiler) -> Guard:
    """The ASGI app that serves `client`. Its routes are `.app`, a FastAPI; what they share is `.app.state.context`."""
    limits, info = settings.limits, client.info
    admission = Admission(
        max_running=info.max_num_seqs,
        max_queued_requests=limits.max_queued_requests or 4 * info.max_num_seqs,
        max_queued_tokens=limits.max_queued_tokens or max(MIN_QUEUED_TOKENS, 16 * info.max_num_batched_tokens),
    )
    # The event loop's tokenizer, as for all that is detokenized; the tables of the engine client are its own affair.
    detokenizers = DetokenizerFactory(client.tokenizer.tokenizer)
    context = ServerContext(
        client=client,
        settings=settings,
        authenticator=Authenticator(settings.key_digests, limits.max_auth_failures_per_second),
        admission=admission,
        lifecycle=Lifecycle(),
        metrics=metrics.Metrics(client, admission, settings.model_name),
        off_loop=OffLoop(limits.off_loop_bytes),
        detokenizers=detokenizers,
        token_strings=TokenStrings(detokenizers),
        grammar_compiler=grammar_compiler,
        created=int(time.time()),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        context.off_loop.close()

    # No generated documentation: its pages load scripts from elsewhere, and its schemas would list what the routes
    # parse by themselves.
    app = FastAPI(
        title="Quire",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        # FastAPI would export traces and messages of exceptions to wherever environment variables point.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.context = context
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_exception)
    return Guard(
        app,
        settings=settings,
        authenticator=context.authenticator,
        admission=admission,
        lifecycle=context.lifecycle,
        off_loop=context.off_loop,
    )


async def _answer_api_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    response = Response(error.body(), error.status)
    for name, value in error.headers():
        response.headers[name.decode("ascii")] = value.decode("ascii")
    return response


async def _answer_exception(request: Request, _: Exception) -> Response:
    """What went wrong is ours to know: the guard logs it."""
    return await _answer_api_error(request, ApiError("internal_error"))


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own 404 and 405, in our words."""
    if not isinstance(error, HTTPException):
        raise error
    codes = {404: "not_found", 405: "method_not_allowed"}
    response = await _answer_api_error(request, ApiError(codes.get(error.status_code, "internal_error")))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response
