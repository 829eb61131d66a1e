"""The argmax of rows of logits against plain torch: ties, masks, and what cannot be trusted."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import triton_interpreter

from quire.kernels.argmax import argmax
from quire.kernels.backend import Backend

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "triton"])


def awkward_logits(num_rows: int, vocab_size: int) -> torch.Tensor:
    """Ties within a row, zeros of both signs, masks, and rows with NaN or infinity at the ends and in between."""
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    logits = (logits * 4).round() / 4
    poison = [math.nan, math.inf, -math.nan, -math.inf, None, "zeros", "masked"]
    for row in range(num_rows):
        match poison[row % len(poison)]:
            case float(value) if value == -math.inf:
                logits[row] = value
            case float(value):
                logits[row, (row * 7919) % vocab_size] = value
            case "zeros":
                logits[row] = -logits[row].abs() - 1
                logits[row, vocab_size // 2 :: 3] = -0.0
                logits[row, vocab_size // 2 + 1 :: 3] = 0.0
            case "masked":
                logits[row, : vocab_size - 1] = -math.inf
            case None:
                logits[row, [vocab_size // 3, vocab_size - 1]] = 99.0
    return logits


@BACKENDS
@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 3001, 20_000])
def test_equals_plain_torch(vocab_size: int, backend: Backend, triton_device: torch.device) -> None:
    logits = awkward_logits(14, vocab_size)
    device = triton_device if backend == "triton" else torch.device("cpu")
    found = argmax(logits.to(device), backend=backend).cpu()
    assert torch.equal(found, argmax(logits, backend="reference"))
    assert (found[0], found[1], found[2], found[3]) == (-1, -1, -1, -1)


@pytest.mark.parametrize("num_parts", [1, 2, 8, 64])
@pytest.mark.parametrize("vocab_size", [1, 130, 1000])
def test_parts_of_a_row(
    num_parts: int, vocab_size: int, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More parts than a row has blocks, too: some find nothing."""
    import quire.kernels.argmax.triton  # noqa: F401

    module = sys.modules["quire.kernels.argmax.triton"]
    monkeypatch.setattr(module, "BLOCK", 32)
    monkeypatch.setattr(module, "number_of_parts", lambda *_: num_parts)
    logits = awkward_logits(7, vocab_size).to(triton_device)
    expected = argmax(logits.cpu(), backend="reference")
    assert torch.equal(argmax(logits, backend="triton").cpu(), expected)


def test_number_of_parts_fills_a_gpu(triton_device: torch.device) -> None:
    from quire.kernels.argmax.triton import BLOCK, number_of_parts

    assert number_of_parts(1, 151_936, 132) == 32
    assert number_of_parts(8, 151_936, 132) == 32
    assert number_of_parts(64, 151_936, 132) == 4
    assert number_of_parts(256, 151_936, 132) == 1
    assert number_of_parts(1, BLOCK - 1, 132) == 1


def test_rows_of_any_stride_and_none(triton_device: torch.device) -> None:
    logits = awkward_logits(9, 500).to(triton_device)
    expected = argmax(logits[::2, 100:].contiguous(), backend="reference")
    assert torch.equal(argmax(logits[::2, 100:], backend="triton"), expected)
    assert argmax(logits[:0], backend="triton").shape == (0,)


@pytest.mark.parametrize(
    "fault",
    [
        ("tl.where(values == 0.0, 0.0, values)", "values"),
        ("tl.where(values == values, order_key(values), 0x7FFFFFFF)", "order_key(values)"),
        ("(0x7FFFFFFF - place)", "place"),
        ("key < 0x7F800000", "key < 0x7F800001"),
        ("key > -0x7F800001", "key > -0x7F800002"),
        ("(part + 1) * part_size", "(part + 1) * part_size - BLOCK"),
    ],
    ids=str,
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the variants are interpreted")
def test_faults_are_caught(fault: tuple[str, str], triton_device: torch.device, tmp_path: Path) -> None:
    variant = triton_interpreter.load_variant("argmax", tmp_path, [fault])
    logits = awkward_logits(7, 9000)
    expected = argmax(logits, backend="reference")
    assert torch.equal(argmax(logits, backend="triton"), expected)
    assert not torch.equal(variant.argmax(logits), expected)


def test_refuses_what_it_cannot_do() -> None:
    for bad in (torch.zeros(3, 0), torch.zeros(9, 3).T, torch.zeros(3, 9).bfloat16()):
        with pytest.raises(ValueError, match="logits must be"):
            argmax(bad)
