"""Where the Triton kernels of these tests run: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import triton_interpreter


@pytest.fixture(scope="module")
def kernel_device() -> Iterator[torch.device]:
    """The device that backend="triton" works on, in this module only: no other test sees interpreted kernels."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
    else:
        with triton_interpreter.interpreted_kernels():
            yield torch.device("cpu")


@pytest.fixture
def triton_device(kernel_device: torch.device) -> Iterator[torch.device]:
    """As kernel_device, with bfloat16 arithmetic that can be trusted, and every new tensor filled with NaN."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with ExitStack() as stack:
        if kernel_device.type == "cpu":
            stack.enter_context(triton_interpreter.bfloat16_arithmetic())
            stack.enter_context(np.errstate(all="ignore"))
        yield kernel_device
    torch.use_deterministic_algorithms(was_deterministic)
