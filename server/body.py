"""Request bodies: read within bounds of bytes and time, parsed off the event loop when large, then forgotten."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from starlette.types import Message, Receive

from quire.server.errors import ApiError
from quire.server.lifecycle import ClientLeftError
from quire.server.settings import Limits

T = TypeVar("T")
Headers = list[tuple[bytes, bytes]]

_DIGITS: Final = re.compile(rb"[0-9]{1,18}")


class OffLoop:
    """Runs what takes long on a few worker threads, and what is short where it stands."""

    def __init__(self, threshold_bytes: int, num_threads: int = 2) -> None:
        self._threshold = threshold_bytes
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="quire-parse")

    async def __call__(self, function: Callable[[], T], num_bytes: int) -> T:
        if num_bytes <= self._threshold:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


class BufferedBytes:
    """What the bodies of all connections hold together, from the first byte until they are parsed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        if self.num_bytes > self._limit:
            raise ApiError("queue_full")

    def remove(self, num_bytes: int) -> None:
        self.num_bytes -= num_bytes


class Body:
    """The body of one request; as an ASGI receive it hands the body on, then what the connection says."""

    def __init__(self, receive: Receive, headers: Headers, limits: Limits, buffered: BufferedBytes) -> None:
        self._receive = receive
        self._limits = limits
        self._buffered = buffered
        self._num_bytes = 0
        self._handed_on = False
        lengths = [value for name, value in headers if name == b"content-length"]
        codings = [value for name, value in headers if name == b"transfer-encoding"]
        if codings and lengths:
            raise ApiError("bad_request", reason="it has both Content-Length and Transfer-Encoding")
        if len(lengths) > 1 or (lengths and not _DIGITS.fullmatch(lengths[0])):
            raise ApiError("bad_request", reason="its Content-Length is not one number")
        self._declared_length = int(lengths[0]) if lengths else 0
        self.awaits_continue = any(name == b"expect" for name, _ in headers)
        self.complete = not codings and not self._declared_length
        self.data = b""

    async def read(self) -> None:
        """Read all of it. Raises ApiError at a limit, ClientLeftError if the client goes away."""
        limit = self._limits.max_body_bytes
        if self._declared_length > limit:
            raise ApiError("body_too_large", limit=limit)
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._limits.body_timeout):
                while not self.complete:
                    part = await self._read_part()
                    parts.append(part)
                    self._num_bytes += len(part)
                    self._buffered.add(len(part))
                    if self._num_bytes > limit:
                        raise ApiError("body_too_large", limit=limit)
        except TimeoutError:
            raise ApiError("body_timeout", seconds=self._limits.body_timeout) from None
        self.data = b"".join(parts)

    async def drop_rest(self) -> None:
        """Read and forget what still comes, for a moment."""
        num_dropped = 0
        try:
            async with asyncio.timeout(self._limits.linger_timeout):
                while not self.complete and num_dropped <= 4 * self._limits.max_body_bytes:
                    num_dropped += len(await self._read_part())
        except (TimeoutError, ClientLeftError):
            pass

    def release(self) -> None:
        """Forget the bytes: a stream may go on for minutes, its body need not."""
        self._buffered.remove(self._num_bytes)
        self._num_bytes = 0
        self.data = b""

    async def _read_part(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        self.complete = not message.get("more_body", False)
        return bytes(message.get("body", b""))

    async def __call__(self) -> Message:
        if not self._handed_on:
            self._handed_on = True
            return {"type": "http.request", "body": self.data, "more_body": False}
        return await self._receive()
