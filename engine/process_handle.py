"""The front process's handle on an engine process: the operating system's process and the framed stream to it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

import quire
from quire.config import ExitCode
from quire.engine.messages import EngineInfo, LoadProgress, Ready, StartFailed, ToFront
from quire.engine.wire import FrameDecoder, WireError, pack

PACKAGE_ROOT = str(Path(quire.__file__).parent.parent)
_MAIN = (
    "import sys; root = sys.argv.pop(1); root in sys.path or sys.path.insert(0, root); "
    "from quire.engine.process import main; sys.exit(main())"
)
ENGINE_COMMAND = (sys.executable, "-P", "-c", _MAIN, PACKAGE_ROOT)
"""What starts an engine process; `--fd N` is appended.

As `python -m quire.engine.process`, but sure to be the package that runs here, and deaf to modules that happen to lie
in the working directory.
"""

EXIT_SECONDS = 1.0
"""How long a process that has lost its connection has for ending by itself."""
_READ_BYTES = 64 * 1024

OnProgress = Callable[[LoadProgress], None]


class EngineStartError(Exception):
    """The engine process did not start. The message is one line that says what to do."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class EngineProcess:
    """One running engine process; made by `spawn`, ended by `end`."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.pid = process.pid
        self._process = process
        self._reader = reader
        self._writer = writer
        self._decoder: FrameDecoder[ToFront] = FrameDecoder(ToFront)

    @classmethod
    async def spawn(cls, command: Sequence[str]) -> EngineProcess:
        """Start it in a session of its own: Ctrl-C in a terminal reaches the front process only, which decides."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    "--fd",
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            raise EngineStartError(f"The engine process cannot be started: {error}", ExitCode.START_FAILED) from error
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(process, reader, writer)

    @property
    def how_it_ended(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"

    def send(self, message: msgspec.Struct) -> None:
        """Queue one message; to an engine that is gone nothing is sent.

        Raises:
            WireError: the message does not fit into a frame.
        """
        frame = pack(message)
        if not self._writer.is_closing():
            self._writer.write(frame)

    async def drain(self) -> None:
        """Wait while much is queued. That the engine is gone is found by `receive`, not here."""
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def receive(self) -> list[ToFront] | None:
        """The messages that have come, perhaps none; None when the engine has closed the connection.

        Raises:
            WireError: a bad frame, or an end within a frame.
        """
        try:
            data = await self._reader.read(_READ_BYTES)
        except ConnectionError:
            data = b""
        if data:
            return self._decoder.feed(data)
        self._decoder.end()
        return None

    async def wait_until_ready(self, on_progress: OnProgress | None) -> EngineInfo:
        try:
            while (messages := await self.receive()) is not None:
                for message in messages:
                    match message:
                        case LoadProgress():
                            if on_progress is not None:
                                on_progress(message)
                        case Ready(info):
                            return info
                        case StartFailed(text, exit_code):
                            await self.end()
                            raise EngineStartError(text, exit_code)
        except WireError as error:
            raise EngineStartError(f"The engine process is not usable: {error}", ExitCode.INTERNAL_ERROR) from error
        await self.end()
        raise EngineStartError(
            f"The engine process ended while it started ({self.how_it_ended}); its messages are above.",
            ExitCode.INTERNAL_ERROR,
        )

    async def wait(self, seconds: float) -> None:
        """Wait so long for the process to end by itself."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._process.wait()

    async def end(self, grace: float = EXIT_SECONDS) -> None:
        """Drop the connection, which ends the process; kill it if it has not ended after `grace` seconds; reap it.

        May be called twice. The grace is for a process that is already about to end: to signal it while asyncio reaps
        it would lose its exit code.
        """
        self._writer.transport.abort()
        await self.wait(grace)
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
