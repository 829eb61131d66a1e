"""Looks out, beside a request at work, for what must end it: a client that left or does not read, and its time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.types import Receive, Scope

from quire.server.errors import ApiError
from quire.server.lifecycle import ClientLeftError, OpenRequest
from quire.server.settings import ServerSettings
from quire.server.sse import PING, EventStream
from quire.server.tally import Tally


class Watch:
    def __init__(
        self,
        request: OpenRequest,
        tally: Tally,
        settings: ServerSettings,
        scope: Scope,
        receive: Receive,
        stream: EventStream | None,
        progress_age: Callable[[], float] | None = None,
    ) -> None:
        """`progress_age`: of the engine, for a request that is silent while it is worked on."""
        self._request = request
        self._tally = tally
        self._limits = settings.limits
        self._receive = receive
        self._progress_age = progress_age
        self._stream = stream
        self._abort_connection: Callable[[], None] | None = scope.get("extensions", {}).get("quire.abort")
        self._ping_interval = settings.sse_keep_alive_interval if stream is not None else 0.0
        shortest = min(
            self._limits.stall_timeout,
            self._limits.queue_timeout,
            self._limits.token_gap_timeout,
            self._ping_interval or self._limits.stall_timeout,
        )
        self._tick = min(5.0, shortest / 4)

    async def run(self) -> None:
        while self._request.reason is None:
            try:
                async with asyncio.timeout(self._tick):
                    message = await self._receive()
            except TimeoutError:
                await self._look()
            else:
                if message["type"] == "http.disconnect":
                    self._request.interrupt(ClientLeftError())

    async def _look(self) -> None:
        now = time.monotonic()
        if not self._request.started:
            if now - self._tally.begin > self._limits.queue_timeout:
                self._request.interrupt(ApiError("queue_timeout"))
        elif self._gap(now) > self._limits.token_gap_timeout and not self._blocked():
            self._request.interrupt(ApiError("generation_timeout"))
        if now - self._tally.begin > self._limits.request_timeout:
            self._request.interrupt(ApiError("generation_timeout"))
        if self._stream is None or self._request.reason is not None:
            return
        if self._stream.blocked_since is not None:
            if now - self._stream.blocked_since > self._limits.stall_timeout:
                self.cut_off()
        elif self._ping_interval and now - self._stream.last_write >= self._ping_interval and not self._stream.ended:
            try:
                async with asyncio.timeout(self._limits.stall_timeout):
                    await self._stream.write(PING)
            except TimeoutError:
                self.cut_off()

    def _gap(self, now: float) -> float:
        gap = now - self._tally.last_progress
        return gap if self._progress_age is None else min(gap, self._progress_age())

    def cut_off(self) -> None:
        """Drop the connection with all that is unsent: the client does not read."""
        if self._abort_connection is not None:
            self._abort_connection()
        self._request.interrupt(ClientLeftError())

    def _blocked(self) -> bool:
        return self._stream is not None and self._stream.blocked_since is not None
