"""HTTP/1.1 on the socket: uvicorn's h11 protocol, with the bounds that it lacks and errors in JSON.

h11 rather than httptools, which has no limit on the size of a header.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final

import h11
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from quire.server.errors import ApiError
from quire.server.settings import Limits

_LINGER_SECONDS: Final = 1.0
_MAX_WAITING_BYTES: Final = 64 * 1024
"""What a connection keeps of an answer before its writer waits: where asyncio's transports ask for a pause."""


class ServerConfig(uvicorn.Config):
    """uvicorn's configuration, with the limits that its protocol reads."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], limits: Limits) -> None:
        super().__init__(
            app,
            http=QuireProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=max(1, round(limits.keep_alive_timeout)),
            h11_max_incomplete_event_size=limits.max_header_bytes,
        )
        self.limits = limits
        self.part_batch = PartBatch()


class _Connection(h11.Connection):
    """Remembers what was wrong with the client's bytes."""

    status_hint = 400

    def next_event(self) -> Any:
        try:
            return super().next_event()
        except h11.RemoteProtocolError as error:
            self.status_hint = error.error_status_hint
            raise


class PartBatch:
    """Parts of many answers, sent together behind the callback that wrote them.

    A send in between would have kernel and interpreter push each other out of the processor's caches; one after the
    other they cost less.
    """

    def __init__(self) -> None:
        self._writers: list[PartWriter] = []

    def add(self, writer: PartWriter) -> None:
        if not self._writers:
            asyncio.get_running_loop().call_soon(self._flush)
        self._writers.append(writer)

    def _flush(self) -> None:
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.flush()


class PartWriter:
    """Writes parts of one running answer, past tasks, ASGI and h11.

    Good for chunked answers only: those without a Content-Length to a request of HTTP/1.1. Their framing has no state,
    so h11 need not know of the parts; head and end go through it. The caller writes between those two only, and calls
    `pause` before anything else is written on the connection.
    """

    __slots__ = ("_batch", "_transport", "_unsent", "is_free", "last_write")

    def __init__(self, transport: asyncio.Transport, batch: PartBatch) -> None:
        self._transport = transport
        self._batch = batch
        self._unsent = b""
        self.is_free = False
        """A part was the last that was sent here, and the client had not left much unread: another may be written
        without asking `ready`, which looks at more."""
        self.last_write = 0.0
        """Of parts, in seconds of time.monotonic()."""

    def ready(self) -> bool:
        """Whether the client is there and has not left much unread."""
        transport = self._transport
        num_waiting = len(self._unsent) + transport.get_write_buffer_size()
        return num_waiting <= _MAX_WAITING_BYTES and not transport.is_closing()

    def write(self, data: bytes, now: float) -> None:
        """Only when ready. data: not empty, for an empty chunk is the end of an answer."""
        self.last_write = now
        part = b"%x\r\n%b\r\n" % (len(data), data)
        if not self._unsent:
            self._batch.add(self)
            self._unsent = part
        else:
            self._unsent += part
            self.is_free = False  # several steps wait for their turn: `ready` bounds them

    def flush(self) -> None:
        """Send what is written, now; to a client that is gone nothing is sent."""
        unsent, self._unsent = self._unsent, b""
        if not unsent:
            return
        transport = self._transport
        self.is_free = not transport.is_closing()
        if self.is_free:
            transport.write(unsent)
            self.is_free = transport.get_write_buffer_size() <= _MAX_WAITING_BYTES

    def pause(self) -> None:
        """Send what is written: something else than a part is to follow."""
        self.flush()
        self.is_free = False


class QuireProtocol(H11Protocol):
    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        if not isinstance(config, ServerConfig):
            raise TypeError("QuireProtocol needs a ServerConfig")
        self._limits = config.limits
        self.conn: h11.Connection = _Connection(h11.SERVER, config.limits.max_header_bytes)
        self._head_timer: asyncio.TimerHandle | None = None
        self._flush_timer: asyncio.TimerHandle | None = None
        self._refused = False
        self._served_one = False
        inner = self.app

        async def with_abort(scope: Any, receive: Any, send: Any) -> None:
            scope["extensions"] = {"quire.abort": self.transport.abort}
            if scope["http_version"] == "1.1" and self.cycle is not None:
                scope["extensions"]["quire.parts"] = PartWriter(self.transport, config.part_batch)
            await inner(scope, receive, send)

        self.app = with_abort

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(ApiError("too_many_connections"))
        else:
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_head_timer()
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        self._served_one = True
        super().on_response_complete()
        if self._flush_timer is None:
            self._flush_timer = self.loop.call_later(self._limits.stall_timeout, self._abort_if_unsent)
        self._watch_head()

    def send_400_response(self, msg: str) -> None:
        limits = self._limits
        if self.conn.status_hint == 431:  # type: ignore[attr-defined]
            error = ApiError("headers_too_large", max_bytes=limits.max_header_bytes, max_headers=limits.max_headers)
        else:
            error = ApiError("bad_request", reason="its framing is broken")
        self._refuse(error)

    def _watch_head(self) -> None:
        """Time the header of the next request from its first byte; that of the first from the connection on."""
        waiting = self.conn.their_state is h11.IDLE and not self._refused and not self.transport.is_closing()
        if waiting and (not self._served_one or self.conn.trailing_data[0]):
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(self._limits.head_timeout, self._on_head_timeout)
        else:
            self._cancel_head_timer()

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if self.conn.trailing_data[0]:
            self._refuse(ApiError("head_timeout", seconds=self._limits.head_timeout))
        else:
            self.transport.close()

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _abort_if_unsent(self) -> None:
        """An answer that the client does not read must not hold its connection for ever."""
        self._flush_timer = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answer what never became a request, outside h11, and close; a running answer is just cut."""
        self._refused = True
        self._cancel_head_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.close()
                return
        body = error.body()
        headers = [
            *error.headers(),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", secrets.token_hex(16).encode("ascii")),
            (b"connection", b"close"),
        ]
        head = b"HTTP/1.1 %d %s\r\n" % (error.status, HTTPStatus(error.status).phrase.encode("ascii"))
        head += b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        self.transport.write(head + b"\r\n" + body)
        # Half-closed for a moment: closing a socket with unread bytes would reset it and lose the answer.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)
