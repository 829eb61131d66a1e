"""The front process's handle on an engine process: the operating system's process and the connection to it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import quire
from quire.config import ExitCode
from quire.engine.connection import EngineConnection
from quire.engine.messages import EngineInfo, LoadProgress, Ready, StartFailed
from quire.engine.wire import WireError

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

OnProgress = Callable[[LoadProgress], None]


class EngineStartError(Exception):
    """The engine process did not start. The message is one line that says what to do."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class EngineProcess:
    """One running engine process; made by `spawn`, ended by `end`."""

    def __init__(self, process: asyncio.subprocess.Process, connection: EngineConnection) -> None:
        self.pid = process.pid
        self.connection = connection
        self._process = process

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
        _, connection = await asyncio.get_running_loop().create_unix_connection(EngineConnection, sock=ours)
        return cls(process, connection)

    @property
    def how_it_ended(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"

    async def wait_until_ready(self, on_progress: OnProgress | None) -> EngineInfo:
        try:
            while (message := await self.connection.receive()) is not None:
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
        await self.connection.close()
        await self.wait(grace)
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
