"""Kernels that nobody compiled yet are compiled by a process of its own, which takes the compiler's memory with it.

Numba and LLVM never give back 160 MiB of what compiling the kernels of a model takes; loading them from files takes
none of it. Only a process that is to live long and small asks for this (`compiled_elsewhere`): it costs two seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_MAIN = (
    "import sys; root = sys.argv.pop(1); root in sys.path or sys.path.insert(0, root); "
    "from quire.kernels.cpu_compiler import main; main()"
)
COMMAND = (sys.executable, "-P", "-c", _MAIN, str(Path(__file__).parents[2]))
"""What starts the process. It reads lines `module function dtype` and answers each with a line once it is compiled."""

log = logging.getLogger(__name__)


class _Compiler:
    """The process, started at the first kernel that it is asked for. Threads may share it; one is served at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._failed = False
        self._lock = threading.Lock()

    def compile(self, function: Callable[[Any], None], dtype: str) -> None:
        """Return when the kernel is in the cache; or when it cannot be: whoever loads it then compiles it."""
        line = f"{function.__module__} {function.__qualname__} {dtype}\n"
        with self._lock:
            if self._failed:
                return
            try:
                if self._process is None:
                    pipe = subprocess.PIPE
                    self._process = subprocess.Popen(COMMAND, stdin=pipe, stdout=pipe, text=True)
                assert self._process.stdin is not None
                assert self._process.stdout is not None
                self._process.stdin.write(line)
                self._process.stdin.flush()
                self._failed = not self._process.stdout.readline()
            except OSError:  # no process to be had, or it is gone
                self._failed = True
            if self._failed:
                log.warning("Kernels are compiled in this process, which stays larger by it: the compiler's ended.")

    def end(self) -> None:
        """Nothing is lost by killing it: what it answered for is in files."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.communicate()


class _Elsewhere:
    compiler: _Compiler | None = None


ELSEWHERE = _Elsewhere()


@contextlib.contextmanager
def compiled_elsewhere() -> Iterator[None]:
    """Within, in all threads of this process, kernels are compiled by another one, which ends with the block."""
    compiler = ELSEWHERE.compiler = _Compiler()
    try:
        yield
    finally:
        ELSEWHERE.compiler = None
        compiler.end()


def main() -> None:
    import torch

    from quire.kernels.cpu_workers import compiled_function

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with its input
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # and in silence, if nobody waits for it any more
    for line in sys.stdin:
        module, name, dtype = line.split()
        compiled_function(getattr(importlib.import_module(module), name), getattr(torch, dtype))
        print("compiled", flush=True)
