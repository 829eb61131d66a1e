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
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types

from quire.kernels.cpu_compiler import ELSEWHERE
from quire.kernels.cpu_elements import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Builder,
    Kinds,
    Value,
    emitted,
    nothing,
)
from quire.kernels.cpu_ranges import Panels

log = logging.getLogger(__name__)

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


class Recorder(Protocol):
    """Takes down what workers are asked to run, instead of their running it: see `cpu_recording`."""

    def add(self, name: str, prepare: int, body: int, parameters: Parameters, panels: Panels | None) -> None: ...
    def new_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...
    def scratch(self, num_bytes: int) -> int: ...


class _Recording(threading.local):
    recorder: Recorder | None = None


RECORDING = _Recording()


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Where a worker writes its result. Every tensor that a CPU kernel returns comes from here."""
    recorder = RECORDING.recorder
    return torch.empty(shape, dtype=dtype) if recorder is None else recorder.new_tensor(shape, dtype)


def is_recording() -> bool:
    return RECORDING.recorder is not None


def scratch(num_bytes: int) -> int:
    """The address of memory that is one worker's while it runs, and anybody's afterwards."""
    recorder = RECORDING.recorder
    return KEPT_MEMORY.address(num_bytes) if recorder is None else recorder.scratch(num_bytes)


ALONE = -1
"""A ticket that asks for one thread."""


class Worker:
    """A function `body(parameters)` that several threads enter at once and whose work they share out among themselves.

    `parameters` is an int64 array, shown to the body as a pointer to elements of the dtype: the body is compiled once
    for each dtype, at its first use. The first parameter is zero when the threads enter: the ticket of the next unit
    of work. A body returns only when there is no unit to take any more: in a recording, a kernel is done once those
    that came have left it.

    `prepare(parameters)` is run before the body by one thread alone; if it leaves ALONE as the ticket, the body is too,
    since there is less to do than to wait for; if it leaves any other, all units are taken, and a recording passes the
    kernel over. Neither must raise.

    Parameters are used again when a recording is replayed: whatever changes while the body runs, or follows from
    values that tensors hold, is for `prepare` to set.
    """

    def __init__(self, body: Callable[[Any], None], prepare: Callable[[Any], None] | None = None) -> None:
        self.name = f"{body.__module__.rpartition('kernels.')[2].removesuffix('.cpu')}.{body.__name__.lstrip('_')}"
        """For profiles."""
        self._functions = (prepare, body)
        self._compiled: dict[torch.dtype, tuple[Any, Any]] = {}

    def run(self, dtype: torch.dtype, parameters: Parameters, num_threads: int, panels: Panels | None = None) -> None:
        """Enter the body on `num_threads` threads, this one among them, and return when all have left it.

        Args:
            panels: what the threads read, in ranges: a recording asks for them ahead.
        """
        prepare, body = self._compiled.get(dtype) or self.compile(dtype)
        prepare_address = 0 if prepare is None else prepare.address
        if RECORDING.recorder is not None:
            RECORDING.recorder.add(self.name, prepare_address, body.address, parameters, panels)
            return
        fork_join = fork_join_address() if num_threads > 1 else 0
        if num_threads > 1 and not fork_join:
            _numba_fork_join()(prepare_address, body.address, parameters, num_threads)
        else:
            enter(fork_join, prepare_address, body.address, parameters, num_threads)

    def compile(self, dtype: torch.dtype) -> tuple[Any, Any]:
        """Compile for `dtype`, or load what an earlier process compiled."""
        prepare, body = self._functions
        compiled = self._compiled[dtype] = (
            None if prepare is None else compiled_function(prepare, dtype),
            compiled_function(body, dtype),
        )
        return compiled


def compiled_function(function: Callable[[Any], None], dtype: torch.dtype) -> Any:
    """A C function of a pointer to elements of `dtype`; its `address` is what other compiled code calls."""
    signature = types.void(types.CPointer(_ELEMENTS[dtype]))
    options = {"nopython": True, "error_model": "numpy"}
    begin = time.perf_counter()
    name = str(dtype).removeprefix("torch.")
    directory = _writable_cache_directory()
    mark = Path(directory) / f"{function.__module__}.{function.__qualname__}.{name}" if directory else None
    was_compiled = mark is not None and mark.exists()
    if mark is not None and not was_compiled and ELSEWHERE.compiler is not None:
        ELSEWHERE.compiler.compile(function, name)
    try:
        with _cache_directory() as usable:
            compiled = numba.cfunc(signature, cache=usable, **options)(function)
        if mark is not None and not was_compiled:
            mark.touch()
    except OSError:  # the disk is full, or the directory went away: only the next start pays for it
        compiled = numba.cfunc(signature, **options)(function)
    if not was_compiled or not compiled.cache_hits:
        operation = function.__module__.removeprefix("quire.kernels.").removesuffix(".cpu")
        log.info("Compiled %s for %s in %.1f s.", operation, name, time.perf_counter() - begin)
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
    for source in sorted([*here.glob("cpu_*.py"), *here.glob("*/cpu*.py")]):
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
def call_function(builder: Builder, kinds: Kinds, function: Value, argument: Value) -> None:
    """function(argument), both addresses."""
    pointer = ir.IntType(8).as_pointer()
    function_type = ir.FunctionType(ir.VoidType(), [pointer])
    builder.call(builder.inttoptr(function, function_type.as_pointer()), [builder.inttoptr(argument, pointer)])


@emitted(nothing)
def _fork(builder: Builder, kinds: Kinds, fork_join: Value, body: Value, argument: Value, num_threads: Value) -> None:
    """GOMP_parallel(body, argument, num_threads, 0)."""
    pointer, unsigned = ir.IntType(8).as_pointer(), ir.IntType(32)
    function_type = ir.FunctionType(ir.VoidType(), [pointer, pointer, unsigned, unsigned])
    arguments = [builder.inttoptr(body, pointer), builder.inttoptr(argument, pointer)]
    arguments += [builder.trunc(num_threads, unsigned), unsigned(0)]
    builder.call(builder.inttoptr(fork_join, function_type.as_pointer()), arguments)


def cached(function: Callable[..., Any]) -> Any:
    """A Numba function that is compiled at its first call, or loaded if an earlier process compiled it."""
    with _cache_directory() as usable:
        return numba.njit(nogil=True, cache=usable)(function)


@cached
def enter(fork_join: int, prepare: int, body: int, parameters: Parameters, num_threads: int) -> None:
    """prepare(parameters), then body(parameters) on `num_threads` threads, or on this one without a `fork_join`."""
    address = parameters.ctypes.data
    if prepare != 0:
        call_function(prepare, address)
    if prepare != 0 and parameters[0] == ALONE:
        parameters[0] = 0
        call_function(body, address)
    elif fork_join != 0:
        _fork(fork_join, body, address, num_threads)
    else:
        call_function(body, address)


@functools.cache
def _numba_fork_join() -> Callable[[int, int, Parameters, int], None]:
    """Numba's own threads, for a torch without an OpenMP runtime that has GNU's entry point."""

    @numba.njit(parallel=True)
    def enter_all(prepare: int, body: int, parameters: Parameters, num_threads: int) -> None:
        address = parameters.ctypes.data
        if prepare != 0:
            call_function(prepare, address)
            parameters[0] = max(parameters[0], 0)
        for _ in numba.prange(num_threads):
            call_function(body, address)

    return enter_all  # type: ignore[no-any-return]


@functools.cache
def fork_join_address() -> int:
    """The address of GOMP_parallel in the OpenMP runtime that torch runs on; 0 if it has none.

    It is what GCC compiles `#pragma omp parallel` to, and LLVM's runtime has it too. Used on torch's runtime, the
    kernels run on torch's threads: one pool, and torch.set_num_threads holds for both.
    """
    return _openmp_addresses()[0]


def thread_number_address() -> int:
    """The address of omp_get_thread_num in the same runtime: which of those that entered together a thread is."""
    return _openmp_addresses()[1]


@functools.cache
def _openmp_addresses() -> tuple[int, int]:
    package = Path(torch.__file__).parent
    shipped = [*package.glob("lib/lib*omp*"), *package.parent.glob("torch.libs/lib*omp*")]
    already_loaded = getattr(os, "RTLD_NOLOAD", 0) | getattr(os, "RTLD_NOW", 0)
    for name in (*map(str, shipped), None):
        with contextlib.suppress(OSError, AttributeError, TypeError):
            library = ctypes.CDLL(name, mode=already_loaded)
            functions = (library.GOMP_parallel, library.omp_get_thread_num)
            fork_join, number = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
            return fork_join, number
    return 0, 0
