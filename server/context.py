"""What the routes share: one object per app, handed over in `app.state`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.requests import Request

from quire.server.admission import Admission, Ticket
from quire.server.auth import Authenticator
from quire.server.body import Body, OffLoop
from quire.server.lifecycle import Lifecycle
from quire.server.settings import ServerSettings

if TYPE_CHECKING:
    from quire.engine.client import EngineClient
    from quire.engine.detokenizer import DetokenizerFactory
    from quire.engine.grammar.compiler import GrammarCompiler
    from quire.server.log_probs import TokenStrings
    from quire.server.metrics import Metrics


@dataclass(slots=True, kw_only=True)
class ServerContext:
    client: EngineClient
    settings: ServerSettings
    authenticator: Authenticator
    admission: Admission
    lifecycle: Lifecycle
    metrics: Metrics
    off_loop: OffLoop
    detokenizers: DetokenizerFactory
    token_strings: TokenStrings
    grammar_compiler: GrammarCompiler
    """Whoever made it closes it, since it has child processes."""
    created: int
    """Unix time at which the model became available."""


@dataclass(slots=True)
class RequestState:
    """What the guard found out about one request."""

    request_id: str
    key_digest: bytes | None
    ticket: Ticket
    body: Body
    ignored: list[str] = field(default_factory=list)
    """Names of fields that are not honoured, for the report to the client."""


def context_of(request: Request) -> ServerContext:
    context = request.app.state.context
    if not isinstance(context, ServerContext):
        raise TypeError("the app has no ServerContext")
    return context


def state_of(request: Request) -> RequestState:
    state = request.scope["state"]
    return RequestState(state["request_id"], state["key_digest"], state["ticket"], state["body"])
