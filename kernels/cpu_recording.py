"""A sequence of CPU kernels, recorded once and replayed as one: what CUDA graphs are on a GPU.

A decode step is a hundred small kernels. Called one by one, each costs a walk through Python and a fork and a join of
the threads, as much as it computes. Recorded, the threads enter once, and pass from one kernel to the next through a
barrier of their own.

A recording owns what its kernels write, as a CUDA graph has its private pool: memory is given back within the recording
when a tensor is gone, never outside. What kernels read at replay are the very tensors that were there when it was made.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import sys
import time
import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import types
from torch.utils._python_dispatch import TorchDispatchMode

from quire.kernels import cpu_lanes as lanes
from quire.kernels.cpu_elements import (
    I32,
    I64,
    Builder,
    Kinds,
    Value,
    architecture,
    call_for_number,
    emitted,
    int64_pointer,
    move,
    nothing,
    take,
)
from quire.kernels.cpu_ranges import Panels
from quire.kernels.cpu_workers import (
    ALONE,
    RECORDING,
    Parameters,
    call_function,
    compiled_function,
    enter,
    fork_join_address,
    team_size_address,
    thread_number_address,
)

_ALIGNMENT = 64
_CHUNK_BYTES = 2**20
_SPINS = 4096  # pauses, some 70 microseconds, before a waiting thread goes to sleep

# A replay's parameters: their places in the int64 array that its threads share.
(
    _ARRIVED,  # threads that have left the kernel that runs
    _RELEASED,  # kernels that all threads have left, or that had nothing to do
    _NUM_KERNELS,
    _KERNELS,  # [num_kernels, _NUM_FIELDS]
    _TEAM_SIZE,  # omp_get_num_threads, or 0: a single thread replays
    _THREAD_NUMBER,  # omp_get_thread_num, or 0
    _NUM_RANGES,  # into which panels are divided
    _AHEAD_BYTES,
    _EARLY_BYTES,
    _SLEEPING,  # threads that sleep until the next release
    _SYSCALL,  # syscall of the C library, or 0: nobody sleeps
) = range(11)

# A kernel's fields: three addresses, and the panels of the next kernel behind it that reads any.
_PREPARE, _BODY, _PARAMETERS, _AHEAD, _NUM_PANELS, _PANEL_BYTES, _NUM_FIELDS = range(7)

_LINE_BYTES, _LINES_AT_ONCE = 64, 4  # of the cache; between two looks at whether the others are done

_FUTEX = {"x86_64": 202, "aarch64": 98}  # number of the system call
_FUTEX_WAIT, _FUTEX_WAKE, _EVERYBODY = 128, 129, 2**31 - 1  # of threads of one process


_NO_PANELS = Panels(0, 0, 0)


class NotRecordableError(Exception):
    """Something other than our kernels computes here, so that a replay would leave it out."""


class Arena:
    """Memory of recordings that are never replayed at the same time. Each begins with all of it free."""

    def __init__(self) -> None:
        self._chunks: list[npt.NDArray[np.uint8]] = []
        self._scratch: list[npt.NDArray[np.uint8]] = []

    def chunk(self, index: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """The index-th chunk of memory, of at least `num_bytes` unless it was made before."""
        if index == len(self._chunks):
            self._chunks.append(_aligned(max(num_bytes, _CHUNK_BYTES)))
        return self._chunks[index]

    def scratch(self, num_bytes: int) -> int:
        """Memory that any kernel may use while it runs. Recordings made before keep what they were given."""
        if not self._scratch or len(self._scratch[-1]) < num_bytes:
            self._scratch.append(_aligned(num_bytes))
        return int(self._scratch[-1].ctypes.data)


def _aligned(num_bytes: int) -> npt.NDArray[np.uint8]:
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes]


class Recording:
    """Kernels in the order in which they were asked for; made by `record`.

    Attributes:
        names: of the kernels.
        parameters: of all kernels, one after another; may be changed between replays.
    """

    def __init__(self, arena: Arena, max_rows: int | None) -> None:
        self.names: list[str] = []
        self.parameters: Parameters = np.zeros(0, np.int64)
        self._arena = arena
        self._max_rows = max_rows
        self._max_threads = torch.get_num_threads()
        self._functions: list[tuple[int, int]] = []
        self._panels: list[Panels] = []
        self._recorded: list[Parameters] = []
        self._kernels = np.zeros((0, _NUM_FIELDS), np.int64)
        self._free: dict[int, list[npt.NDArray[np.uint8]]] = defaultdict(list)
        self._chunk_index = 0
        self._chunk_used = 0
        self._replay: Parameters = np.zeros(0, np.int64)

    def add(self, name: str, prepare: int, body: int, parameters: Parameters, panels: Panels | None) -> None:
        self.names.append(name)
        self._functions.append((prepare, body))
        self._panels.append(panels or _NO_PANELS)
        self._recorded.append(parameters)

    def new_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised; its memory serves another tensor of the recording once nothing refers to it any more."""
        num_rows = shape[0] if self._max_rows is None else self._max_rows
        full_shape = (num_rows, *shape[1:])
        num_bytes = max(1, math.prod(full_shape) * dtype.itemsize)
        size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        memory = self._free[size].pop() if self._free[size] else self._allocate(size)
        lease = memory[:num_bytes]  # torch holds on to this very array as long as there is a view of the tensor
        weakref.finalize(lease, self._free[size].append, memory).atexit = False
        return torch.from_numpy(lease).view(dtype).view(full_shape)[: shape[0]]

    def _allocate(self, size: int) -> npt.NDArray[np.uint8]:
        chunk = self._arena.chunk(self._chunk_index, size)
        while self._chunk_used + size > len(chunk):
            self._chunk_index, self._chunk_used = self._chunk_index + 1, 0
            chunk = self._arena.chunk(self._chunk_index, size)
        memory = chunk[self._chunk_used : self._chunk_used + size]
        self._chunk_used += size
        return memory

    def scratch(self, num_bytes: int) -> int:
        return self._arena.scratch(num_bytes)

    def finish(self) -> None:
        self.parameters = np.concatenate(self._recorded) if self._recorded else self.parameters
        ends = np.cumsum([len(parameters) for parameters in self._recorded], dtype=np.int64)
        self._kernels = np.zeros((len(ends), _NUM_FIELDS), np.int64)
        self._kernels[:, :_PARAMETERS] = np.array(self._functions, np.int64).reshape(-1, 2)
        self._kernels[1:, _PARAMETERS] = ends[:-1]
        self._kernels[:, _PARAMETERS] = self.parameters.ctypes.data + 8 * self._kernels[:, _PARAMETERS]
        following = _NO_PANELS
        for index in reversed(range(len(ends))):
            self._kernels[index, _AHEAD:] = following
            following = self._panels[index] if self._panels[index].num_panels else following
        self._replay = np.zeros(_SYSCALL + 1, np.int64)
        self._replay[_NUM_KERNELS], self._replay[_KERNELS] = len(ends), self._kernels.ctypes.data
        self._replay[_NUM_RANGES], self._replay[_SYSCALL] = self._max_threads, _syscall_address()
        self._replay[_AHEAD_BYTES], self._replay[_EARLY_BYTES] = 262144, 2048
        self._recorded.clear()

    def replay(self, num_threads: int) -> None:
        """Run all kernels on `num_threads` threads, and return when they are done.

        On no more than torch had when they were recorded: kernels have scratch memory for so many.
        """
        num_threads = min(num_threads, self._max_threads)
        prepare, body = _compiled()
        fork_join = fork_join_address() if num_threads > 1 else 0
        self._replay[_TEAM_SIZE] = team_size_address() if fork_join else 0
        self._replay[_THREAD_NUMBER] = thread_number_address() if fork_join else 0
        enter(fork_join, prepare, body, self._replay, num_threads)

    def profile(self, num_threads: int) -> list[tuple[str, float]]:
        """Replay kernel by kernel; the name of each and the seconds it took, with a fork and a join of its own."""
        num_threads = min(num_threads, self._max_threads)
        prepare, body = _compiled()
        fork_join = fork_join_address() if num_threads > 1 else 0
        times = []
        for index, name in enumerate(self.names):
            alone = self._replay.copy()
            alone[_NUM_KERNELS], alone[_KERNELS] = 1, self._kernels[index].ctypes.data
            alone[_TEAM_SIZE] = team_size_address() if fork_join else 0
            alone[_AHEAD_BYTES] = alone[_EARLY_BYTES] = 0
            start = time.perf_counter()
            enter(fork_join, prepare, body, alone, num_threads)
            times.append((name, time.perf_counter() - start))
        return times


class _OnlyViews(TorchDispatchMode):
    """Lets through what makes views; whatever else torch is asked for would be missing in a replay."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would import its compiler, for most of a second and 80 MB, only to keep it away from here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func._schema.returns
        if not all(value.alias_info is not None and not value.alias_info.is_write for value in returned):
            raise NotRecordableError(f"{func} is no kernel that can be recorded")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def record(arena: Arena, max_rows: int | None = None) -> Iterator[Recording]:
    """Within, kernels of this thread are recorded instead of run.

    Args:
        max_rows: each new tensor gets room for so many rows; None: for those it has.

    Raises:
        NotRecordableError: torch was asked to compute something itself.
    """
    recording = Recording(arena, max_rows)
    RECORDING.recorder = recording
    try:
        with _OnlyViews():  # type: ignore[no-untyped-call]
            yield recording
    finally:
        RECORDING.recorder = None
    recording.finish()


@emitted(lambda pointer: types.int64)
def _acquire(builder: Builder, kinds: Kinds, pointer: Value) -> Value:
    """The int64 at `pointer`, and with it all that was written before it was released."""
    return builder.load_atomic(pointer, ordering="acquire", align=8)


@emitted(lambda pointer, value: types.int64)
def _add(builder: Builder, kinds: Kinds, pointer: Value, value: Value) -> Value:
    """Add to the int64 at `pointer`, in one order with all other additions; returns what it was."""
    return builder.atomic_rmw("add", pointer, value, "seq_cst")


@emitted(nothing)
def _pause(builder: Builder, kinds: Kinds) -> None:
    """Tell the processor that this thread only waits."""
    if architecture() == "x86_64":
        lanes.call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
    elif architecture() in ("aarch64", "arm64"):
        lanes.call(builder, "llvm.aarch64.hint", ir.VoidType(), [ir.Constant(I32, 1)])


@emitted(nothing)
def _ask_for_line(builder: Builder, kinds: Kinds, address: Value) -> None:
    """Have the line at an address brought into the second level of this thread's cache."""
    lanes.prefetch_line(builder, builder.inttoptr(address, ir.IntType(8).as_pointer()), locality=2)


@emitted(nothing)
def _futex(builder: Builder, kinds: Kinds, syscall: Value, pointer: Value, operation: Value, value: Value) -> None:
    """syscall(SYS_futex, pointer, operation, value, no timeout) on the low half of the int64 at `pointer`."""
    function_type = ir.FunctionType(I64, [I64] * 5)
    number = ir.Constant(I64, _FUTEX.get(architecture(), 0))
    arguments = [number, builder.ptrtoint(pointer, I64), operation, value, ir.Constant(I64, 0)]
    builder.call(builder.inttoptr(syscall, function_type.as_pointer()), arguments)


@numba.njit
def _prepare_from(parameters, index):  # type: ignore[no-untyped-def]
    """Make the first kernel from `index` on ready that is for all threads; which one.

    Those before it have no work, as their `prepare` says, or so little that this thread does it while the others wait.
    """
    while index < parameters[_NUM_KERNELS]:
        kernel = move(int64_pointer(parameters[_KERNELS]), _NUM_FIELDS * index)
        ticket = int64_pointer(kernel[_PARAMETERS])
        ticket[0] = 0
        if kernel[_PREPARE] != 0:
            call_function(kernel[_PREPARE], kernel[_PARAMETERS])
        if ticket[0] == 0:
            break
        if ticket[0] == ALONE:
            ticket[0] = 0
            call_function(kernel[_BODY], kernel[_PARAMETERS])
        index += 1
    return index


def _prepare(shared: Any) -> None:
    parameters = int64_pointer(shared)
    parameters[_ARRIVED] = 0
    parameters[_RELEASED] = _prepare_from(parameters, 0)


@numba.njit
def _range_ahead(parameters, index, thread):  # type: ignore[no-untyped-def]
    """Where the panels begin that a thread reads behind kernel `index`, and where they end."""
    kernel = move(int64_pointer(parameters[_KERNELS]), _NUM_FIELDS * index)
    num_panels, num_ranges = kernel[_NUM_PANELS], parameters[_NUM_RANGES]
    first, end = thread * num_panels // num_ranges, (thread + 1) * num_panels // num_ranges
    return kernel[_AHEAD] + first * kernel[_PANEL_BYTES], kernel[_AHEAD] + end * kernel[_PANEL_BYTES]


@numba.njit
def _wait(parameters, index, begin, end):  # type: ignore[no-untyped-def]
    """Until all threads have left kernel `index`; returns the next one, and up to where it asked for [begin, end).

    Whoever is late has lost its core to another process: a thread that sleeps leaves it its own. It counts itself
    before the kernel of the system looks whether it is to sleep at all, so nobody misses the release.
    """
    released = move(parameters, _RELEASED)
    num_spins = 0
    while _acquire(released) <= index:
        if begin < end:
            for line in range(_LINES_AT_ONCE):
                _ask_for_line(begin + line * _LINE_BYTES)
            begin += _LINES_AT_ONCE * _LINE_BYTES
            continue
        _pause()
        num_spins += 1
        if num_spins > _SPINS and parameters[_SYSCALL] != 0:
            _add(move(parameters, _SLEEPING), 1)
            _futex(parameters[_SYSCALL], released, _FUTEX_WAIT, index)
            _add(move(parameters, _SLEEPING), -1)
    return _acquire(released), begin


def _replay(shared: Any) -> None:
    parameters = int64_pointer(shared)
    num_threads = call_for_number(parameters[_TEAM_SIZE]) if parameters[_TEAM_SIZE] != 0 else 1
    thread = call_for_number(parameters[_THREAD_NUMBER]) if parameters[_THREAD_NUMBER] != 0 else 0
    kernels = int64_pointer(parameters[_KERNELS])
    index, asked = parameters[_RELEASED], 0
    while index < parameters[_NUM_KERNELS]:
        kernel = move(kernels, _NUM_FIELDS * index)
        call_function(kernel[_BODY], kernel[_PARAMETERS])
        begin, end = _range_ahead(parameters, index, thread)
        if not begin < asked <= end:
            asked = begin
        limit = min(begin + parameters[_EARLY_BYTES], end)
        while asked < limit:
            _ask_for_line(asked)
            asked += _LINE_BYTES
        end = min(begin + parameters[_AHEAD_BYTES], end)
        # The last to leave a kernel makes the next one ready and lets the others go on.
        if take(move(parameters, _ARRIVED)) == num_threads - 1:
            parameters[_ARRIVED] = 0
            following = _prepare_from(parameters, index + 1)
            _add(move(parameters, _RELEASED), following - index)
            if _add(move(parameters, _SLEEPING), 0) > 0:
                _futex(parameters[_SYSCALL], move(parameters, _RELEASED), _FUTEX_WAKE, _EVERYBODY)
            index = following
        else:
            index, asked = _wait(parameters, index, asked, end)


def _syscall_address() -> int:
    """Where threads can sleep on a futex: on Linux, of the architectures whose numbers are known."""
    if sys.platform != "linux" or sys.byteorder != "little" or architecture() not in _FUTEX:
        return 0
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value or 0
    return 0


@functools.cache
def _compiled() -> tuple[int, int]:
    prepare, replay = compiled_function(_prepare, torch.float32), compiled_function(_replay, torch.float32)
    _FUNCTIONS.extend((prepare, replay))
    return prepare.address, replay.address


_FUNCTIONS: list[Any] = []
"""Compiled code lives as long as these."""
