"""The front process's judge of grammars: each is compiled in a child process that is killed at a deadline."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from quire.engine.grammar.messages import Check, Start, Verdict
from quire.engine.process_handle import PACKAGE_ROOT
from quire.engine.wire import FrameDecoder, WireError, pack
from quire.grammar import Grammar

_MAIN = (
    "import sys; root = sys.argv.pop(1); root in sys.path or sys.path.insert(0, root); "
    "from quire.engine.grammar.child import main; sys.exit(main())"
)
CHILD_COMMAND = (sys.executable, "-P", "-c", _MAIN, PACKAGE_ROOT)
"""What starts a child; `--fd N` is appended."""

NUM_CHILDREN: Final = 2
DEADLINE_SECONDS: Final = 2.0
"""For one grammar."""
START_SECONDS: Final = 30.0
"""For a child to build its vocabulary."""
QUEUE_SECONDS: Final = 10.0
MAX_JOBS: Final = 64
MAX_VERDICTS: Final = 4096
TIMEOUT_KEPT_SECONDS: Final = 60.0
"""A grammar that ran into the deadline is not tried again so soon; the machine may have been busy, so later it is."""
_READ_BYTES: Final = 4096

_TIMEOUT = Verdict("grammar_timeout", "The grammar took too long to compile.")
_TOO_COMPLEX = Verdict("grammar_too_complex", "The grammar is too complex.")
_UNAVAILABLE = Verdict("structured_output_unavailable", "Structured output is not available at the moment.")


class GrammarRefused(Exception):
    """The message may be shown to the client.

    Codes: invalid_grammar, grammar_timeout, grammar_too_complex, and structured_output_unavailable, which is not the
    client's fault.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class GrammarCompiler:
    """Checks grammars; used on one event loop. Nothing is started before the first check.

    A check that its caller gave up goes on until its own deadline and is remembered; the same grammar is never checked
    twice at a time.

    Args:
        directory, vocab_size, eos_token_ids: those of the engine, so that both find the same.
        command: what starts a child.
    """

    def __init__(
        self,
        directory: Path | str,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        *,
        command: Sequence[str] = CHILD_COMMAND,
        deadline: float = DEADLINE_SECONDS,
        start_deadline: float = START_SECONDS,
        queue_deadline: float = QUEUE_SECONDS,
    ) -> None:
        self._start = Start(str(directory), vocab_size, list(eos_token_ids))
        self._command = tuple(command)
        self._deadline = deadline
        self._start_deadline = start_deadline
        self._queue_deadline = queue_deadline
        self._slots = asyncio.Semaphore(NUM_CHILDREN)
        self._idle: list[_Child] = []
        self._jobs: dict[bytes, asyncio.Task[Verdict]] = {}
        self._verdicts: OrderedDict[bytes, tuple[Verdict, float]] = OrderedDict()
        self._unusable: Verdict | None = None
        self._closed = False

    async def check(self, grammar: Grammar) -> None:
        """Return if the engine can use the grammar.

        Raises:
            GrammarRefused: it cannot.
        """
        digest = grammar.digest
        verdict = self._unusable or self._known(digest)
        if verdict is None:
            job = self._jobs.get(digest)
            if job is None:
                if self._closed or len(self._jobs) >= MAX_JOBS:
                    raise GrammarRefused(_UNAVAILABLE.code, _UNAVAILABLE.message)
                job = asyncio.create_task(self._judge(digest, grammar))
                self._jobs[digest] = job
            # Shielded: the child must be read to the end of its answer, whoever still wants it.
            verdict = await asyncio.shield(job)
        if verdict.code:
            raise GrammarRefused(verdict.code, verdict.message)

    async def warm_up(self) -> None:
        """Start a child, so that the first grammar does not wait for it."""
        with contextlib.suppress(GrammarRefused):
            await self.check(Grammar("json_object"))

    async def close(self) -> None:
        """Kill the children; whoever waits is refused. May be called twice."""
        self._closed = True
        for job in self._jobs.values():
            job.cancel()
        await asyncio.gather(*self._jobs.values(), return_exceptions=True)
        idle, self._idle = self._idle, []
        for child in idle:
            await child.kill()

    def _known(self, digest: bytes) -> Verdict | None:
        entry = self._verdicts.get(digest)
        if entry is None:
            return None
        verdict, forget_at = entry
        if asyncio.get_running_loop().time() >= forget_at:
            del self._verdicts[digest]
            return None
        self._verdicts.move_to_end(digest)
        return verdict

    async def _judge(self, digest: bytes, grammar: Grammar) -> Verdict:
        """Never raises: a job may have nobody left to hear it."""
        try:
            verdict = await self._compile(grammar)
        except asyncio.CancelledError:
            verdict = _UNAVAILABLE
        finally:
            del self._jobs[digest]
        if verdict.code != _UNAVAILABLE.code:
            now = asyncio.get_running_loop().time()
            self._verdicts[digest] = (verdict, now + TIMEOUT_KEPT_SECONDS if verdict is _TIMEOUT else float("inf"))
            if len(self._verdicts) > MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        return verdict

    async def _compile(self, grammar: Grammar) -> Verdict:
        try:
            async with asyncio.timeout(self._queue_deadline):
                await self._slots.acquire()
        except TimeoutError:
            return _UNAVAILABLE
        child: _Child | None = None
        try:
            child = await self._take_child()
            if child is None:
                return self._unusable or _UNAVAILABLE
            verdict = await child.ask(Check(grammar), self._deadline)
            self._idle.append(child)
            child = None
            return verdict
        except TimeoutError:
            return _TIMEOUT
        except _ChildLostError:
            # A stack that overflowed, memory that ran out: the grammar did it, for nothing else runs there.
            return _TOO_COMPLEX
        finally:
            try:
                if child is not None:
                    await child.kill()
            finally:
                self._slots.release()

    async def _take_child(self) -> _Child | None:
        """A child that is ready; None if it cannot be started."""
        while self._idle:
            child = self._idle.pop()
            if child.is_alive:
                return child
            await child.kill()
        new = await _Child.spawn(self._command)
        if new is None:
            return None
        verdict = _UNAVAILABLE
        try:
            verdict = await new.ask(self._start, self._start_deadline)
            if verdict.code:
                # The child ran and says why: the next one would say the same.
                self._unusable = verdict
        except (TimeoutError, _ChildLostError):
            pass
        finally:
            if verdict.code:
                await new.kill()
        return None if verdict.code else new


class _ChildLostError(Exception):
    """The child ended instead of answering."""


class _Child:
    """One child process and the framed stream to it."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def spawn(cls, command: Sequence[str]) -> _Child | None:
        """In a session of its own, and silent: a panic of the library would write the grammar into the log."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    "--fd",
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                )
        except OSError:
            ours.close()
            return None
        except BaseException:
            ours.close()
            raise
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(process, reader, writer)

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None and not self._reader.at_eof()

    async def ask(self, message: msgspec.Struct, seconds: float) -> Verdict:
        """The answer to one message.

        Raises:
            TimeoutError: it did not come in time. The child must be killed.
            _ChildLostError: it never will. The child must be killed.
        """
        decoder: FrameDecoder[Verdict] = FrameDecoder(Verdict)
        try:
            async with asyncio.timeout(seconds):
                self._writer.write(pack(message))
                await self._writer.drain()
                while data := await self._reader.read(_READ_BYTES):
                    if verdicts := decoder.feed(data):
                        return verdicts[0]
        except (ConnectionError, WireError):
            pass
        raise _ChildLostError

    async def kill(self) -> None:
        """End the process and reap it."""
        self._writer.transport.abort()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
