"""Server-sent events over ASGI: one write per step, comment lines in silence, an end that is always said."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from starlette.types import Send

from quire.server.errors import ApiError

if TYPE_CHECKING:
    from quire.server.protocol import PartWriter

DONE: Final = b"data: [DONE]\n\n"
PING: Final = b": ping\n\n"
HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class EventStream:
    """The response of one stream. The header goes out with the first write, so that a request which fails before it
    has anything to show is still answered with a plain status.

    Args:
        parts: writes what stands between head and end without waiting, where the connection can.
    """

    __slots__ = (
        "_between_writes",
        "_headers",
        "_last_write",
        "_lock",
        "_send",
        "blocked_since",
        "ended",
        "parts",
        "started",
    )

    def __init__(self, send: Send, headers: Sequence[tuple[bytes, bytes]], parts: PartWriter | None = None) -> None:
        self._send = send
        self.parts = parts
        self._headers = [*HEADERS, *headers]
        self.started = False
        self.ended = False
        self._last_write = time.monotonic()
        self.blocked_since: float | None = None
        """Since when a write has been waiting for the client to read."""
        # Comment lines are written beside the stream itself.
        self._lock = asyncio.Lock()
        self._between_writes = False

    @property
    def last_write(self) -> float:
        """Seconds of time.monotonic()."""
        return self._last_write if self.parts is None else max(self._last_write, self.parts.last_write)

    def ready(self) -> bool:
        """Whether `write_part` may be called: the stream has begun, and nothing waits to be written before."""
        return self._between_writes and self.parts is not None and self.parts.ready()

    def write_part(self, data: bytes) -> None:
        """Write in this turn of the event loop; only when ready."""
        if self.parts is None or not data:
            raise RuntimeError("There is nothing to write, or nothing to write to.")
        self.parts.write(data, time.monotonic())

    async def write(self, data: bytes, *, end: bool = False) -> None:
        """Write, or wait until the client has read enough; if cancelled while it waits, nothing was written."""
        async with self._lock:
            if self.parts is not None:
                self.parts.pause()
            self._last_write = self.blocked_since = time.monotonic()
            self._between_writes = False
            try:
                if not self.started:
                    await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
                    self.started = True
                await self._send({"type": "http.response.body", "body": data, "more_body": not end})
                self.ended = end
            finally:
                self.blocked_since = None
                self._between_writes = self.started and not self.ended

    async def fail(self, error: ApiError) -> None:
        """End a stream that has begun: the error as an event, then the end that clients wait for."""
        await self.write(event(error.body()) + DONE, end=True)
