"""Some rows of a matrix on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quire.kernels.cpu_elements import int64_pointer, move, pointer_to, take
from quire.kernels.cpu_workers import Worker, new_tensor

# A call's parameters: their places in the int64 array that its threads share. Strides are in elements.
TICKET, X, X_STRIDE, INDICES, NUM_INDICES, DIM, OUT = range(7)


def _copy(shared: Any) -> None:
    parameters = int64_pointer(shared)
    indices, dim = int64_pointer(parameters[INDICES]), parameters[DIM]
    x, out = pointer_to(parameters[X], shared), pointer_to(parameters[OUT], shared)
    row = take(parameters)
    while row < parameters[NUM_INDICES]:
        source, target = move(x, indices[row] * parameters[X_STRIDE]), move(out, row * dim)
        for i in range(dim):
            target[i] = source[i]
        row = take(parameters)


WORKER = Worker(_copy)


def take_rows(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    out = new_tensor((len(indices), x.shape[1]), x.dtype)
    fields = [0, x.data_ptr(), x.stride(0), indices.data_ptr(), len(indices), x.shape[1], out.data_ptr()]
    WORKER.run(x.dtype, np.array(fields, np.int64), 1)
    return out
