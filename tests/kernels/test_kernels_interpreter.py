"""The correction of Triton's interpreter: bfloat16 is wrong without it, right with it, and rounds as on a GPU."""

from __future__ import annotations

import numpy as np
import paged_problems
import pytest
import torch
import triton.language as tl
import triton_interpreter

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are not interpreted")

SHAPE = paged_problems.Shape(query_lens=(1, 1), seq_lens=(37, 16), head_dim=32)


def test_uncorrected_interpreter_is_wrong_in_bfloat16(kernel_device: torch.device) -> None:
    """Should this fail one day, Triton has mended its interpreter and the correction can go."""
    problem = paged_problems.make_problem(SHAPE, torch.bfloat16, kernel_device)
    with np.errstate(all="ignore"):
        result = paged_problems.run_decode(problem, backend="triton")
    expected = paged_problems.run_decode(problem.to(torch.float64), backend="reference")
    error = (result.double() - expected).abs().nan_to_num(nan=float("inf")).max().item()
    assert error > 0.5, "the interpreter multiplies bfloat16 rightly by itself"


def test_corrected_interpreter_is_right_in_bfloat16(triton_device: torch.device) -> None:
    problem = paged_problems.make_problem(SHAPE, torch.bfloat16, triton_device)
    paged_problems.check(paged_problems.run_decode, problem)


def elementwise_kernel(a: tl.tensor, b: tl.tensor, out: tl.tensor, less: tl.tensor, N: tl.constexpr) -> None:
    index = tl.arange(0, N)
    x = tl.load(a + index)
    y = tl.load(b + index)
    tl.store(out + index, x * y + x)
    tl.store(less + index, x < y)


def round_kernel(source: tl.tensor, out: tl.tensor, N: tl.constexpr) -> None:
    index = tl.arange(0, N)
    tl.store(out + index, tl.load(source + index).to(tl.bfloat16))


def test_operators_round_once_each(triton_device: torch.device) -> None:
    a = torch.randn(256, generator=torch.Generator().manual_seed(1)).bfloat16()
    b = torch.randn(256, generator=torch.Generator().manual_seed(2)).bfloat16()
    out, less = torch.empty_like(a), torch.empty(256, dtype=torch.int8)
    triton_interpreter.jit(elementwise_kernel)[(1,)](a, b, out, less, N=256)
    assert torch.equal(out, a * b + a)
    assert torch.equal(less.bool(), a < b)


def test_cast_rounds_to_nearest_even(triton_device: torch.device) -> None:
    values = torch.cat([torch.randn(1020), torch.tensor([1.00390625, 1.01171875, float("inf"), float("nan")])])
    out = torch.empty(1024, dtype=torch.bfloat16)
    triton_interpreter.jit(round_kernel)[(1,)](values, out, N=1024)
    assert torch.equal(out[:-1], values[:-1].bfloat16())
    assert out[-1].isnan()
