"""Rows to sample from, and the distribution that the definitions give them, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from quire.kernels.backend import Backend
from quire.kernels.sample import sample

Run = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Options:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


ALL_OPTIONS = [
    Options(),
    Options(temperature=0.0, top_k=3, top_p=0.5),
    Options(temperature=0.01),
    Options(temperature=2.0),
    Options(top_k=1),
    Options(top_k=7),
    Options(top_k=45),
    Options(top_k=2500),
    Options(top_k=10**6),
    Options(top_p=1e-6),
    Options(top_p=0.05),
    Options(top_p=0.9),
    Options(top_p=float(np.nextafter(np.float32(1), np.float32(0)))),
    Options(min_p=0.1),
    Options(min_p=1.0),
    Options(temperature=0.8, top_k=20, top_p=0.8),
    Options(temperature=2.0, top_k=2500, top_p=0.95),
    Options(temperature=0.7, top_p=0.8, min_p=0.2),
    Options(temperature=1.5, top_k=10**6, top_p=0.9),
    Options(temperature=1.5, top_k=30, min_p=0.05),
    Options(temperature=1.5, top_k=30, top_p=0.95, min_p=0.05),
]


def tensors(options: list[Options], device: torch.device) -> tuple[torch.Tensor, ...]:
    """(temperature, top_k, top_p, min_p) of the rows."""

    def floats(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return (
        floats([o.temperature for o in options]),
        torch.tensor([o.top_k for o in options], device=device),
        floats([o.top_p for o in options]),
        floats([o.min_p for o in options]),
    )


def random_logits(num_rows: int, vocab_size: int, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn((num_rows, vocab_size), generator=torch.Generator().manual_seed(seed)) * spread


def uniform_numbers(num_rows: int, seed: int = 0) -> torch.Tensor:
    """With 40 bits, as the engine's."""
    bits = torch.randint(2**40, (num_rows,), generator=torch.Generator().manual_seed(seed))
    return (bits.double() + 0.5) * 2.0**-40


def between_canaries(logits: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same rows, with infinity on both sides: whoever reads it knows of a larger logit."""
    num_rows, vocab_size = logits.shape
    wide = torch.full((num_rows, vocab_size + 21), torch.inf, device=device)
    wide[:, 9 : 9 + vocab_size] = logits
    return wide[:, 9 : 9 + vocab_size]


def check_equals_reference(
    logits: torch.Tensor, options: list[Options], backend: Backend, device: torch.device, seed: int = 0
) -> torch.Tensor:
    """Draws of all rows, which must be those of the reference; the logits must stay as they are."""
    numbers = uniform_numbers(len(options), seed)
    expected = sample(logits, *tensors(options, torch.device("cpu")), numbers, backend="reference")
    rows = between_canaries(logits, device)
    result = sample(rows, *tensors(options, device), numbers.to(device), backend=backend).cpu()
    assert torch.equal(rows.cpu(), logits)
    different = (result != expected).nonzero().flatten().tolist()
    assert not different, [(options[row], result[row].item(), expected[row].item()) for row in different]
    return result


def distribution(logits: npt.NDArray[np.float32], options: Options) -> npt.NDArray[np.float64]:
    """From the definitions; the options are what float32 makes of them."""
    if options.temperature == 0.0:
        return np.eye(len(logits))[logits.argmax()]
    scaled = (logits / np.float32(options.temperature)).astype(np.float64)
    kept = np.ones_like(scaled, dtype=bool)

    def probabilities() -> npt.NDArray[np.float64]:
        exponentials = np.where(kept, np.exp(scaled - scaled.max()), 0.0)
        return exponentials / exponentials.sum()

    if options.top_k:
        kept &= scaled >= np.sort(scaled)[-min(options.top_k, len(scaled))]
    if options.top_p < 1.0:
        p = probabilities()
        descending = np.sort(p)[::-1]
        before = np.cumsum(descending) - descending
        kept &= p >= descending[before < np.float64(np.float32(options.top_p))].min()
    if options.min_p:
        p = probabilities()
        kept &= p >= options.min_p * p.max()
    return probabilities()


def check_strata(logits: torch.Tensor, options: Options, num_draws: int, run: Run, device: torch.device) -> None:
    """Numbers at equal distances: each token must come up within one of its share, and no forbidden one at all."""
    numbers = (torch.arange(num_draws, dtype=torch.float64, device=device) + 0.5) / num_draws
    rows = logits.to(device).expand(num_draws, -1)
    token_ids = run(rows, *tensors([options] * num_draws, device), numbers).cpu()
    expected = distribution(logits.numpy(), options) * num_draws
    observed = np.bincount(token_ids.numpy(), minlength=len(logits))
    assert not observed[expected == 0].any()
    assert np.abs(observed - expected).max() <= 1 + 1e-6
