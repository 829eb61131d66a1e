"""From numbers of the host to tensors of the device, without waiting for it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def to_device(values: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """`values` on `device`: on a CPU the same memory, on a GPU a copy that is in order with the work behind it.

    A copy from pageable memory has the host wait for the GPU. torch keeps the pinned memory until the copy is done.
    """
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
