"""Which body of an operation runs: its Triton kernel, its CPU kernel or its plain torch reference."""

from __future__ import annotations

from typing import Literal

import torch

Backend = Literal["auto", "triton", "cpu", "reference"]
Body = Literal["triton", "cpu", "reference"]

_BODY_OF_DEVICE: dict[str, Body] = {"cuda": "triton", "cpu": "cpu"}
_NAMES = ("auto", "triton", "cpu", "reference")


def choose_body(backend: Backend, device: torch.device) -> Body:
    """The body for tensors on `device`; `auto` is Triton on a GPU (for torch AMD's are "cuda" too), cpu on a CPU.

    Raises ValueError for a backend that does not exist and for a device that `auto` has no body for.
    """
    if backend == "auto":
        body = _BODY_OF_DEVICE.get(device.type)
        if body is None:
            raise ValueError(f"no kernels for device {device}; pass backend='reference' for plain torch")
        return body
    if backend not in _NAMES:
        raise ValueError(f"backend {backend!r} is none of {', '.join(_NAMES)}")
    return backend


def empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor for kernels to write to, of the dtype and on the device of `like`."""
    if like.device.type != "cpu":
        return like.new_empty(shape)
    from quire.kernels.cpu_workers import new_tensor

    return new_tensor(shape, like.dtype)
