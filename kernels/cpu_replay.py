"""What the threads of a recording's replay do: kernel after kernel, through a barrier of their own.

Reading weights is what a small step costs, and memory must not rest meanwhile. So a thread that waits for the others
asks for the panels that it reads next, and what is too little for two threads is done by the last one to arrive.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import types

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
from quire.kernels.cpu_workers import ALONE, call_function, compiled_function

_SPINS = 4096  # pauses, some 70 microseconds, before a waiting thread goes to sleep

# A replay's parameters: their places in the int64 array that its threads share.
(
    ARRIVED,  # threads that have left the kernel that runs
    RELEASED,  # kernels that are done: all threads have left them, or one did them alone, or they had no work
    NUM_KERNELS,
    KERNELS,  # [num_kernels, NUM_FIELDS]
    TEAM_SIZE,  # omp_get_num_threads, or 0: a single thread replays
    THREAD_NUMBER,  # omp_get_thread_num, or 0
    NUM_RANGES,  # into which panels are divided
    AHEAD_BYTES,  # at most, of what a thread asks for while it waits
    SLEEPING,  # threads that sleep until the next release
    SYSCALL,  # syscall of the C library, or 0: nobody sleeps
) = range(10)

# A kernel's fields: three addresses, and the panels of the next kernel behind it that reads any.
PREPARE, BODY, PARAMETERS, AHEAD, NUM_PANELS, PANEL_BYTES, NUM_FIELDS = range(7)

_LINE_BYTES, _LINES_AT_ONCE = 64, 4  # of the cache; between two looks at whether the others are done
MAX_AHEAD_BYTES = 2**19  # half of a second-level cache

_FUTEX = {"x86_64": 202, "aarch64": 98}  # number of the system call
_FUTEX_WAIT, _FUTEX_WAKE, _EVERYBODY = 128, 129, 2**31 - 1  # of threads of one process


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
    while index < parameters[NUM_KERNELS]:
        kernel = move(int64_pointer(parameters[KERNELS]), NUM_FIELDS * index)
        ticket = int64_pointer(kernel[PARAMETERS])
        ticket[0] = 0
        if kernel[PREPARE] != 0:
            call_function(kernel[PREPARE], kernel[PARAMETERS])
        if ticket[0] == 0:
            break
        if ticket[0] == ALONE:
            ticket[0] = 0
            call_function(kernel[BODY], kernel[PARAMETERS])
        index += 1
    return index


def _prepare(shared: Any) -> None:
    parameters = int64_pointer(shared)
    parameters[ARRIVED] = 0
    parameters[RELEASED] = _prepare_from(parameters, 0)


@numba.njit
def range_ahead(parameters, index, thread):  # type: ignore[no-untyped-def]
    """Where the panels begin that a thread reads behind kernel `index`, and where they end."""
    kernel = move(int64_pointer(parameters[KERNELS]), NUM_FIELDS * index)
    num_panels, num_ranges = kernel[NUM_PANELS], parameters[NUM_RANGES]
    first, end = thread * num_panels // num_ranges, (thread + 1) * num_panels // num_ranges
    return kernel[AHEAD] + first * kernel[PANEL_BYTES], kernel[AHEAD] + end * kernel[PANEL_BYTES]


@numba.njit
def _wait(parameters, index, begin, end):  # type: ignore[no-untyped-def]
    """Until all threads have left kernel `index`; returns the next one, and up to where it asked for [begin, end).

    Whoever is late has lost its core to another process: a thread that sleeps leaves it its own. It counts itself
    before the kernel of the system looks whether it is to sleep at all, so nobody misses the release.
    """
    released = move(parameters, RELEASED)
    num_spins = 0
    while _acquire(released) <= index:
        if begin < end:
            for line in range(_LINES_AT_ONCE):
                _ask_for_line(begin + line * _LINE_BYTES)
            begin += _LINES_AT_ONCE * _LINE_BYTES
            continue
        _pause()
        num_spins += 1
        if num_spins > _SPINS and parameters[SYSCALL] != 0:
            _add(move(parameters, SLEEPING), 1)
            _futex(parameters[SYSCALL], released, _FUTEX_WAIT, index)
            _add(move(parameters, SLEEPING), -1)
    return _acquire(released), begin


def _replay(shared: Any) -> None:
    parameters = int64_pointer(shared)
    num_threads = call_for_number(parameters[TEAM_SIZE]) if parameters[TEAM_SIZE] != 0 else 1
    thread = call_for_number(parameters[THREAD_NUMBER]) if parameters[THREAD_NUMBER] != 0 else 0
    kernels = int64_pointer(parameters[KERNELS])
    index, asked = parameters[RELEASED], 0
    while index < parameters[NUM_KERNELS]:
        kernel = move(kernels, NUM_FIELDS * index)
        call_function(kernel[BODY], kernel[PARAMETERS])
        begin, end = range_ahead(parameters, index, thread)
        if not begin < asked <= end:
            asked = begin
        end = min(begin + parameters[AHEAD_BYTES], end)
        # The last to leave a kernel makes the next one ready and lets the others go on.
        if take(move(parameters, ARRIVED)) == num_threads - 1:
            parameters[ARRIVED] = 0
            following = _prepare_from(parameters, index + 1)
            _add(move(parameters, RELEASED), following - index)
            if _add(move(parameters, SLEEPING), 0) > 0:
                _futex(parameters[SYSCALL], move(parameters, RELEASED), _FUTEX_WAKE, _EVERYBODY)
            index = following
        else:
            index, asked = _wait(parameters, index, asked, end)


def syscall_address() -> int:
    """Where threads can sleep on a futex: on Linux, of the architectures whose numbers are known."""
    if sys.platform != "linux" or sys.byteorder != "little" or architecture() not in _FUTEX:
        return 0
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value or 0
    return 0


@functools.cache
def compiled() -> tuple[int, int]:
    prepare, replay = compiled_function(_prepare, torch.float32), compiled_function(_replay, torch.float32)
    _FUNCTIONS.extend((prepare, replay))
    return prepare.address, replay.address


_FUNCTIONS: list[Any] = []
"""Compiled code lives as long as these."""
