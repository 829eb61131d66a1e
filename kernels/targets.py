"""The GPUs the Triton kernels are planned for: what a launch needs to know of the device, without asking it twice."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class Target:
    """One GPU architecture.

    `arch` is the compute capability times ten, or AMD's gfx name. `shared_memory` is the most bytes one program may
    use; Triton does not check it when it compiles ahead of time.
    """

    vendor: Literal["cuda", "hip"]
    arch: int | str
    shared_memory: int
    num_multiprocessors: int

    @property
    def warp_size(self) -> int:
        return 32 if self.vendor == "cuda" else 64

    @property
    def fp8(self) -> torch.dtype | None:
        """The e4m3 that its instructions convert, None if there are none."""
        if isinstance(self.arch, int):
            return torch.float8_e4m3fn if self.arch >= 89 else None
        return torch.float8_e4m3fnuz if self.arch == "gfx942" else None


A100 = Target("cuda", 80, 166_912, 108)
H100 = Target("cuda", 90, 232_448, 132)
B200 = Target("cuda", 100, 232_448, 148)
MI300 = Target("hip", "gfx942", 65_536, 304)

_SHARED_MEMORY_OF_CAPABILITY = {80: 166_912, 87: 166_912, 90: 232_448, 100: 232_448, 103: 232_448}
_SMALLEST_SHARED_MEMORY = {"cuda": 101_376, "hip": 65_536}


def current_target(device: torch.device) -> Target:
    """The target that `device` is. A CPU stands for an A100: only Triton's interpreter runs the kernels there."""
    return _gpu_target(device.index) if device.type == "cuda" else A100


@cache
def _gpu_target(index: int | None) -> Target:
    properties = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    num_multiprocessors = properties.multi_processor_count
    if torch.version.hip is not None:
        arch = properties.gcnArchName.split(":")[0]
        return Target("hip", arch, _SMALLEST_SHARED_MEMORY["hip"], num_multiprocessors)
    capability = properties.major * 10 + properties.minor
    shared_memory = _SHARED_MEMORY_OF_CAPABILITY.get(capability, _SMALLEST_SHARED_MEMORY["cuda"])
    return Target("cuda", capability, shared_memory, num_multiprocessors)
