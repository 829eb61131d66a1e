"""uvicorn, as it is used here. Slow to import, so only behind the start of the engine process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn

from quire.server.protocol import ServerConfig


class HttpServer(uvicorn.Server):
    """uvicorn's server, without its signal handlers: ours drain first. `listening` is set once it takes connections."""

    def __init__(self, config: ServerConfig) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
