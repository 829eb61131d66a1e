"""What the threads of a recording's replay do: kernel after kernel, in step with each other.

Reading weights is what a small step costs, and memory must not rest meanwhile. So a thread that waits for the others
asks for the panels that it reads next, and what is too little for two threads is done by the last one to leave.

Nobody waits for a thread that has not come. A server's engine shares its cores: when a step begins, another process may
have one of them for a moment. A kernel is done once those that entered it have left it, since each leaves only when
there is no unit to take any more; who was late joins at the kernel that runs then.
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
)
from quire.kernels.cpu_workers import ALONE, call_function, compiled_function

_SPINS = 4096  # pauses, some 70 microseconds, before a waiting thread goes to sleep

# A replay's parameters: their places in the int64 array that its threads share.
(
    STATE,  # low half: which kernel runs; high half: how many threads are in it, 0 while it is not to be entered
    NUM_KERNELS,
    KERNELS,  # [num_kernels, NUM_FIELDS]
    THREAD_NUMBER,  # omp_get_thread_num, or 0: a single thread replays
    NUM_RANGES,  # into which panels are divided
    AHEAD_BYTES,  # at most, of what a thread asks for while it waits
    SLEEPING,  # threads that sleep until another kernel runs
    SYSCALL,  # syscall of the C library, or 0: nobody sleeps
) = range(8)
_INSIDE = 2**32  # one thread, in the state

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


@emitted(lambda pointer, expected, value: types.int64)
def _exchange(builder: Builder, kinds: Kinds, pointer: Value, expected: Value, value: Value) -> Value:
    """Make the int64 at `pointer` `value` if it is `expected`, in one order with all additions; whether it was."""
    pair = builder.cmpxchg(pointer, expected, value, "seq_cst", "acquire")
    return builder.zext(builder.extract_value(pair, 1), I64)


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
    # The first thread, which forks the others, is in it from the beginning.
    parameters[STATE] = _prepare_from(parameters, 0) + _INSIDE


@numba.njit
def range_ahead(parameters, index, thread):  # type: ignore[no-untyped-def]
    """Where the panels begin that a thread reads behind kernel `index`, and where they end."""
    kernel = move(int64_pointer(parameters[KERNELS]), NUM_FIELDS * index)
    num_panels, num_ranges = kernel[NUM_PANELS], parameters[NUM_RANGES]
    first, end = thread * num_panels // num_ranges, (thread + 1) * num_panels // num_ranges
    return kernel[AHEAD] + first * kernel[PANEL_BYTES], kernel[AHEAD] + end * kernel[PANEL_BYTES]


@numba.njit
def _enter_behind(parameters, index, begin, end):  # type: ignore[no-untyped-def]
    """Enter the first kernel behind `index` that can be; returns which, and up to where this asked for [begin, end).

    At the end it is NUM_KERNELS, which nobody leaves. Whoever keeps this thread waiting may have lost its core to
    another process: a thread that sleeps leaves it its own. It counts itself before the kernel of the system looks
    whether it is to sleep at all, so nobody misses the release.
    """
    state = move(parameters, STATE)
    num_spins = 0
    while True:
        seen = _acquire(state)
        running = seen % _INSIDE
        if running > index and seen >= _INSIDE:
            # If another was quicker, look again: asleep here, it would not hear of a kernel that can be entered now.
            if _exchange(state, seen, seen + _INSIDE) != 0:
                return running, begin
        elif begin < end:
            for line in range(_LINES_AT_ONCE):
                _ask_for_line(begin + line * _LINE_BYTES)
            begin += _LINES_AT_ONCE * _LINE_BYTES
        else:
            _pause()
            num_spins += 1
            if num_spins > _SPINS and parameters[SYSCALL] != 0:
                _add(move(parameters, SLEEPING), 1)
                _futex(parameters[SYSCALL], state, _FUTEX_WAIT, running)
                _add(move(parameters, SLEEPING), -1)


def _replay(shared: Any) -> None:
    parameters = int64_pointer(shared)
    thread = call_for_number(parameters[THREAD_NUMBER]) if parameters[THREAD_NUMBER] != 0 else 0
    kernels, state = int64_pointer(parameters[KERNELS]), move(parameters, STATE)
    asked = 0
    index = parameters[STATE] % _INSIDE if thread == 0 else _enter_behind(parameters, -1, 0, 0)[0]
    while index < parameters[NUM_KERNELS]:
        kernel = move(kernels, NUM_FIELDS * index)
        call_function(kernel[BODY], kernel[PARAMETERS])
        begin, end = range_ahead(parameters, index, thread)
        if not begin < asked <= end:
            asked = begin
        end = min(begin + parameters[AHEAD_BYTES], end)
        # The last to leave a kernel makes the next one ready, is in it, and lets the others come.
        if _add(state, -_INSIDE) < 2 * _INSIDE:
            following = _prepare_from(parameters, index + 1)
            _add(state, following - index + _INSIDE)
            if _add(move(parameters, SLEEPING), 0) > 0:
                _futex(parameters[SYSCALL], state, _FUTEX_WAKE, _EVERYBODY)
            index = following
        else:
            index, asked = _enter_behind(parameters, index, asked, end)


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
