"""Work for the device, in order, and what it brings back to the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], list[torch.Tensor]]
"""Launches a step's kernels; the tensors that the host wants of it."""


class Pending(Protocol):
    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host, once the device has come so far. Called once."""
        ...


class DeviceQueue(Protocol):
    """What one piece of work reads and writes on the device follows what came before it."""

    def run(self, work: Work) -> Pending:
        """Raises torch.OutOfMemoryError where the work does not fit beside what the device holds."""
        ...

    def release_memory(self) -> None:
        """Give back what is only kept to be used again, once the work that is under way is done."""
        ...


class Done:
    """Of a device that has computed as soon as it was asked."""

    __slots__ = ("_tensors",)

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors

    def wait(self) -> list[torch.Tensor]:
        return self._tensors


class HostQueue:
    """A CPU computes at once.

    Args:
        keep: results outlast the next step, which may be computed in the same memory before they are looked at.
    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep

    def run(self, work: Work) -> Pending:
        tensors = work()
        return Done([tensor.clone() for tensor in tensors] if self._keep else tensors)

    def release_memory(self) -> None:
        """There is nothing."""


class CopyToHost:
    """Of a GPU: copies to pinned memory behind the work, and an event behind the copies. Nothing else waits."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in tensors
        ]
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> list[torch.Tensor]:
        self._event.synchronize()
        return self._tensors


class CudaQueue:
    """The current stream of a GPU. Most steps bring back one tensor, the tokens; log-probabilities and beams more."""

    def run(self, work: Work) -> Pending:
        return CopyToHost(work())

    def release_memory(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
