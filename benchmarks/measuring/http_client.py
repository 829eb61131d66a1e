"""A streaming client that costs little: while a load runs it only notes what came when; answers are read afterwards."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import uvloop

from measuring.loads import LoadRequest
from measuring.summary import Record

Received = list[tuple[float, bytes]]
"""What one connection brought: when, and the bytes."""

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to ask, and as what the model is known there."""

    port: int
    model: str
    timeout: float = 600.0
    """Seconds for a request."""


class _Exchange(asyncio.Protocol):
    """One request on a connection of its own: some servers end a stream by closing its connection."""

    def __init__(self, request: bytes) -> None:
        self.received: Received = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's does not inherit from it
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.received.append((time.perf_counter(), data))
        if self._transport is not None and (data.endswith(b"\r\n0\r\n\r\n") or data == b"0\r\n\r\n"):
            self._transport.close()  # the last chunk: not every server closes at once

    def connection_lost(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


def run_load(target: Target, requests: list[LoadRequest], concurrency: int | None) -> tuple[list[Record], float]:
    """Send the requests as they arrive, or so many at a time; what came of each, and the seconds of the whole run."""
    return uvloop.run(_run_load(target, requests, concurrency))


async def _run_load(target: Target, requests: list[LoadRequest], concurrency: int | None) -> tuple[list[Record], float]:
    bodies = [_http_request(target, request) for request in requests]
    records = [Record(len(request.token_ids), request.num_output_tokens) for request in requests]
    received: list[Received] = [[] for _ in requests]
    begin = time.perf_counter()

    async def one(index: int) -> None:
        received[index] = await _exchange(target, bodies[index], records[index])

    async def at_arrival(index: int, arrival: float) -> None:
        await asyncio.sleep(max(0.0, begin + arrival - time.perf_counter()))
        await one(index)

    if concurrency is None:
        await asyncio.gather(*(at_arrival(i, request.arrival or 0.0) for i, request in enumerate(requests)))
    else:
        todo = iter(range(len(requests)))

        async def worker() -> None:
            for index in todo:
                await one(index)

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    wall = time.perf_counter() - begin
    for record, answer in zip(records, received, strict=True):
        read_answer(record, answer)
    return records, wall


def _http_request(target: Target, request: LoadRequest) -> bytes:
    body = json.dumps(
        {
            "model": target.model,
            "prompt": request.token_ids,
            "max_tokens": request.num_output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}:{target.port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def _exchange(target: Target, request: bytes, record: Record) -> Received:
    record.sent = time.perf_counter()
    received: Received = []
    try:
        async with asyncio.timeout(target.timeout):
            loop = asyncio.get_running_loop()
            transport, exchange = await loop.create_connection(lambda: _Exchange(request), HOST, target.port)
            received = exchange.received
            try:
                await exchange.done
            finally:
                transport.close()
    except (OSError, TimeoutError) as error:
        record.error = f"{type(error).__name__}: {error}"
    record.ended = received[-1][0] if received else time.perf_counter()
    return received


def read_answer(record: Record, received: Received) -> None:
    """Fill in the pieces and the number of tokens, or the error, from the bytes of an HTTP answer."""
    head, _, _ = b"".join(data for _, data in received).partition(b"\r\n\r\n")
    if record.error is not None:
        return
    status = head.split(b" ", 2)[1:2]
    if status != [b"200"]:
        answer = b"".join(data for _, data in received)[len(head) :].strip()[:200].decode(errors="replace")
        record.error = f"HTTP {b''.join(status).decode() or 'connection closed'}: {answer}"
        return
    for when, event in _events(head, received):
        if event.get("error"):
            record.error = str(event["error"])[:200]
            return
        usage = event.get("usage")
        if usage:
            record.num_output_tokens = usage["completion_tokens"]
        if any(choice.get("text") for choice in event.get("choices", ())):
            record.pieces.append(when)
    record.num_output_tokens = record.num_output_tokens or len(record.pieces)
    if not record.pieces:
        record.error = "empty answer"


def _events(head: bytes, received: Received) -> Iterator[tuple[float, dict[str, Any]]]:
    """Each server-sent event, at the time when its last byte had come."""
    ends = list(accumulate(len(data) for _, data in received))
    stream = b"".join(data for _, data in received)
    is_chunked = b"transfer-encoding: chunked" in head.lower()
    parts = _chunks(stream, len(head) + 4) if is_chunked else [(len(head) + 4, len(stream))]
    line = b""
    for start, end in parts:
        place = start
        for piece in stream[start:end].splitlines(keepends=True):
            place += len(piece)
            line += piece
            if not line.endswith(b"\n"):
                continue
            if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                yield received[bisect.bisect_left(ends, place)][0], json.loads(data)
            line = b""


def _chunks(stream: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each chunk's data (RFC 9112, section 7.1)."""
    while (line_end := stream.find(b"\r\n", start)) >= 0:
        size = int(stream[start:line_end].split(b";")[0], 16)
        if size == 0:
            return
        yield line_end + 2, line_end + 2 + size
        start = line_end + 2 + size + 2


def model_name(port: int) -> str | None:
    """The first name by which a server knows its model; None as long as it does not say."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5.0)
    with (
        contextlib.suppress(OSError, http.client.HTTPException, ValueError, LookupError),
        contextlib.closing(connection),
    ):
        connection.request("GET", "/v1/models", headers={"Connection": "close"})
        answer = connection.getresponse()
        if answer.status == 200:
            return str(json.loads(answer.read())["data"][0]["id"])
    return None
