"""What a program in Gluon runs on, as gluon_interpreter.py has it: shared memory, barriers, copies, partitions."""

from __future__ import annotations

import functools
import random
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gluon_tensor import Tensor


class Race(Exception):
    """Something happened in an order that nothing ensures."""


class Deadlock(Exception):
    """All partitions wait, and nothing is under way that could wake one."""


class _Ended(BaseException):
    """Unwinds a partition whose program has failed elsewhere."""


@functools.cache
def offsets(shape: tuple[int, ...], layout: Any) -> np.ndarray:
    """Where the elements of a tensor of `shape` lie in shared memory, in elements, as Triton lays them out."""
    rank = layout.rank
    inner = shape[-rank:]
    found = np.full(inner, -1)
    for line in layout.format_hardware_view(list(inner)).splitlines():
        if numbers := re.match(r"Offset: *(\d+) -> \(([\d, ]+)\)", line):
            found[tuple(int(number) for number in numbers[2].split(","))] = int(numbers[1])
    if (found < 0).any():
        raise ValueError(f"{layout} does not lay out {inner}")
    outer = np.arange(int(np.prod(shape[:-rank]))).reshape(*shape[:-rank], *(1 for _ in inner))
    return outer * int(np.prod(inner)) + found


@dataclass
class Memory:
    """One allocation of shared memory, element by element: what it holds, and who is at it."""

    data: np.ndarray
    arriving: np.ndarray  # copies that were asked for and have not arrived
    readers: np.ndarray  # matrix products that were begun and not waited for
    unfenced: np.ndarray  # stored, and not yet ordered before what the TMA and matrix products do


@dataclass
class View:
    """A shared_memory_descriptor."""

    memory: Memory
    at: np.ndarray
    dtype: Any
    layout: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.at.shape

    def index(self, index: Any) -> View:
        index = int(index)
        if not 0 <= index < len(self.at):
            raise Race(f"there is no buffer {index} of {len(self.at)}")
        return View(self.memory, self.at[index], self.dtype, self.layout)

    def permute(self, order: Sequence[int]) -> View:
        return View(self.memory, self.at.transpose(order), self.dtype)

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> View:
        at = offsets(tuple(shape), layout)
        if at.size != self.memory.data.size:
            raise ValueError(f"{shape} is not all of {self.memory.data.size} elements")
        return View(self.memory, at, dtype, layout)

    def store(self, value: Tensor) -> None:
        if value.dtype != self.dtype:
            raise TypeError(f"{value.dtype} is stored as {self.dtype}")
        if (self.memory.readers[self.at] > 0).any() or (self.memory.arriving[self.at] > 0).any():
            raise Race("a store meets a copy or a matrix product")
        self.memory.data[self.at] = value.data
        self.memory.unfenced[self.at] = True
        current().stored.append(self)
        current().pause()

    def load(self, layout: Any) -> Tensor:
        if (self.memory.arriving[self.at] > 0).any():
            raise Race("a load meets a copy")
        return Tensor(self.memory.data[self.at], self.dtype)

    def operand(self) -> np.ndarray:
        """What a matrix product reads now."""
        if (self.memory.arriving[self.at] > 0).any():
            raise Race("a matrix product reads what has not arrived")
        if self.memory.unfenced[self.at].any():
            raise Race("a matrix product reads stores that no fence comes after")
        self.memory.readers[self.at] += 1
        return self.memory.data[self.at].copy()


@dataclass
class Pending:
    """A matrix product under way: an accumulator that cannot be used yet."""

    result: Tensor
    operands: list[View]
    registers: Tensor | None  # the left operand, if it is no View
    is_done: bool = False


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes that were announced have."""

    count: int = 0
    missing: int = 0
    missing_bytes: int = 0
    phase: int = 0
    is_fenced: bool = False  # the TMA knows of it

    def arrive(self, count: int, announced_bytes: int = 0) -> None:
        self.missing -= count
        self.missing_bytes += announced_bytes
        if self.missing < 0:
            raise Race("more arrive at a barrier than it counts")
        self._end_phase()

    def receive(self, num_bytes: int) -> None:
        self.missing_bytes -= num_bytes
        self._end_phase()

    def _end_phase(self) -> None:
        if self.missing == 0 and self.missing_bytes == 0:
            self.missing, self.phase = self.count, self.phase + 1


@dataclass
class Partition:
    """One warp-specialised function, in a thread of its own that runs only when it is told to."""

    program: Program
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    may_go: Callable[[], bool] = field(default=lambda: True)
    products: list[Pending] = field(default_factory=list)
    stored: list[View] = field(default_factory=list)
    error: BaseException | None = None
    is_over: bool = False

    def __post_init__(self) -> None:
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        _partition.current = self
        self._turn.acquire()
        try:
            if not self.program.has_failed:
                self.function(*self.arguments)
                if self.products:
                    raise Race("a partition ends before its matrix products")
        except _Ended:
            pass
        except BaseException as error:  # handed to the thread that runs the program
            self.error = error
        self.is_over = True
        self._back.release()

    def step(self) -> None:
        """Run to the next pause."""
        self._turn.release()
        self._back.acquire()
        if self.error is not None:
            raise self.error

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        self.may_go = until
        self._back.release()
        self._turn.acquire()
        if self.program.has_failed:
            raise _Ended


_partition = threading.local()


def current() -> Any:
    """The partition whose thread this is, or the program before it has any."""
    return _partition.current


def set_current(program: Program) -> None:
    _partition.current = program


class Program:
    """One program of a grid: its partitions, and the copies that are under way."""

    def __init__(self, ids: tuple[int, ...], grid: tuple[int, ...], order: random.Random) -> None:
        self.ids, self.grid, self.order = ids, grid, order
        self.copies: list[Callable[[], None]] = []
        self.stored: list[View] = []
        self.initialized: list[Barrier] = []
        self.has_failed = False

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """Before there are partitions nobody else can notice anything."""

    def run(self, functions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        partitions = [Partition(self, function, arguments) for function, arguments in functions]
        try:
            while not all(partition.is_over for partition in partitions):
                ready = [partition for partition in partitions if not partition.is_over and partition.may_go()]
                if not ready and not self.copies:
                    raise Deadlock
                choice = self.order.randrange(len(ready) + len(self.copies))
                if choice < len(ready):
                    ready[choice].step()
                else:
                    self.copies.pop(choice - len(ready))()
            if self.copies:
                raise Race("the program ends before its copies")
        finally:
            self.has_failed = True
            for partition in partitions:
                if not partition.is_over:
                    partition.step()
