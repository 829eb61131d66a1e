"""The front process's end of the socketpair: nothing is lost, cut or handed out twice, whatever ends it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop

from quire.engine.connection import EngineConnection
from quire.engine.messages import Abort, LoadProgress, Rejected, ToFront
from quire.engine.wire import WireError, pack

MESSAGES = [Rejected(f"r{index}", "x" * 100 * index, "code", "param") for index in range(50)]
FRAMES = b"".join(pack(message) for message in MESSAGES)

Check = Callable[[EngineConnection, socket.socket], Awaitable[None]]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Check], None]:
    def run(check: Check) -> None:
        async def main() -> None:
            ours, engine = socket.socketpair()
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_unix_connection(EngineConnection, sock=ours)
            async with asyncio.timeout(10):
                with engine:
                    await check(connection, engine)
                await connection.close()
                await connection.close()

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(main())

    return run


async def receive_all(connection: EngineConnection) -> None:
    while await connection.receive() is not None:
        pass


@pytest.mark.parametrize("num_received", [0, 1, 7])
def test_messages_come_in_order_before_and_after_they_are_handed_over(run: Any, num_received: int) -> None:
    async def check(connection: EngineConnection, engine: socket.socket) -> None:
        half = len(FRAMES) // 2
        engine.sendall(FRAMES[:half])
        got: list[ToFront | None] = [await connection.receive() for _ in range(num_received)]
        await asyncio.sleep(0.01)
        reading = asyncio.ensure_future(connection.hand_over(got.append))
        await asyncio.sleep(0)
        assert len(got) > num_received, "what was kept is handed on"
        engine.sendall(FRAMES[half:])
        engine.close()
        await reading
        assert got == MESSAGES

    run(check)


def test_end_is_told_after_all_messages(run: Any) -> None:
    async def check(connection: EngineConnection, engine: socket.socket) -> None:
        waiting = asyncio.ensure_future(connection.receive())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        engine.sendall(pack(LoadProgress("weights", 1, 2)) + pack(LoadProgress("weights", 2, 2)))
        engine.close()
        assert await waiting == LoadProgress("weights", 1, 2)
        assert await connection.receive() == LoadProgress("weights", 2, 2)
        assert await connection.receive() is None
        assert await connection.receive() is None

    run(check)


@pytest.mark.parametrize("data", [b"\xff" * 64, FRAMES[:-1], pack(Abort("not to the front"))])
def test_bad_frames_end_it(run: Any, data: bytes) -> None:
    async def received(connection: EngineConnection, engine: socket.socket) -> None:
        engine.sendall(data)
        engine.close()
        with pytest.raises(WireError):
            await receive_all(connection)

    async def handed_over(connection: EngineConnection, engine: socket.socket) -> None:
        engine.sendall(data)
        engine.close()
        with pytest.raises(WireError):
            await connection.hand_over(lambda message: None)

    run(received)
    run(handed_over)


def test_what_the_handler_raises_ends_it_and_is_the_last_call(run: Any) -> None:
    async def check(connection: EngineConnection, engine: socket.socket) -> None:
        got: list[ToFront] = []

        def handle(message: ToFront) -> None:
            got.append(message)
            if len(got) == 3:
                raise RuntimeError("broken")

        reading = asyncio.ensure_future(connection.hand_over(handle))
        await asyncio.sleep(0)
        engine.sendall(FRAMES)
        with pytest.raises(RuntimeError, match="broken"):
            await reading
        assert got == MESSAGES[:3]
        connection.send(Abort("nobody is there"))

    run(check)


def test_drain_waits_while_the_engine_does_not_read_but_not_for_ever(run: Any) -> None:
    async def check(connection: EngineConnection, engine: socket.socket) -> None:
        await connection.drain()
        connection.send(Abort("x" * 4_000_000))
        draining = asyncio.ensure_future(connection.drain())
        await asyncio.sleep(0.01)
        assert not draining.done()
        engine.close()
        await draining

    run(check)
