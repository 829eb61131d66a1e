"""From ready to drained: who is open, who may finish, and how each open request can be ended from outside."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from enum import StrEnum
from typing import TypeVar

from quire.server.errors import ApiError

T = TypeVar("T")

logger = logging.getLogger("quire.server")


class ClientLeftError(Exception):
    """The client closed its connection: nothing can be sent any more, and nothing must be computed for it."""


class Phase(StrEnum):
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class OpenRequest:
    """One request at work. `interrupt` ends it with a reason, wherever it is; the first reason counts."""

    def __init__(self) -> None:
        self.started = False
        """Something of the answer exists: a first token, or bytes on the wire."""
        self.reason: ApiError | ClientLeftError | None = None
        self._worker: asyncio.Task[object] | None = None

    def interrupt(self, reason: ApiError | ClientLeftError) -> None:
        if self.reason is None:
            self.reason = reason
            if self._worker is not None:
                self._worker.cancel()

    async def run(self, work: Coroutine[object, object, T], watch: Callable[[], Awaitable[None]]) -> T:
        """Run `work` while `watch` looks out for what interrupts it.

        Raises:
            ApiError, ClientLeftError: the reason of the interruption.
        """
        worker = asyncio.ensure_future(work)
        self._worker = worker
        watcher = asyncio.ensure_future(watch())
        try:
            if self.reason is not None:
                worker.cancel()
            return await worker
        except asyncio.CancelledError:
            worker.cancel()
            if self.reason is not None and not _cancelled_from_outside():
                raise self.reason from None
            raise
        finally:
            watcher.cancel()
            await asyncio.wait([watcher])
            if not watcher.cancelled() and (error := watcher.exception()) is not None:
                logger.error("watching a request failed", exc_info=error)


def _cancelled_from_outside() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Lifecycle:
    """The phase of the server, and its open requests. One event loop owns it."""

    def __init__(self) -> None:
        self.phase = Phase.READY
        self._open: set[OpenRequest] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_open(self) -> int:
        return len(self._open)

    def enter(self) -> OpenRequest:
        """Register a request. Raises ApiError once the server drains."""
        if self.phase is not Phase.READY:
            raise ApiError("draining")
        request = OpenRequest()
        self._open.add(request)
        self._idle.clear()
        return request

    def leave(self, request: OpenRequest) -> None:
        self._open.discard(request)
        if not self._open:
            self._idle.set()

    def begin_drain(self) -> None:
        """Take no more requests; those that have nothing to show yet are sent elsewhere at once."""
        self.phase = Phase.DRAINING
        for request in self._open:
            if not request.started:
                request.interrupt(ApiError("draining"))

    def end_all(self, code: str = "server_shutdown") -> None:
        """End what is still open; streams say so in an error frame."""
        for request in self._open:
            request.interrupt(ApiError(code))

    async def wait_idle(self) -> None:
        await self._idle.wait()
