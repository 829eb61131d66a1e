"""Running Numba functions on torch's own OpenMP threads, and where their compiled code is kept.

Numba's threading layers are not used where torch's OpenMP runtime can be found: its OpenMP layer brings a second
runtime whose idle threads spin against torch's on the same cores (and needs a system libgomp), and its workqueue layer
takes about ten times longer to start.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types

from quire.kernels.cpu_elements import BFLOAT16, FLOAT16, FLOAT32, Builder, Kinds, Value, emitted, nothing

Parameters = np.ndarray[Any, np.dtype[np.int64]]

_ELEMENTS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}

_MIN_ELEMENTS = 65536  # elements whose row by row operation is worth a second thread: 20 to 30 microseconds


def row_threads(num_elements: int) -> int:
    """How many threads an operation that passes once over `num_elements` should run on: one or all of torch's.

    A number in between would have the OpenMP runtime end the others, and start them again for torch.
    """
    return torch.get_num_threads() if num_elements > _MIN_ELEMENTS else 1


class KeptMemory(threading.local):
    """Memory that the calls of a thread use one after another: fresh pages cost more than a row of logits does."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def address(self, num_bytes: int) -> int:
        """Of at least `num_bytes`, with anything in them; good until this thread asks again."""
        if self._memory.numel() < num_bytes:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        return self._memory.data_ptr()


KEPT_MEMORY = KeptMemory()


class Worker:
    """A function `body(parameters)` that several threads enter at once and whose work they share out among themselves.

    `parameters` is an int64 array, shown to the body as a pointer to elements of the dtype: the body is compiled once
    for each dtype, at its first use. The body must not raise.
    """

    def __init__(self, body: Callable[[Any], None]) -> None:
        self._body = body
        self._compiled: dict[torch.dtype, Any] = {}

    def run(self, dtype: torch.dtype, parameters: Parameters, num_threads: int) -> None:
        """Enter the body on `num_threads` threads, this one among them, and return when all have left it."""
        compiled = self._compiled.get(dtype) or self.compile(dtype)
        fork_join = _fork_join() if num_threads > 1 else 0
        if num_threads > 1 and not fork_join:
            _numba_fork_join()(compiled.address, parameters, num_threads)
        else:
            _enter(fork_join, compiled.address, parameters, num_threads)

    def compile(self, dtype: torch.dtype) -> Any:
        """Compile the body for `dtype`, or load what an earlier process compiled."""
        signature = types.void(types.CPointer(_ELEMENTS[dtype]))
        options = {"nopython": True, "error_model": "numpy"}
        try:
            with _cache_directory() as usable:
                compiled = numba.cfunc(signature, cache=usable, **options)(self._body)
        except OSError:  # the disk is full, or the directory went away: only the next start pays for it
            compiled = numba.cfunc(signature, **options)(self._body)
        self._compiled[dtype] = compiled
        return compiled


@contextlib.contextmanager
def _cache_directory() -> Iterator[bool]:
    """Have Numba keep compiled code in a directory of this user and of these sources; False if there can be none.

    Numba itself only sees when the file of a function changes, not the files of the functions it calls, so the
    directory is named after the content of all of them.
    """
    previous = numba.config.CACHE_DIR
    directory = _writable_cache_directory()
    numba.config.CACHE_DIR = directory
    try:
        yield bool(directory)
    finally:
        numba.config.CACHE_DIR = previous


@functools.cache
def _writable_cache_directory() -> str:
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for source in sorted([*here.glob("cpu_*.py"), *here.glob("*/cpu.py")]):
        digest.update(source.read_bytes())
    try:
        base = Path(numba.config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = base / "quire" / f"kernels-{digest.hexdigest()[:16]}"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return str(directory)
    except (OSError, RuntimeError):  # no home, or not writable
        return ""


@emitted(nothing)
def _call_worker(
    builder: Builder, kinds: Kinds, fork_join: Value, worker: Value, parameters: Value, num_threads: Value
) -> None:
    """GOMP_parallel(worker, parameters, num_threads, 0), or worker(parameters) if there is no `fork_join`."""
    pointer, unsigned = ir.IntType(8).as_pointer(), ir.IntType(32)
    worker_type = ir.FunctionType(ir.VoidType(), [pointer])
    fork_join_type = ir.FunctionType(ir.VoidType(), [pointer, pointer, unsigned, unsigned])
    data = builder.inttoptr(parameters, pointer)
    with builder.if_else(builder.icmp_signed("!=", fork_join, fork_join.type(0))) as (forked, alone):
        with forked:
            function = builder.inttoptr(fork_join, fork_join_type.as_pointer())
            threads = builder.trunc(num_threads, unsigned)
            builder.call(function, [builder.inttoptr(worker, pointer), data, threads, unsigned(0)])
        with alone:
            builder.call(builder.inttoptr(worker, worker_type.as_pointer()), [data])


def cached(function: Callable[..., Any]) -> Any:
    """A Numba function that is compiled at its first call, or loaded if an earlier process compiled it."""
    with _cache_directory() as usable:
        return numba.njit(nogil=True, cache=usable)(function)


@cached
def _enter(fork_join: int, worker: int, parameters: Parameters, num_threads: int) -> None:
    _call_worker(fork_join, worker, parameters.ctypes.data, num_threads)


@functools.cache
def _numba_fork_join() -> Callable[[int, Parameters, int], None]:
    """Numba's own threads, for a torch without an OpenMP runtime that has GNU's entry point."""

    @numba.njit(parallel=True)
    def enter_all(worker: int, parameters: Parameters, num_threads: int) -> None:
        address = parameters.ctypes.data
        for _ in numba.prange(num_threads):
            _call_worker(0, worker, address, 1)

    return enter_all  # type: ignore[no-any-return]


@functools.cache
def _fork_join() -> int:
    """The address of GOMP_parallel in the OpenMP runtime that torch runs on; 0 if it has none.

    It is what GCC compiles `#pragma omp parallel` to, and LLVM's runtime has it too. Used on torch's runtime, the
    kernels run on torch's threads: one pool, and torch.set_num_threads holds for both.
    """
    package = Path(torch.__file__).parent
    shipped = [*package.glob("lib/lib*omp*"), *package.parent.glob("torch.libs/lib*omp*")]
    already_loaded = getattr(os, "RTLD_NOLOAD", 0) | getattr(os, "RTLD_NOW", 0)
    for name in (*map(str, shipped), None):
        with contextlib.suppress(OSError, AttributeError, TypeError):
            function = ctypes.CDLL(name, mode=already_loaded).GOMP_parallel
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0
