"""Quantized linear layers on the CPU, against float64 with the weights that the integers and scales stand for."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from quire.kernels.cpu_activation import CODES
from quire.kernels.cpu_elements import has_feature
from quire.kernels.cpu_quantized import MAX_INPUT
from quire.kernels.cpu_recording import Arena, record
from quire.kernels.cpu_sized_recording import Sizes, record_for_sizes
from quire.kernels.linear import Activation, pack_bias
from quire.kernels.quantized_linear import Bits, dequantize, embedding, quantize, quantized_linear
from quire.kernels.quantized_linear.weight import GROUP_SIZES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_width = pytest.mark.parametrize("bits", [8, 4])
NUM_FEATURES = 70  # a panel and a part of one


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def problem(num_rows: int, depth: int, num_features: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_rows * depth)
    weight = (torch.randn(num_features, depth, generator=generator) / depth**0.5).to(dtype)
    bias = torch.randn(num_features, generator=generator).to(dtype)
    return torch.randn(num_rows, depth, generator=generator).to(dtype) * 2, weight, bias


def most_error(x: torch.Tensor, weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """What rounding x to 16 bits may cost, half a step of each input (and its own rounding), and float32 sums."""
    wide, depth = x.double(), x.shape[1]
    steps = F.pad(wide.abs(), (0, -depth % group_size)).unflatten(1, (-1, group_size)).amax(dim=2) / MAX_INPUT
    each = steps.repeat_interleave(group_size, dim=1)[:, :depth]
    sums = wide.abs() @ weight.abs().T
    return 0.51 * (each @ weight.abs().T) + (depth / group_size + 8) * 2**-24 * sums


def activated(x: torch.Tensor, activation: Activation | None) -> torch.Tensor:
    functions = {
        None: lambda y: y,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "relu": F.relu,
    }
    return functions[activation](x)  # type: ignore[no-untyped-call, no-any-return]


@each_width
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [1, 3, 4, 6, 31, 128, 129, 300, 520])
def test_is_the_product(depth: int, dtype: torch.dtype, bits: Bits) -> None:
    x, weight, _ = problem(5, depth, NUM_FEATURES, dtype)
    quantized = quantize(weight, bits)
    whole = dequantize(quantized).double()
    found = quantized_linear(x, quantized, out_dtype=torch.float32)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    expected = x.double() @ whole.T
    assert ((found.double() - expected).abs() <= most_error(x, whole, quantized.group_size)).all()
    reference = quantized_linear(x, quantized, out_dtype=torch.float32, backend="reference")
    torch.testing.assert_close(reference.double(), expected, rtol=1e-5, atol=1e-5)
    rounded = quantized_linear(x, quantized)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, found.to(dtype))


@each_width
@pytest.mark.parametrize("num_rows", [*range(1, 14), 47, 48, 49, 101])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_number_of_rows_and_each_row_as_if_alone(num_rows: int, gated: bool, bits: Bits) -> None:
    x, weight, bias = problem(num_rows, 200, 2 * NUM_FEATURES, torch.bfloat16)
    quantized, packed_bias = quantize(weight, bits, gated=gated), pack_bias(bias, gated=gated)
    whole = dequantize(quantized).double()
    found = quantized_linear(x, quantized, packed_bias, activation="silu", out_dtype=torch.float32)
    sums = x.double() @ whole.T + bias.double()
    errors = most_error(x, whole, quantized.group_size) + 2**-24 * sums.abs()
    if gated:
        (gate, up), (gate_error, up_error) = sums.chunk(2, dim=1), errors.chunk(2, dim=1)
        expected = F.silu(gate) * up
        bound = 1.1 * gate_error * (up.abs() + up_error) + F.silu(gate).abs() * up_error
    else:
        expected, bound = F.silu(sums), 1.1 * errors  # the slope of SiLU is below 1.1
    assert ((found.double() - expected).abs() <= bound + 1e-6 * (1 + expected.abs())).all()
    for row in range(num_rows):
        alone = quantized_linear(
            x[row : row + 1].clone(), quantized, packed_bias, activation="silu", out_dtype=torch.float32
        )
        assert torch.equal(alone[0], found[row])


@each_width
@pytest.mark.usefixtures("two_threads")
def test_threads_change_nothing(bits: Bits) -> None:
    x, weight, _ = problem(101, 700, 330, torch.bfloat16)
    quantized = quantize(weight, bits)
    together = quantized_linear(x, quantized)
    torch.set_num_threads(1)
    assert torch.equal(quantized_linear(x, quantized), together)
    for first, last in ((0, 1), (3, 5), (40, 57), (100, 101)):
        assert torch.equal(quantized_linear(x[first:last], quantized), together[first:last])


@pytest.mark.parametrize("activation", sorted(CODES))
def test_every_activation(activation: Activation) -> None:
    x, weight, bias = problem(4, 64, NUM_FEATURES, torch.float32)
    quantized, packed_bias = quantize(weight, 8), pack_bias(bias)
    sums = quantized_linear(x, quantized, packed_bias)
    found = quantized_linear(x, quantized, packed_bias, activation=activation)
    torch.testing.assert_close(found.double(), activated(sums.double(), activation), rtol=1e-6, atol=1e-6)


@each_width
def test_what_is_not_finite_shows_in_its_row_alone(bits: Bits) -> None:
    x, weight, _ = problem(9, 300, 80, torch.bfloat16)
    quantized = quantize(weight, bits)
    clean = quantized_linear(x, quantized)
    x[1, 0], x[4, 299], x[5, 130], x[7, 3] = math.nan, math.nan, math.inf, -math.inf
    found = quantized_linear(x, quantized)
    assert found[[1, 4, 5, 7]].isnan().all()
    others = [0, 2, 3, 6, 8]
    assert torch.equal(found[others], clean[others])


@each_width
def test_extreme_magnitudes(bits: Bits) -> None:
    """Groups of 128 at the largest integers do not overflow; tiny inputs are zeros, and large ones stay finite."""
    weight = torch.ones(16, 256)
    weight[1::2] = -1
    quantized = quantize(weight, bits)
    whole = dequantize(quantized).double()
    for value in (1.0, -1.0, 1e36, -1e36):
        x = torch.full((1, 256), value) / 256
        found, expected = quantized_linear(x, quantized).double(), x.double() @ whole.T
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)
    assert torch.equal(quantized_linear(torch.full((1, 256), 1e-31), quantized), torch.zeros(1, 16))
    mixed = torch.cat([torch.full((1, 128), 1e-31), torch.ones(1, 128)], dim=1)
    torch.testing.assert_close(quantized_linear(mixed, quantized).double(), mixed.double() @ whole.T, rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_8_bits_are_the_nearest_steps(gated: bool, dtype: torch.dtype) -> None:
    _, weight, _ = problem(1, 131, 2 * NUM_FEATURES, dtype)
    weight[3] = 0
    whole = dequantize(quantize(weight, 8, gated=gated))
    steps = weight.float().abs().amax(dim=1, keepdim=True) / 127
    assert ((whole - weight.float()).abs() <= 0.5001 * steps).all()
    assert torch.equal(whole[3], torch.zeros(131))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_4_bits_are_the_nearest_steps_and_better_than_no_clipping(gated: bool) -> None:
    _, weight, _ = problem(1, 300, 2 * NUM_FEATURES, torch.float32)
    weight[3] = 0
    weight[4, 7] = 40.0
    size = GROUP_SIZES[4]
    quantized = quantize(weight, 4, gated=gated)
    assert quantized.scales.dtype == torch.bfloat16
    whole = dequantize(quantized)
    assert torch.equal(whole[3], torch.zeros(300))

    def squared_errors(rounded: torch.Tensor) -> torch.Tensor:
        return F.pad((rounded - weight).square(), (0, -300 % size)).unflatten(1, (-1, size)).sum(dim=2)

    def plain(steps: int) -> torch.Tensor:
        groups = F.pad(weight, (0, -300 % size)).unflatten(1, (-1, size))
        scales = groups.abs().amax(dim=2, keepdim=True).clamp_min(1e-9) / steps
        return ((groups / scales).round().clamp(-8, 7) * scales).flatten(1)[:, :300]

    ours = squared_errors(whole)
    assert (ours <= 1.01 * squared_errors(plain(7))).all()  # a scale in bfloat16 may cost a little
    assert ours.sum() < 0.9 * squared_errors(plain(7)).sum()


@each_width
def test_bytes_of_a_weight(bits: Bits) -> None:
    quantized = quantize(torch.randn(1024, 1024), bits)
    num_scales_bytes = 4 * 1024 if bits == 8 else 2 * 1024 * 8
    assert quantized.num_bytes == 1024 * 1024 * bits // 8 + num_scales_bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_takes_rows(dtype: torch.dtype) -> None:
    _, weight, _ = problem(1, 31, 200, dtype)
    quantized = quantize(weight, 8)
    indices = torch.tensor([0, 63, 64, 199, 64])
    expected = dequantize(quantized)[indices].to(dtype)
    assert torch.equal(embedding(indices, quantized, dtype), expected)
    assert torch.equal(embedding(indices, quantized, dtype, backend="reference"), expected)


def test_rows_may_be_a_view() -> None:
    x, weight, _ = problem(5, 32, 40, torch.float32)
    wide, quantized = F.pad(x, (0, 9)), quantize(weight, 4)
    assert torch.equal(quantized_linear(wide[:, :32], quantized), quantized_linear(x, quantized))


@each_width
@pytest.mark.usefixtures("two_threads")
def test_can_be_recorded(bits: Bits) -> None:
    x, weight, _ = problem(3, 256, 256, torch.bfloat16)
    quantized, table = quantize(weight, bits), quantize(weight, 8)
    indices = torch.tensor([1, 2, 3])
    with record(Arena()) as recording:
        hidden = quantized_linear(x, quantized, activation="relu")
        out = quantized_linear(hidden, quantized, out_dtype=torch.float32)
        rows = embedding(indices, table, torch.bfloat16)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        indices.add_(seed)
        recording.replay(2)
        again = quantized_linear(x, quantized, activation="relu")
        assert torch.equal(out, quantized_linear(again, quantized, out_dtype=torch.float32))
        assert torch.equal(rows, embedding(indices, table, torch.bfloat16))


@each_width
@pytest.mark.usefixtures("two_threads")
def test_one_recording_serves_few_rows_and_many(bits: Bits) -> None:
    """Whoever quantizes the inputs, each thread for itself or all of them together, a row is the same."""
    x, weight, bias = problem(9, 300, 320, torch.bfloat16)
    quantized, packed_bias = quantize(weight, bits), pack_bias(bias)
    alone = torch.cat([quantized_linear(row, quantized, packed_bias, activation="silu") for row in x.split(1)])

    def step(sizes: Sizes) -> tuple[torch.Tensor, ...]:
        hidden = quantized_linear(x[: sizes[0]], quantized, packed_bias, activation="silu")
        return hidden, quantized_linear(hidden[:, :300], quantized, out_dtype=torch.float32)

    recording = record_for_sizes(Arena(), step, (1,), (9,), 9)
    hidden, out = recording.outputs
    expected = torch.cat([quantized_linear(row[:, :300], quantized, out_dtype=torch.float32) for row in alone.split(1)])
    for num_rows in (1, 9, 3, 4, 2, 5):
        for part in (hidden, out):
            part.fill_(math.nan)
        recording.replay((num_rows,), 2)
        assert torch.equal(hidden[:num_rows], alone[:num_rows])
        assert torch.equal(out[:num_rows], expected[:num_rows])


def test_refuses_what_it_cannot_do() -> None:
    weight = quantize(torch.zeros(4, 8), 4)
    with pytest.raises(ValueError, match=r"x must be \[T, 8\]"):
        quantized_linear(torch.zeros(2, 7), weight)
    with pytest.raises(ValueError, match="must be float32, float16 or bfloat16"):
        quantize(torch.zeros(4, 8, dtype=torch.float64), 8)
    with pytest.raises(ValueError, match="even number of rows"):
        quantize(torch.zeros(3, 8), 8, gated=True)
    with pytest.raises(ValueError, match="pack_bias"):
        quantized_linear(torch.zeros(2, 8), weight, torch.zeros(4))
    with pytest.raises(ValueError, match="must have 8 bits"):
        embedding(torch.zeros(1, dtype=torch.int64), weight, torch.float32)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="weight must be finite"):
            quantize(torch.full((4, 8), bad), 8)


ON_ANOTHER_CPU = """
import sys, torch
from quire.kernels import cpu_lanes, cpu_quantized
from quire.kernels.quantized_linear import quantize, quantized_linear
x, weight = torch.load(sys.argv[1])
found = (cpu_lanes.LANES, cpu_quantized.HAS_BYTE_PRODUCT, cpu_quantized._HAS_SHORT_PRODUCT)
assert str(found) == sys.argv[3], found
torch.save([quantized_linear(x, quantize(weight, bits)) for bits in (8, 4)], sys.argv[2])
"""
AVX2 = "+avx,+avx2,+fma,+f16c"
AVX512 = f"{AVX2},+avx512f,+avx512bw,+avx512dq,+avx512vl"
NEEDED = {"avx2": "avx2", "avx512": "avx512bw"}  # here too, or the test cannot run
OTHERS = {"none": ("", (8, False, False)), "avx2": (AVX2, (8, False, True)), "avx512": (AVX512, (16, False, True))}
"""Features that the compiler may use, and the vector lanes, products of bytes and products of int16 found then."""


@pytest.mark.parametrize("features", [name for name in OTHERS if name == "none" or has_feature(NEEDED[name])])
def test_other_processors_compute_the_same_bits(features: str, tmp_path: Path) -> None:
    x, weight, _ = problem(7, 300, NUM_FEATURES, torch.float32)
    torch.save((x, weight), tmp_path / "problem")
    flags, kernel = OTHERS[features]
    settings = {
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": flags,
        "XDG_CACHE_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    arguments = [str(tmp_path / "problem"), str(tmp_path / "results"), str(kernel)]
    command = [sys.executable, "-c", ON_ANOTHER_CPU, *arguments]
    subprocess.run(command, env=os.environ | settings, check=True, timeout=300)
    for bits, found in zip((8, 4), torch.load(tmp_path / "results"), strict=True):
        assert torch.equal(found, quantized_linear(x, quantize(weight, bits)))
