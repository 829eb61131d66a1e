"""Kernels compiled by another process: the same kernels, none compiled here, and no process left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quire.kernels.cpu_compiler import ELSEWHERE, compiled_elsewhere

RUN = """
import logging, sys
import numba, numpy as np, torch
from numba.core.ccallback import CFunc
from quire.kernels import cpu_compiler
from quire.kernels.argmax.cpu import WORKER
from quire.kernels.take_rows.cpu import WORKER as OTHER

compiled_here = []
compile_here = CFunc._compile_uncached
CFunc._compile_uncached = lambda self: compiled_here.append(self.__name__) or compile_here(self)
if sys.argv[1] == "lost":
    cpu_compiler.COMMAND = (sys.executable, "-c", "")
elif sys.argv[1] == "missing":
    cpu_compiler.COMMAND = ("/no/such/command",)
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
with cpu_compiler.compiled_elsewhere():
    WORKER.compile(torch.float32)
    OTHER.compile(torch.bfloat16)
    process = cpu_compiler.ELSEWHERE.compiler._process
logits, out = np.float32([[1, 5, 2], [7, 0, 0]]), np.zeros(2, np.int64)
WORKER.run(torch.float32, np.array([0, logits.ctypes.data, 3, 2, 3, out.ctypes.data]), 1)
assert out.tolist() == [1, 0], out
print("here:", sorted(compiled_here), "ended:", process is None or process.returncode is not None)
"""


def run(situation: str, cache_home: Path) -> list[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache_home)}
    done = subprocess.run([sys.executable, "-c", RUN, situation], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_only_the_first_start_compiles_and_none_does_it_itself(tmp_path: Path) -> None:
    *messages, last = run("cold", tmp_path)
    assert [message.split(" in ")[0] for message in messages] == [
        "Compiled argmax for float32",
        "Compiled take_rows for bfloat16",
    ]
    assert last == "here: [] ended: True"
    assert run("warm", tmp_path) == ["here: [] ended: True"]


@pytest.mark.parametrize("situation", ["lost", "missing"])
def test_without_that_process_kernels_are_compiled_here(situation: str, tmp_path: Path) -> None:
    warning, *messages, last = run(situation, tmp_path)
    assert warning.startswith("Kernels are compiled in this process")
    assert len(messages) == 2
    assert last == "here: ['_copy', '_find'] ended: True"


def test_nothing_is_started_where_nothing_is_compiled() -> None:
    with compiled_elsewhere():
        compiler = ELSEWHERE.compiler
        assert compiler is not None
        assert compiler._process is None
    assert ELSEWHERE.compiler is None


def test_it_ends_with_the_block_whatever_happens_there() -> None:
    def unknown(shared: object) -> None: ...

    compilers = []

    def fail_within() -> None:
        with compiled_elsewhere():
            compilers.append(ELSEWHERE.compiler)
            ELSEWHERE.compiler.compile(unknown, "float32")  # it has no such function, and says so on its standard error
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    assert ELSEWHERE.compiler is None
    (compiler,) = compilers
    assert compiler._process.returncode is not None
