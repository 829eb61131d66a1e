"""The front process's end of the socketpair: hands on messages in the very callback that reads them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from quire.engine.messages import ToFront
from quire.engine.wire import FrameDecoder, WireError, pack

OnMessage = Callable[[ToFront], object]


class EngineConnection(asyncio.Protocol):
    """First `receive` message by message; then `hand_over`, once and until the end. Belongs to one event loop.

    From then on no task is woken for a message: for most steps that would cost more than what they bring.
    """

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._decoder: FrameDecoder[ToFront] = FrameDecoder(ToFront)
        self._kept: deque[ToFront] = deque()
        self._handle: OnMessage = self._kept.append
        self._error: Exception | None = None
        self._came = asyncio.Event()
        self._closed = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()

    async def receive(self) -> ToFront | None:
        """The next message; None when the engine has closed the connection.

        Raises:
            WireError: a bad frame, or an end within a frame.
        """
        while not self._kept and not self._closed.is_set():
            self._came.clear()
            await self._came.wait()
        if self._kept:
            return self._kept.popleft()
        if self._error is not None:
            raise self._error
        return None

    async def hand_over(self, handle: OnMessage) -> None:
        """Call `handle` with each message that has come and will, until the connection is closed.

        Raises:
            WireError: a bad frame, or an end within a frame.
            Exception: what `handle` raises; it is not called again, and the connection is closed.
        """
        self._handle = handle
        self._hand_on(self._kept)
        await self._closed.wait()
        if self._error is not None:
            raise self._error

    def send(self, message: msgspec.Struct) -> None:
        """Queue one message; to an engine that is gone nothing is sent.

        Raises:
            WireError: the message does not fit into a frame.
        """
        frame = pack(message)
        if not self._transport.is_closing():
            self._transport.write(frame)

    async def drain(self) -> None:
        """Wait while much is queued and the engine is there."""
        await self._writable.wait()

    async def close(self) -> None:
        """Drop the connection with what is queued. May be called twice."""
        self._transport.abort()
        await self._closed.wait()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._error is not None:
            return
        try:
            messages = self._decoder.feed(data)
        except WireError as error:
            self._fail(error)
            return
        self._hand_on(messages)
        self._came.set()

    def connection_lost(self, exc: Exception | None) -> None:
        try:
            self._decoder.end()
        except WireError as error:
            self._error = self._error or error
        self._closed.set()
        self._came.set()
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _hand_on(self, messages: Iterable[ToFront]) -> None:
        try:
            for message in messages:
                self._handle(message)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._transport.abort()
