"""Memory of the page pool: zeros, aligned, and none of it taken before it is written."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import pytest
import torch

from quire.config import ConfigError
from quire.engine.zeroed_memory import zeroed

CPU = torch.device("cpu")
LARGE = 512 * 2**20
SLACK = 32 * 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_is_zero_aligned_and_writable(dtype: torch.dtype) -> None:
    tensor = zeroed((2, 3, 5), dtype, CPU)
    assert tensor.shape == (2, 3, 5)
    assert tensor.dtype == dtype
    assert tensor.data_ptr() % mmap.PAGESIZE == 0
    assert not tensor.any()
    tensor[1] = 1
    assert tensor.sum() == 15


def test_takes_no_memory_until_it_is_written_and_gives_it_back() -> None:
    before = resident_bytes()
    tensor = zeroed((LARGE,), torch.int8, CPU)
    assert resident_bytes() - before < SLACK
    tensor[: LARGE // 4] = 1
    assert resident_bytes() - before > LARGE // 4 - SLACK
    del tensor
    gc.collect()
    assert resident_bytes() - before < SLACK


def test_the_measure_sees_what_torch_takes() -> None:
    """The fault that the test above is there to find."""
    before = resident_bytes()
    tensor = torch.zeros(LARGE, dtype=torch.int8)
    assert resident_bytes() - before > LARGE - SLACK
    del tensor


def test_memory_that_the_system_refuses_is_one_line() -> None:
    with pytest.raises(ConfigError, match="Lower --kv-cache-memory-bytes"):
        zeroed((2**60,), torch.int8, CPU)
