"""A sequence of CPU kernels, recorded once and replayed as one: what CUDA graphs are on a GPU.

A decode step is a hundred small kernels. Called one by one, each costs a walk through Python and a fork and a join of
the threads, as much as it computes. Recorded, the threads enter once, and pass from one kernel to the next by
themselves.

A recording owns what its kernels write, as a CUDA graph has its private pool: memory is given back within the recording
when a tensor is gone, never outside. What kernels read at replay are the very tensors that were there when it was made.
"""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quire.kernels import cpu_replay as call
from quire.kernels.cpu_ranges import Panels
from quire.kernels.cpu_workers import (
    RECORDING,
    Parameters,
    enter,
    fork_join_address,
    thread_number_address,
)

_ALIGNMENT = 64
_CHUNK_BYTES = 2**20

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
        self._kernels = np.zeros((0, call.NUM_FIELDS), np.int64)
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
        self._kernels = np.zeros((len(ends), call.NUM_FIELDS), np.int64)
        self._kernels[:, : call.PARAMETERS] = np.array(self._functions, np.int64).reshape(-1, 2)
        self._kernels[1:, call.PARAMETERS] = ends[:-1]
        self._kernels[:, call.PARAMETERS] = self.parameters.ctypes.data + 8 * self._kernels[:, call.PARAMETERS]
        following = _NO_PANELS
        for index in reversed(range(len(ends))):
            self._kernels[index, call.AHEAD :] = following
            following = self._panels[index] if self._panels[index].num_panels else following
        self._replay = np.zeros(call.SYSCALL + 1, np.int64)
        self._replay[call.NUM_KERNELS], self._replay[call.KERNELS] = len(ends), self._kernels.ctypes.data
        self._replay[call.NUM_RANGES], self._replay[call.SYSCALL] = self._max_threads, call.syscall_address()
        self._replay[call.AHEAD_BYTES] = call.MAX_AHEAD_BYTES
        self._recorded.clear()

    def replay(self, num_threads: int) -> None:
        """Run all kernels on `num_threads` threads, and return when they are done.

        On no more than torch had when they were recorded: kernels have scratch memory for so many.
        """
        enter(*self._entry(self._replay, num_threads))

    def _entry(self, shared: Parameters, num_threads: int) -> tuple[int, int, int, Parameters, int]:
        """What `enter` is to be called with; `shared` is told how its threads are numbered."""
        num_threads = min(num_threads, self._max_threads)
        prepare, body = call.compiled()
        fork_join = fork_join_address() if num_threads > 1 else 0
        shared[call.THREAD_NUMBER] = thread_number_address() if fork_join else 0
        return fork_join, prepare, body, shared, num_threads

    def profile(self, num_threads: int) -> list[tuple[str, float]]:
        """Replay kernel by kernel; the name of each and the seconds it took, with a fork and a join of its own."""
        times = []
        for index, name in enumerate(self.names):
            alone = self._replay.copy()
            alone[call.NUM_KERNELS], alone[call.KERNELS] = 1, self._kernels[index].ctypes.data
            alone[call.AHEAD_BYTES] = 0
            entry = self._entry(alone, num_threads)
            start = time.perf_counter()
            enter(*entry)
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
