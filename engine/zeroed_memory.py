"""Large tensors of zeros that cost nothing until they are written."""

from __future__ import annotations

import math
import mmap

import torch

from quire.config import ConfigError


def zeroed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As torch.zeros; on the host the system commits a page when it is first written, and its start is page-aligned.

    torch.zeros writes every byte: for a pool of pages that is seconds, and memory that no request has asked for.

    Raises:
        ConfigError: the system does not promise so much memory.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        # Private: a shared anonymous mapping would be a file in shared memory, which containers bound more tightly.
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ConfigError(
            f"The system does not hand out {num_bytes} bytes for the KV-cache: {error.strerror}. "
            "Lower --kv-cache-memory-bytes."
        ) from error
    return torch.frombuffer(memory, dtype=dtype).view(shape)  # the tensor keeps the mapping
