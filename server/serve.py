"""`quire serve`: the front process from bind to exit code."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import signal
import socket
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console

from quire.config import ConfigError, EngineConfig, ExitCode
from quire.engine.client import EngineClient
from quire.engine.grammar.compiler import GrammarCompiler
from quire.engine.resident_memory import return_unused_memory
from quire.engine.thread_binding import keep_off_cores_of
from quire.server.footprint import describe_start
from quire.server.lifecycle import Phase
from quire.server.loading import LoadingDisplay
from quire.server.settings import Limits, ServerSettings

if TYPE_CHECKING:
    from quire.server.context import ServerContext
    from quire.server.http_server import HttpServer

logger = logging.getLogger("quire.server")

_ENGINE_STOP_SECONDS: Final = 5.0
_ENGINE_STOP_SECONDS_IN_HASTE: Final = 0.3
_LAST_WORDS_SECONDS: Final = 2.0
"""For error frames to reach clients after a request was cut."""
_WATCH_SECONDS: Final = 0.2
_GRAMMAR_WARM_UP_SECONDS: Final = 2.0
"""After the server is ready. A grammar that comes earlier starts the child by itself."""
_IMPORTED_MEANWHILE: Final = ("quire.server.app", "quire.server.http_server")
"""The slow half of the front process's imports: while the engine process, started before, has its own to do."""


@dataclass(slots=True)
class Signals:
    """Which signals came: the first asks to drain, the second to leave."""

    drain: asyncio.Event
    leave: asyncio.Event
    interrupted_by_user: bool = False

    @classmethod
    def install(cls) -> Signals:
        signals = cls(asyncio.Event(), asyncio.Event())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, signals.receive, number)
        return signals

    def receive(self, number: int) -> None:
        if self.drain.is_set():
            self.leave.set()
        else:
            self.interrupted_by_user = number == signal.SIGINT
            self.drain.set()


def bind(host: str, port: int, limits: Limits) -> socket.socket:
    """The listening socket, bound before anything is loaded. Raises ConfigError in one line."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError:
        raise ConfigError(f"--host {host} is not an address of this machine.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by every connection: what a client does not read must not pile up in the kernel either.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, limits.send_buffer_bytes)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(f"Cannot bind {host}:{port}: {error.strerror}. Choose another --port or --host.") from None
    listener.setblocking(False)
    return listener


async def serve(config: EngineConfig, settings: ServerSettings, console: Console) -> ExitCode:
    """Load the engine, serve until a signal or the end of the engine, drain.

    Raises:
        ConfigError: the port cannot be bound.
        EngineStartError: the engine cannot start.
    """
    signals = Signals.install()
    listener = bind(settings.host, settings.port, settings.limits)
    gc.disable()  # what is imported stays: to look for garbage in it takes a tenth of the start
    try:
        client = await _start_engine(config, signals, console)
        if client is None:
            return ExitCode.CLEAN
        gc.freeze()
        gc.enable()
        keep_off_cores_of(client.pid)
        # Its children are started once the server is ready, so a start that fails leaves none.
        compiler = GrammarCompiler(config.model, client.info.vocab_size, client.info.eos_token_ids)
        try:
            try:
                return await _serve_until_drained(client, compiler, settings, listener, signals)
            finally:
                await compiler.close()
        finally:
            await client.stop(_ENGINE_STOP_SECONDS_IN_HASTE if signals.leave.is_set() else _ENGINE_STOP_SECONDS)
    finally:
        listener.close()


async def _start_engine(config: EngineConfig, signals: Signals, console: Console) -> EngineClient | None:
    """The running engine; None if a signal came first."""
    with LoadingDisplay(console) as display:
        start = asyncio.ensure_future(EngineClient.start(config, Path(config.model), display.update))
        stop = asyncio.ensure_future(signals.drain.wait())
        imports = asyncio.ensure_future(_import_meanwhile())
        try:
            await asyncio.wait((start, stop), return_when=asyncio.FIRST_COMPLETED)
            if not start.done():
                return None
            client = start.result()
            await imports
            return client
        finally:
            for task in (start, stop, imports):
                if not task.done():
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task


async def _import_meanwhile() -> None:
    for name in _IMPORTED_MEANWHILE:
        await asyncio.to_thread(importlib.import_module, name)


async def _serve_until_drained(
    client: EngineClient,
    compiler: GrammarCompiler,
    settings: ServerSettings,
    listener: socket.socket,
    signals: Signals,
) -> ExitCode:
    from quire.server.app import create_app
    from quire.server.http_server import HttpServer
    from quire.server.protocol import ServerConfig

    app = create_app(client, settings, compiler)
    context: ServerContext = app.app.state.context
    server = HttpServer(ServerConfig(app, settings.limits))
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    ready = asyncio.ensure_future(server.listening.wait())
    await asyncio.wait((serving, ready), return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        ready.cancel()
        serving.result()
        return ExitCode.INTERNAL_ERROR
    return_unused_memory()
    announce(client, settings, listener)

    warm_up = asyncio.ensure_future(_warm_up_later(compiler))
    code = await _until_end(context, serving, signals)
    warm_up.cancel()
    if code is ExitCode.CLEAN:
        code = await _drain(context, server, signals)
    elif code is ExitCode.ENGINE_LOST:
        await _wait_first(signals.drain.wait(), seconds=settings.drain_grace)
        context.lifecycle.begin_drain()
    context.lifecycle.phase = Phase.STOPPED
    server.should_exit = True
    await asyncio.wait([serving], timeout=_LAST_WORDS_SECONDS / 2)
    server.force_exit = True
    await asyncio.wait([serving], timeout=_LAST_WORDS_SECONDS / 2)
    if not serving.done():
        serving.cancel()
        await asyncio.wait([serving], timeout=_LAST_WORDS_SECONDS / 2)
    return code


async def _warm_up_later(compiler: GrammarCompiler) -> None:
    """Not at once: it would take a core from the first request."""
    await asyncio.sleep(_GRAMMAR_WARM_UP_SECONDS)
    await compiler.warm_up()


async def _until_end(context: ServerContext, serving: asyncio.Future[None], signals: Signals) -> ExitCode:
    """Serve. CLEAN: a signal asks for the end; ENGINE_LOST: the engine is gone, and /health says so for a while."""
    while not signals.drain.is_set():
        if not context.client.alive:
            logger.error("The engine is gone; exiting.")
            return ExitCode.ENGINE_LOST
        if serving.done():
            logger.error("The HTTP server ended by itself; exiting.")
            return ExitCode.INTERNAL_ERROR
        await _wait_first(signals.drain.wait(), seconds=_WATCH_SECONDS)
    return ExitCode.CLEAN


async def _drain(context: ServerContext, server: HttpServer, signals: Signals) -> ExitCode:
    """Let running requests finish, send the others elsewhere, and cut what is left at the deadline."""
    settings, lifecycle = context.settings, context.lifecycle
    loop = asyncio.get_running_loop()
    begin = loop.time()
    logger.info("Draining: %d running requests may take up to %g s.", lifecycle.num_open, settings.shutdown_timeout)
    lifecycle.begin_drain()
    # A load balancer needs a moment to look away; a person who pressed Ctrl-C does not.
    grace = 0.0 if signals.interrupted_by_user else settings.drain_grace
    await _wait_first(signals.leave.wait(), seconds=grace)
    for listening in server.servers:
        listening.close()
    while lifecycle.num_open and context.client.alive and not signals.leave.is_set():
        left = begin + settings.shutdown_timeout - loop.time()
        if left <= 0:
            break
        await _wait_first(lifecycle.wait_idle(), signals.leave.wait(), seconds=min(left, _WATCH_SECONDS))
    if lifecycle.num_open == 0:
        return ExitCode.CLEAN
    logger.warning("Cutting %d requests.", lifecycle.num_open)
    lifecycle.end_all()
    await _wait_first(lifecycle.wait_idle(), seconds=_LAST_WORDS_SECONDS)
    return ExitCode.DRAIN_DEADLINE


async def _wait_first(*waits: Coroutine[Any, Any, object], seconds: float) -> None:
    """Wait for the first of `waits`, or so many seconds; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def announce(client: EngineClient, settings: ServerSettings, listener: socket.socket) -> None:
    """The memory budget, and a line that can be pasted."""
    for line in client.info.memory_budget:
        print(line)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if host in ("0.0.0.0", "::"):
        shown = "localhost"
    url = f"http://{shown}:{port}"
    key = ' -H "Authorization: Bearer $QUIRE_API_KEY"' if settings.key_digests else ""
    body = '{"prompt": "Once upon a time", "max_tokens": 32}'
    print(f"Ready: {settings.model_name} at {url}")
    print(f"Try:   curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    if (start := describe_start(client.pid)) is not None:
        print(start)
    sys.stdout.flush()
