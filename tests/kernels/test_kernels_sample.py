"""Sampling: every body against the reference and against the definitions in float64."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import sampling_problems as problems
import torch
from sampling_problems import ALL_OPTIONS, Options, check_equals_reference, check_strata, random_logits, tensors

from quire.kernels.sample import sample

CPU = torch.device("cpu")
SPREADS = pytest.mark.parametrize("spread", [0.3, 3.0])


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every new tensor is filled with NaN, and several threads share the rows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@SPREADS
@pytest.mark.parametrize("vocab_size", [1, 2, 50, 1000, 3001])
def test_triton_equals_reference(vocab_size: int, spread: float, triton_device: torch.device) -> None:
    logits = random_logits(len(ALL_OPTIONS), vocab_size, spread)
    check_equals_reference(logits, ALL_OPTIONS, "triton", triton_device)


@SPREADS
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("vocab_size", [1, 2, 50, 63, 64, 65, 1000, 3001, 32_003])
def test_cpu_equals_reference(vocab_size: int, spread: float) -> None:
    rows = ALL_OPTIONS * (4 if vocab_size < 32_000 else 1)
    check_equals_reference(random_logits(len(rows), vocab_size, spread), rows, "cpu", CPU)


@pytest.mark.usefixtures("poisoned")
def test_cpu_with_a_large_vocabulary() -> None:
    rows = [*ALL_OPTIONS, Options(top_k=100_000), Options(temperature=0.6, top_k=20, top_p=0.95), Options(top_k=2374)]
    check_equals_reference(random_logits(len(rows), 151_936, 2.5), rows, "cpu", CPU)


@SPREADS
def test_ties_all_stay_in_triton(spread: float, triton_device: torch.device) -> None:
    logits = random_logits(len(ALL_OPTIONS), 3001, spread).bfloat16().float()
    check_equals_reference(logits, ALL_OPTIONS, "triton", triton_device)


@SPREADS
@pytest.mark.usefixtures("poisoned")
def test_ties_all_stay_on_the_cpu(spread: float) -> None:
    rows = ALL_OPTIONS * 5
    check_equals_reference(random_logits(len(rows), 3001, spread).bfloat16().float(), rows, "cpu", CPU)
    check_equals_reference(torch.full((len(rows), 3001), 0.25), rows, "cpu", CPU)


def test_a_row_with_more_candidates_than_fit(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller tiles and less room: many tiles, and rows that are searched where they lie."""
    import quire.kernels.sample.triton  # noqa: F401

    module = sys.modules["quire.kernels.sample.triton"]
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(module, "CAPACITY", 60)
    check_equals_reference(random_logits(len(ALL_OPTIONS), 333, 0.3), ALL_OPTIONS, "triton", triton_device)
    logits = random_logits(len(ALL_OPTIONS), 333, 3.0).bfloat16().float()
    check_equals_reference(logits, ALL_OPTIONS, "triton", triton_device)


def masked(num_rows: int, vocab_size: int) -> torch.Tensor:
    """Most tokens are masked, in one row all but one; a few logits are far below the others, and some are -0."""
    logits = random_logits(num_rows, vocab_size)
    logits[:, : vocab_size // 3] = -torch.inf
    logits[:, ::2] = -torch.inf
    logits[:, 1::10] = -1e9
    logits[:, 5::14] = -0.0
    logits[:, 7::14] = 0.0
    logits[0] = -torch.inf
    logits[0, vocab_size // 2] = -3e38
    return logits


def test_masked_tokens_in_triton(triton_device: torch.device) -> None:
    check_equals_reference(masked(len(ALL_OPTIONS), 1000), ALL_OPTIONS, "triton", triton_device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("vocab_size", [50, 1000])
def test_masked_tokens_on_the_cpu(vocab_size: int) -> None:
    rows = ALL_OPTIONS * 3
    check_equals_reference(masked(len(rows), vocab_size), rows, "cpu", CPU)


def check_bad_rows(backend: problems.Backend, device: torch.device) -> None:
    """Rows of nothing but minus infinity, with plus infinity or NaN end with some id and spoil no other row."""
    vocab_size, options = 150, ALL_OPTIONS
    logits = random_logits(len(options), vocab_size)
    numbers = problems.uniform_numbers(len(options)).to(device)
    arguments = (*tensors(options, device), numbers)
    expected = sample(logits.to(device), *arguments, backend=backend).cpu()
    bad = torch.arange(len(options)) % 2 == 0
    for poison in (-math.inf, math.inf, math.nan):
        spoiled = logits.clone()
        spoiled[bad] = poison
        result = sample(spoiled.to(device), *arguments, backend=backend).cpu()
        assert ((result >= 0) & (result < vocab_size)).all()
        assert torch.equal(result[~bad], expected[~bad])
    logits[:, 17] = math.nan
    logits[:, 30] = 50.0
    result = sample(logits.to(device), *arguments, backend=backend).cpu()
    assert ((result >= 0) & (result < vocab_size) & (result != 17)).all()


def test_bad_rows_in_triton(triton_device: torch.device) -> None:
    check_bad_rows("triton", triton_device)


@pytest.mark.usefixtures("poisoned")
def test_bad_rows_on_the_cpu() -> None:
    check_bad_rows("cpu", CPU)


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_distribution_is_exact(backend: problems.Backend, options: Options) -> None:
    check_strata(random_logits(1, 50, 2.0)[0], options, 4000, partial(sample, backend=backend), CPU)


@pytest.mark.parametrize("options", ALL_OPTIONS[6::4], ids=str)
def test_distribution_is_exact_in_triton(options: Options, triton_device: torch.device) -> None:
    check_strata(random_logits(1, 50, 2.0)[0], options, 25, partial(sample, backend="triton"), triton_device)


@pytest.mark.parametrize(
    "options",
    [Options(), Options(top_k=20), Options(top_p=0.8), Options(min_p=0.1), Options(0.8, 20, 0.8, 0.02)],
    ids=str,
)
def test_distribution_by_chi_square(options: Options) -> None:
    num_draws = 40_000
    logits = random_logits(1, 50, 2.0)
    numbers = problems.uniform_numbers(num_draws, seed=3)
    arguments = tensors([options] * num_draws, CPU)
    token_ids = sample(logits.expand(num_draws, -1), *arguments, numbers, backend="cpu")
    expected = problems.distribution(logits[0].numpy(), options) * num_draws
    observed = np.bincount(token_ids.numpy(), minlength=50)
    assert not observed[expected == 0].any()
    common = expected >= 5
    statistic = ((observed[common] - expected[common]) ** 2 / expected[common]).sum()
    degrees = int(common.sum())
    z = 3.719  # 99.99 % by Wilson and Hilferty's approximation
    assert statistic < degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


@pytest.mark.usefixtures("poisoned")
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    options = ALL_OPTIONS * 6
    logits = random_logits(len(options), 2000).bfloat16().float()
    numbers = problems.uniform_numbers(len(options))
    arguments = (logits, *tensors(options, CPU), numbers)
    together = sample(*arguments, backend="cpu")
    for row in range(len(options)):
        alone = sample(*(argument[row : row + 1] for argument in arguments), backend="cpu")
        assert alone.item() == together[row].item(), options[row]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_the_ends_of_the_interval_draw_real_tokens(backend: problems.Backend, triton_device: torch.device) -> None:
    device = triton_device if backend == "triton" else CPU
    logits = torch.full((2, 300), -torch.inf, device=device)
    logits[:, 70:200] = torch.linspace(-3, 3, 130)
    numbers = torch.tensor([2.0**-41, 1 - 2.0**-41], dtype=torch.float64, device=device)
    result = sample(logits, *tensors([Options()] * 2, device), numbers, backend=backend)
    assert result.tolist() == [70, 199]


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_temperature_0_takes_the_first_of_the_largest(backend: problems.Backend, triton_device: torch.device) -> None:
    device = triton_device if backend == "triton" else CPU
    logits = random_logits(4, 3001).to(device)
    for row, places in enumerate(([0, 3000], [2047, 2048], [64, 65, 70], [63, 64])):
        logits[row, places] = 20.0
    numbers = torch.full((4,), 0.999, dtype=torch.float64, device=device)
    result = sample(logits, *tensors([Options(0.0, 5, 0.3, 0.1)] * 4, device), numbers, backend=backend)
    assert result.tolist() == [0, 2047, 64, 63]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_both_integer_types_and_no_rows(
    backend: problems.Backend, dtype: torch.dtype, triton_device: torch.device
) -> None:
    device = triton_device if backend == "triton" else CPU
    temperature, top_k, top_p, min_p = tensors([Options(top_k=2)] * 4, device)
    numbers = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64, device=device)
    arguments = (torch.arange(9.0, device=device).expand(4, 9), temperature, top_k.to(dtype), top_p, min_p, numbers)
    assert sample(*arguments, backend=backend).tolist() == [7, 8, 8, 8]
    assert sample(*(argument[:0] for argument in arguments), backend=backend).shape == (0,)


def test_what_is_refused() -> None:
    arguments = [torch.zeros(3, 9), *tensors([Options()] * 3, CPU), torch.full((3,), 0.5, dtype=torch.float64)]
    sample(*arguments)
    with pytest.raises(ValueError, match="vocabulary"):
        sample(torch.zeros(1, 2**18 + 1), *(argument[:1] for argument in arguments[1:]), backend="triton")
    bad = {
        0: [torch.zeros(3, 9, dtype=torch.bfloat16), torch.zeros(9), torch.zeros(9, 3).T, torch.zeros(3, 0)],
        1: [torch.ones(2), torch.ones(3, dtype=torch.float64), torch.ones(6)[::2]],
        2: [torch.zeros(3), torch.zeros(3, dtype=torch.int16), torch.zeros(1, 3, dtype=torch.int64)],
        3: [torch.ones(3, dtype=torch.float16)],
        4: [torch.ones(4)],
        5: [torch.full((3,), 0.5)],
    }
    for place, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match="got"):
                sample(*arguments[:place], value, *arguments[place + 1 :])


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (Options(top_k=20), Options(top_k=21)),
        (Options(top_p=0.8), Options(top_p=0.83)),
        (Options(min_p=0.02), Options(min_p=0.03)),
        (Options(temperature=0.8), Options(temperature=0.81)),
    ],
    ids=str,
)
def test_planted_faults_are_noticed(right: Options, wrong: Options) -> None:
    """What is drawn with options slightly off cannot pass for the right distribution."""

    def run(logits: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
        return sample(logits, *tensors([wrong] * len(logits), CPU), arguments[-1], backend="cpu")

    logits = random_logits(1, 50, 1.0)[0]
    check_strata(logits, right, 4000, partial(sample, backend="cpu"), CPU)
    with pytest.raises(AssertionError):
        check_strata(logits, right, 4000, run, CPU)
