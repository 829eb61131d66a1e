"""Token bitmasks: every body bit for bit, between canaries."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.backend import Backend
from quire.kernels.token_bitmask import apply_token_bitmask

CPU = torch.device("cpu")
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])


def device_of(backend: Backend, triton_device: torch.device) -> torch.device:
    return triton_device if backend == "triton" else CPU


def words(num_rows: int, num_words: int) -> torch.Tensor:
    """Random words; the first row also has words of all bits, of none and with the sign bit alone."""
    generator = torch.Generator().manual_seed(0)
    bitmask = torch.randint(-(2**31), 2**31, (num_rows, num_words), generator=generator).int()
    for place, word in enumerate((-1, 0, -(2**31))[:num_words]):
        bitmask[0, place] = word
    return bitmask


def is_allowed(bitmask: torch.Tensor, row: int, token_id: int) -> bool:
    word = token_id // 32
    return word < bitmask.shape[1] and (bitmask[row, word].item() >> (token_id % 32)) & 1 == 1


@BACKENDS
@pytest.mark.parametrize("rows_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("vocab_size", "num_words"),
    [(1, 1), (31, 1), (32, 1), (33, 2), (50, 2), (1000, 32), (5001, 157), (300, 3), (70, 9)],
)
def test_forbidden_tokens_and_no_others(
    vocab_size: int, num_words: int, rows_dtype: torch.dtype, backend: Backend, triton_device: torch.device
) -> None:
    """Everything else keeps its bits: canaries, rows that are not named, and NaN with a payload."""
    device = device_of(backend, triton_device)
    bitmask = words(3, num_words)
    wide = torch.randn((5, vocab_size + 11), generator=torch.Generator().manual_seed(1))
    wide.view(torch.int32)[:, ::7] = 0x7FA5A5A5
    expected = wide.clone()
    for entry, row in enumerate((4, 0, 2)):
        for token_id in range(vocab_size):
            if not is_allowed(bitmask, entry, token_id):
                expected[row, 5 + token_id] = -torch.inf
    result = wide.to(device)
    rows = torch.tensor([4, 0, 2], dtype=rows_dtype, device=device)
    apply_token_bitmask(result[:, 5 : 5 + vocab_size], bitmask.to(device), rows, backend=backend)
    assert torch.equal(result.cpu().view(torch.int32), expected.view(torch.int32))


@BACKENDS
def test_a_row_named_twice_keeps_what_both_allow(backend: Backend, triton_device: torch.device) -> None:
    device = device_of(backend, triton_device)
    logits = torch.zeros((1, 64), device=device)
    bitmask = torch.tensor([[0b1100, -1], [0b0110, 1]], dtype=torch.int32, device=device)
    apply_token_bitmask(logits, bitmask, torch.tensor([0, 0], device=device), backend=backend)
    assert logits[0].isfinite().nonzero().flatten().tolist() == [2, 32]


@BACKENDS
def test_no_rows(backend: Backend, triton_device: torch.device) -> None:
    device = device_of(backend, triton_device)
    logits = torch.zeros((2, 40), device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    apply_token_bitmask(logits, torch.zeros((0, 2), dtype=torch.int32, device=device), none, backend=backend)
    assert (logits == 0).all()


def test_a_large_vocabulary_on_the_cpu() -> None:
    logits = torch.randn((4, 151_936), generator=torch.Generator().manual_seed(2))
    expected, bitmask, rows = logits.clone(), words(3, 4748), torch.tensor([3, 1, 0])
    apply_token_bitmask(expected, bitmask, rows, backend="reference")
    apply_token_bitmask(logits, bitmask, rows, backend="cpu")
    assert torch.equal(logits, expected)


def test_what_is_refused() -> None:
    logits, bitmask, rows = torch.zeros(3, 40), torch.zeros((2, 2), dtype=torch.int32), torch.tensor([0, 2])
    for wrong_logits in (logits.half(), logits.T, logits[0]):
        with pytest.raises(ValueError, match="logits"):
            apply_token_bitmask(wrong_logits, bitmask, rows)
    for wrong_bitmask in (bitmask.long(), bitmask[0], bitmask.T):
        with pytest.raises(ValueError, match="bitmask"):
            apply_token_bitmask(logits, wrong_bitmask, rows)
    for wrong_rows in (rows.float(), rows[:1], torch.arange(4)[::2]):
        with pytest.raises(ValueError, match="rows"):
            apply_token_bitmask(logits, bitmask, wrong_rows)
