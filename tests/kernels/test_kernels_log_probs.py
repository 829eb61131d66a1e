"""Log probabilities: every body against float64, with the order of ties and row by row."""

from __future__ import annotations

import math

import pytest
import torch
from sampling_problems import between_canaries, random_logits

from quire.kernels.backend import Backend
from quire.kernels.log_probs import log_probs

CPU = torch.device("cpu")
BODIES = pytest.mark.parametrize("backend", ["cpu", "triton"])
TOLERANCE = 1e-6  # relative, and absolute near zero: the rounding of the result is 6e-8


def device_of(backend: Backend, triton_device: torch.device) -> torch.device:
    return triton_device if backend == "triton" else CPU


def tokens(num_rows: int, vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (num_rows,), generator=torch.Generator().manual_seed(9))


def check_equals_float64(logits: torch.Tensor, num_top: int, backend: Backend, device: torch.device) -> None:
    token_ids = tokens(*logits.shape)
    rows = between_canaries(logits, device)
    result = [part.cpu() for part in log_probs(rows, token_ids.to(device), num_top, backend=backend)]
    expected = log_probs(logits.double(), token_ids, num_top, backend="reference")
    assert torch.equal(rows.cpu(), logits)
    assert [part.dtype for part in result] == [torch.float32, torch.int64, torch.float32]
    assert torch.equal(result[1], expected[1])
    for part, exact in ((result[0], expected[0]), (result[2], expected[2])):
        torch.testing.assert_close(part.double(), exact, rtol=TOLERANCE, atol=TOLERANCE)


@BODIES
@pytest.mark.parametrize("num_top", [0, 1, 20, 64])
@pytest.mark.parametrize("vocab_size", [1, 33, 64, 1000, 5001])
def test_equals_float64(vocab_size: int, num_top: int, backend: Backend, triton_device: torch.device) -> None:
    logits = random_logits(4, vocab_size)
    logits[1] *= 30
    logits[2] = logits[2].bfloat16().float()
    check_equals_float64(logits, min(num_top, vocab_size), backend, device_of(backend, triton_device))


@BODIES
def test_ties_come_in_the_order_of_ids(backend: Backend, triton_device: torch.device) -> None:
    """More equal logits than fit beside the larger ones, masked tokens among the largest, zeros of both signs."""
    logits = torch.zeros(4, 3001)
    logits[0, 2990:] = 1.0
    logits[1, 3:] = -torch.inf
    logits[2, ::3] = -0.0
    logits[3] = random_logits(1, 3001)[0].round()
    check_equals_float64(logits, 64, backend, device_of(backend, triton_device))


def test_a_large_vocabulary_on_the_cpu() -> None:
    check_equals_float64(random_logits(5, 151_936), 20, "cpu", CPU)
    check_equals_float64(random_logits(5, 151_936).bfloat16().float(), 64, "cpu", CPU)


@BODIES
def test_a_row_does_not_depend_on_its_neighbours(backend: Backend, triton_device: torch.device) -> None:
    device = device_of(backend, triton_device)
    logits, token_ids = random_logits(7, 3001).to(device), tokens(7, 3001).to(device)
    together = log_probs(logits, token_ids, 5, backend=backend)
    for row in range(7):
        alone = log_probs(logits[row : row + 1].clone(), token_ids[row : row + 1], 5, backend=backend)
        for part, whole in zip(alone, together, strict=True):
            assert torch.equal(part[0], whole[row])


@BODIES
def test_bad_rows_are_not_hidden(backend: Backend, triton_device: torch.device) -> None:
    """NaN for them, ids in the vocabulary, and nothing for their neighbours."""
    device = device_of(backend, triton_device)
    logits = random_logits(6, 200)
    for row, poison in ((1, -math.inf), (3, math.inf), (5, math.nan)):
        logits[row] = poison
    result = [part.cpu() for part in log_probs(logits.to(device), tokens(6, 200).to(device), 6, backend=backend)]
    expected = log_probs(logits[::2], tokens(6, 200)[::2].contiguous(), 6, backend="reference")
    assert result[0][1::2].isnan().all()
    assert result[2][1::2].isnan().all()
    assert ((result[1] >= 0) & (result[1] < 200)).all()
    for part, right in zip(result, expected, strict=True):
        torch.testing.assert_close(part[::2], right, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_no_rows(backend: Backend, triton_device: torch.device) -> None:
    device = device_of(backend, triton_device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    result = log_probs(torch.zeros((0, 9), device=device), none, 3, backend=backend)
    assert [part.shape for part in result] == [(0,), (0, 3), (0, 3)]


def test_what_is_refused() -> None:
    logits, token_ids = torch.zeros(3, 40), torch.zeros(3, dtype=torch.int64)
    for wrong in (token_ids.int(), token_ids[:2], token_ids[:, None]):
        with pytest.raises(ValueError, match="token_ids"):
            log_probs(logits, wrong, 1)
    for num_top in (-1, 41):
        with pytest.raises(ValueError, match="num_top"):
            log_probs(logits, token_ids, num_top)
    with pytest.raises(ValueError, match="num_top"):
        log_probs(torch.zeros(3, 100), token_ids, 65)
