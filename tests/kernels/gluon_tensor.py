"""Values in registers, as gluon_interpreter.py computes with them: in float32 or int64, each with its type on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl

INTEGERS = (tl.int32, tl.int64)
TORCH_TYPES = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32, tl.int32: torch.int32}
TYPES = {kind: name for name, kind in TORCH_TYPES.items()}


class Tensor:
    """A value in registers: numbers of `dtype`, held in float32 or int64, or addresses in `base`."""

    def __init__(self, data: Any, dtype: Any, base: np.ndarray | None = None, layout: Any = None) -> None:
        self.data = np.asarray(data)
        self.dtype, self.base = dtype, base
        self.type = SimpleNamespace(layout=layout)
        if base is None and dtype == tl.int32 and np.any(np.abs(self.data) >= 2**31):
            raise OverflowError("an int32 overflows")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def combined(self, other: Any, compute: Callable[[Any, Any], Any]) -> Tensor:
        if not isinstance(other, Tensor | bool | int | float):
            raise TypeError(f"{other} is no value, or not yet")
        theirs = other.data if isinstance(other, Tensor) else np.asarray(other)
        if self.base is not None or (isinstance(other, Tensor) and other.base is not None):
            owner = self if self.base is not None else other
            return Tensor(compute(self.data, theirs), owner.dtype, owner.base)
        dtype = self.dtype
        if isinstance(other, Tensor) and other.dtype != dtype:
            dtype = tl.int64 if {dtype, other.dtype} == {*INTEGERS} else tl.float32
        elif theirs.dtype.kind == "f" and dtype in INTEGERS:
            dtype = tl.float32
        result = compute(self.data, theirs)
        if result.dtype == np.bool_:
            dtype = tl.int1
        elif dtype == tl.float32:
            result = result.astype(np.float32)
        return Tensor(result, dtype)

    def __add__(self, other: Any) -> Tensor:
        return self.combined(other, np.add)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Tensor:
        return self.combined(other, np.subtract)

    def __rsub__(self, other: Any) -> Tensor:
        return self.combined(other, lambda a, b: b - a)

    def __mul__(self, other: Any) -> Tensor:
        return self.combined(other, np.multiply)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Tensor:
        return self.combined(other, np.true_divide)

    def __floordiv__(self, other: Any) -> Tensor:
        return self._rounding_down(other, np.floor_divide)

    def __mod__(self, other: Any) -> Tensor:
        return self._rounding_down(other, np.mod)

    def _rounding_down(self, other: Any, compute: Callable[[Any, Any], Any]) -> Tensor:
        if np.any(self.data < 0):
            raise ArithmeticError("GPUs round quotients of negative numbers up, Python rounds them down")
        return self.combined(other, compute)

    def __and__(self, other: Any) -> Tensor:
        return self.combined(other, np.bitwise_and)

    def __xor__(self, other: Any) -> Tensor:
        return self.combined(other, np.bitwise_xor)

    def __lt__(self, other: Any) -> Tensor:
        return self.combined(other, np.less)

    def __le__(self, other: Any) -> Tensor:
        return self.combined(other, np.less_equal)

    def __gt__(self, other: Any) -> Tensor:
        return self.combined(other, np.greater)

    def __ge__(self, other: Any) -> Tensor:
        return self.combined(other, np.greater_equal)

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor(self.data[index], self.dtype, self.base)

    def __index__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)

    def to(self, dtype: Any) -> Tensor:
        if dtype in INTEGERS:
            return Tensor(self.data.astype(np.int64), dtype)
        return Tensor(rounded(self.data, dtype), dtype)


def rounded(data: np.ndarray, dtype: Any) -> np.ndarray:
    """To the nearest number of a floating-point type, as float32."""
    return torch.from_numpy(np.array(data, dtype=np.float32)).to(TORCH_TYPES[dtype]).float().numpy()


def tensor_of(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return Tensor(value, tl.float32 if isinstance(value, float) else tl.int32)
