"""The short way of a stream's events: templates of chunks, and parts of answers that are sent together."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop

from quire.server.protocol import PartBatch, PartWriter
from quire.server.responses import ChunkTemplate, Completion, CompletionChoice
from quire.server.sse import DONE, EventStream

CHUNK_END = b"0\r\n\r\n"
Check = Callable[[asyncio.Transport, socket.socket], Awaitable[None]]


def with_connection(check: Check, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        transport, _ = await asyncio.get_running_loop().create_unix_connection(asyncio.Protocol, sock=ours)
        with theirs:
            await check(transport, theirs)
        transport.abort()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def new_loop(request: pytest.FixtureRequest) -> Any:
    return request.param


def received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(1 << 20)
    except BlockingIOError:
        return b""


@pytest.mark.parametrize(
    "text", ["", "plain", 'quotes " and \\', "\n\t\x00\x1f", "Ö日本👨‍👩‍👧‍👦\u2028", '"text":""', "</script>"]
)
def test_filled_template_is_the_encoded_chunk(text: str) -> None:
    names = {"id": 'cmpl-"text":""', "created": 7, "model": 'a\\"b"text":""'}
    chunk = ChunkTemplate(Completion(choices=[CompletionChoice(3, "")], **names)).fill(text)
    assert chunk.endswith(b"\n\n")
    assert chunk.count(b"\n") == 2
    told = json.loads(chunk.removeprefix(b"data: "))
    assert (told["id"], told["model"]) == (names["id"], names["model"])
    assert told["choices"] == [{"index": 3, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}]


def test_parts_go_out_as_chunks_behind_the_callback_that_wrote_them(new_loop: Any) -> None:
    async def check(transport: asyncio.Transport, client: socket.socket) -> None:
        writer = PartWriter(transport, PartBatch())
        writer.write(b"a" * 26, 0.0)
        assert writer.ready()
        writer.write(b"b", 0.0)
        assert received(client) == b"", "others write first"
        await asyncio.sleep(0.01)
        assert received(client) == b"1a\r\n" + b"a" * 26 + b"\r\n1\r\nb\r\n"
        writer.write(b"c", 0.0)
        writer.flush()
        assert received(client) == b"1\r\nc\r\n"
        await asyncio.sleep(0.01)
        assert received(client) == b"", "nothing is sent twice"

    with_connection(check, new_loop)


def test_one_batch_serves_many_answers(new_loop: Any) -> None:
    async def check(transport: asyncio.Transport, client: socket.socket) -> None:
        batch = PartBatch()

        async def check_other(other: asyncio.Transport, other_client: socket.socket) -> None:
            for step in (b"1", b"2"):
                PartWriter(transport, batch).write(step, 0.0)
                PartWriter(other, batch).write(step, 0.0)
                await asyncio.sleep(0.01)
            assert received(client) == received(other_client) == b"1\r\n1\r\n1\r\n2\r\n"

        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        other, _ = await asyncio.get_running_loop().create_unix_connection(asyncio.Protocol, sock=ours)
        with theirs:
            await check_other(other, theirs)
        other.abort()

    with_connection(check, new_loop)


def test_client_that_does_not_read_makes_the_writer_unready(new_loop: Any) -> None:
    async def check(transport: asyncio.Transport, client: socket.socket) -> None:
        writer, num_written = PartWriter(transport, PartBatch()), 0
        while writer.ready():
            writer.write(b"x" * 4096, 0.0)
            num_written += 1
            if num_written % 4 == 0:
                await asyncio.sleep(0)
            assert num_written < 1000
        await asyncio.sleep(0)
        assert 64 * 1024 <= transport.get_write_buffer_size() < 64 * 1024 + 5 * 4200
        data = b""
        while len(data) < num_written * (4096 + 8):
            data += received(client)
            await asyncio.sleep(0)
        assert data == (b"1000\r\n" + b"x" * 4096 + b"\r\n") * num_written
        assert writer.ready()

    with_connection(check, new_loop)


def test_writer_is_free_while_parts_alone_are_sent_and_read(new_loop: Any) -> None:
    async def check(transport: asyncio.Transport, client: socket.socket) -> None:
        writer = PartWriter(transport, PartBatch())
        assert not writer.is_free, "the head is not out"
        writer.write(b"a", 1.0)
        assert not writer.is_free
        await asyncio.sleep(0.01)
        assert writer.is_free
        writer.write(b"b", 2.0)
        assert writer.is_free
        writer.write(b"c", 3.0)
        assert not writer.is_free, "two steps wait for their turn: they are to be bounded"
        await asyncio.sleep(0.01)
        assert writer.is_free
        writer.write(b"d", 4.0)
        writer.pause()
        assert received(client) == b"".join(b"1\r\n%b\r\n" % part for part in (b"a", b"b", b"c", b"d"))
        await asyncio.sleep(0.01)
        assert not writer.is_free, "something else is being written"
        assert writer.last_write == 4.0

    with_connection(check, new_loop)


def test_writer_is_not_free_while_the_client_does_not_read_nor_once_it_is_gone(new_loop: Any) -> None:
    async def check(transport: asyncio.Transport, client: socket.socket) -> None:
        writer, num_written = PartWriter(transport, PartBatch()), 0
        while num_written == 0 or writer.is_free:
            writer.write(b"x" * 4096, 0.0)
            writer.flush()
            num_written += 1
            assert num_written < 1000
        assert 64 * 1024 <= transport.get_write_buffer_size() < 64 * 1024 + 4200
        while transport.get_write_buffer_size():
            received(client)
            await asyncio.sleep(0)
        writer.write(b"y", 0.0)
        writer.flush()
        assert writer.is_free
        writer.write(b"z", 0.0)
        transport.abort()
        writer.flush()
        assert not writer.is_free

    with_connection(check, new_loop)


def test_parts_that_wait_for_their_turn_are_bounded(new_loop: Any) -> None:
    async def check(transport: asyncio.Transport, client: socket.socket) -> None:
        writer, num_written = PartWriter(transport, PartBatch()), 0
        while writer.ready():
            writer.write(b"x" * 1024, 0.0)
            num_written += 1
            assert num_written <= 64
        assert num_written == 64

    with_connection(check, new_loop)


def test_to_a_client_that_is_gone_nothing_is_sent(new_loop: Any) -> None:
    async def check(transport: asyncio.Transport, client: socket.socket) -> None:
        writer = PartWriter(transport, PartBatch())
        writer.write(b"late", 0.0)
        transport.abort()
        assert not writer.ready()
        await asyncio.sleep(0.01)
        writer.flush()

    with_connection(check, new_loop)


def test_stream_keeps_the_order_of_parts_and_writes(new_loop: Any) -> None:
    """What waits for its turn goes before the end, and nothing is written at once while a write waits."""

    async def check(transport: asyncio.Transport, client: socket.socket) -> None:
        may_send = asyncio.Event()
        may_send.set()

        async def send(message: Any) -> None:
            await may_send.wait()
            if body := message.get("body"):
                transport.write(b"%x\r\n%b\r\n" % (len(body), body))
            if message["type"] == "http.response.body" and not message["more_body"]:
                transport.write(CHUNK_END)

        stream = EventStream(send, [], PartWriter(transport, PartBatch()))
        assert not stream.ready(), "it has not begun"
        await stream.write(b"head")
        assert stream.ready()
        may_send.clear()
        slow = asyncio.ensure_future(stream.write(b"slow"))
        await asyncio.sleep(0)
        assert not stream.ready()
        may_send.set()
        await slow
        assert stream.ready()
        stream.write_part(b"part")
        await stream.write(DONE, end=True)
        assert not stream.ready(), "it has ended"
        await asyncio.sleep(0.01)
        assert received(client) == b"4\r\nhead\r\n4\r\nslow\r\n4\r\npart\r\ne\r\n" + DONE + b"\r\n" + CHUNK_END

    with_connection(check, new_loop)


def test_there_is_no_empty_part() -> None:
    """An empty chunk would be the end of the answer."""
    with pytest.raises(RuntimeError):
        EventStream(None, [], None).write_part(b"")  # type: ignore[arg-type]
