"""Activation and gate in one pass, against float64."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
import triton_interpreter

from quire.kernels.gated_activation import gated_activation
from quire.kernels.linear import Activation

ACTIVATIONS: list[Activation | None] = [None, *get_args(Activation)]


def check(shape: tuple[int, int], activation: Activation | None, dtype: torch.dtype, device: torch.device) -> None:
    """One rounding to the dtype; float32 may be off by 8 units and by one of what cancels near a zero of f."""
    x = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype).to(device)
    result = gated_activation(x, activation, backend="triton")
    assert result.shape == (shape[0], shape[1] // 2)
    assert result.is_contiguous()
    unit = torch.finfo(dtype).eps
    tolerance = 8 * unit if dtype == torch.float32 else unit / 2 * 1.01
    expected = gated_activation(x.double(), activation, backend="reference")
    smallest = 1e-6 if dtype == torch.bfloat16 else 4e-6
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=smallest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 2), (5, 34), (3, 2050), (2, 4096)], ids=str)
def test_equals_float64(
    shape: tuple[int, int], activation: Activation | None, dtype: torch.dtype, triton_device: torch.device
) -> None:
    check(shape, activation, dtype, triton_device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes_are_torchs(activation: Activation | None, triton_device: torch.device) -> None:
    """Nothing overflows on the way, and NaN stays what it is."""
    gate = torch.tensor([-1e30, -88.0, -1e-30, -0.0, 0.0, 1e-30, 88.0, 1e30, float("nan")])
    x = torch.cat([gate, torch.ones_like(gate)])[None].to(triton_device)
    expected = gated_activation(x, activation, backend="reference")
    torch.testing.assert_close(
        gated_activation(x, activation, backend="triton"), expected, equal_nan=True, rtol=1e-6, atol=1e-30
    )


def test_rows_of_any_stride_and_none(triton_device: torch.device) -> None:
    x = torch.randn(5, 50, device=triton_device)
    expected = gated_activation(x[::2, 8:40].contiguous(), "silu", backend="triton")
    assert torch.equal(gated_activation(x[::2, 8:40], "silu", backend="triton"), expected)
    assert gated_activation(x[:0], "silu", backend="triton").shape == (0, 25)


@pytest.mark.parametrize(
    "fault",
    [("row + NUM_FEATURES", "row + NUM_FEATURES - 1"), ("mask = feature < NUM_FEATURES", "mask = feature < 16")],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the variants are interpreted")
def test_faults_are_caught(
    fault: tuple[str, str], triton_device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = triton_interpreter.load_variant("gated_activation", tmp_path, [fault])
    monkeypatch.setattr("quire.kernels.gated_activation.triton.gated_activation", variant.gated_activation)
    with pytest.raises(AssertionError):
        check((3, 34), "silu", torch.float32, triton_device)


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="2 \\* N"):
        gated_activation(torch.zeros(2, 3), "silu")
    with pytest.raises(ValueError, match="int32"):
        gated_activation(torch.zeros(2, 4, dtype=torch.int32), "silu")
