"""fp8 linear layers: rounding against torch's own, products against float64 on the same codes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import triton_interpreter

from quire.kernels.backend import Backend
from quire.kernels.fp8_linear import CODE_DTYPES, Fp8Weight, fp8_linear, in_code_dtype, quantize, quantize_tokens
from quire.kernels.fp8_linear.reference import scaled_product

E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_product(
    num_tokens: int, num_features: int, depth: int, dtype: torch.dtype, with_bias: bool, device: torch.device
) -> None:
    """Off by one rounding and what float32 sums of `depth` products may be off by."""
    x = random(num_tokens, depth).to(dtype).to(device)
    weight = quantize(random(num_features, depth, seed=1).to(device), E4M3)
    bias = random(num_features, seed=2).to(dtype).to(device) if with_bias else None
    result = fp8_linear(x, weight, bias, backend="triton")
    assert result.dtype == dtype
    assert result.is_contiguous()
    codes, scales = quantize_tokens(x, E4M3, backend="reference")
    exact = scaled_product(
        codes, scales, weight.codes, weight.scales, None if bias is None else bias.double(), torch.float64
    )
    unit = torch.finfo(dtype).eps
    largest_sum = (codes.double().abs() @ weight.codes.double().abs().T) * scales.double()[:, None] * weight.scales
    allowed = exact.abs() * unit / 2 * 1.01 + largest_sum * 2**-23 * math.sqrt(depth) + 1e-7
    assert ((result.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 33, 48), (5, 64, 256), (17, 40, 300), (70, 130, 100)], ids=str)
def test_triton_equals_float64(
    shape: tuple[int, int, int], dtype: torch.dtype, with_bias: bool, triton_device: torch.device
) -> None:
    check_product(*shape, dtype, with_bias, triton_device)


def test_groups_of_tiles_cover_everything(triton_device: torch.device) -> None:
    """More tiles of rows than one group has, the last group not full."""
    check_product(64 * 9 + 3, 100, 16, torch.float16, False, triton_device)


@pytest.mark.parametrize("code_dtype", CODE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [1, 17, 100, 4097])
def test_rounding_of_tokens(
    depth: int, dtype: torch.dtype, code_dtype: torch.dtype, triton_device: torch.device
) -> None:
    """(Triton's interpreter has no float8_e4m3fnuz: the kernel with it is only compiled, for gfx942.)"""
    backend: Backend = "triton" if code_dtype == E4M3 else "reference"
    x = (random(4, depth) * torch.tensor([1e-6, 1.0, 300.0, 0.0])[:, None]).to(dtype).to(triton_device)
    codes, scales = quantize_tokens(x, code_dtype, backend=backend)
    expected, expected_scales = quantize_tokens(x, code_dtype, backend="reference")
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    largest = torch.finfo(code_dtype).max
    assert (codes[:3].float().abs().amax(dim=1) == largest).all()
    half_a_step = scales[:, None] * torch.maximum(codes.float().abs() / 16, torch.tensor(2.0**-10))
    assert ((codes.float() * scales[:, None] - x.float()).abs() <= half_a_step * 1.001).all()


def test_views_and_no_rows(triton_device: torch.device) -> None:
    wide = random(6, 96).to(triton_device)
    weight = quantize(random(32, 64, seed=1).to(triton_device), E4M3)
    expected = fp8_linear(wide[::2, 16:80].contiguous(), weight, backend="triton")
    assert torch.equal(fp8_linear(wide[::2, 16:80], weight, backend="triton"), expected)
    assert fp8_linear(wide[:0, :64], weight, backend="triton").shape == (0, 32)
    assert fp8_linear(wide[:, :64].bfloat16(), weight, out_dtype=torch.float32, backend="triton").dtype == torch.float32


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_bad_row_is_nan_and_spoils_no_other(backend: Backend, triton_device: torch.device) -> None:
    device = triton_device if backend == "triton" else torch.device("cpu")
    x, weight = random(5, 64).to(device), quantize(random(32, 64, seed=1).to(device), E4M3)
    expected = fp8_linear(x, weight, backend=backend)
    x[1, 3], x[3, 60], x[4] = math.nan, math.inf, math.nan
    result = fp8_linear(x, weight, backend=backend)
    assert torch.equal(result[[0, 2]], expected[[0, 2]])
    assert result[[1, 3, 4]].isnan().all()


@pytest.mark.parametrize("code_dtype", CODE_DTYPES, ids=str)
def test_rounding_of_weights(code_dtype: torch.dtype) -> None:
    """Each feature has its scale; errors are half a step of 3 bits behind the point at most."""
    weight = random(2050, 40) * torch.logspace(-20, 3, 2050)[:, None]
    weight[7] = 0.0
    rounded = quantize(weight, code_dtype)
    assert rounded.scales.shape == (2050,)
    step = rounded.scales[:, None] * torch.maximum(rounded.codes.float().abs() / 16, torch.tensor(2.0**-10))
    error = (rounded.codes.float() * rounded.scales[:, None] - weight).abs()
    assert (error <= step * 1.001).all()
    assert not rounded.codes[7].float().any()
    weight[3, 3] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        quantize(weight, code_dtype)


def test_codes_of_both_kinds_say_the_same() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    weight = Fp8Weight(bits[(bits & 0x7F) != 0x7F].view(E4M3).view(2, -1), torch.tensor([0.5, 3.0]))
    converted = in_code_dtype(weight, torch.float8_e4m3fnuz)
    values = [w.codes.float() * w.scales[:, None] for w in (weight, converted)]
    assert torch.equal(*values)
    assert in_code_dtype(weight, E4M3) is weight


def test_reference_is_near_what_was_not_rounded() -> None:
    """Two roundings to 4 significant bits, each off by 2 ** -5 of a uniform's standard deviation or so."""
    x, weight = random(64, 512), random(96, 512, seed=1)
    result = fp8_linear(x, quantize(weight, E4M3))
    exact = x.double() @ weight.double().T
    assert (result - exact).norm() / exact.norm() < 0.04


@pytest.mark.parametrize(
    "fault",
    [
        ("acc *= tl.load(weight_scales + feature", "acc *= tl.load(weight_scales + feature % 32"),
        ("acc *= tl.load(scales + token", "acc *= tl.load(scales + token * 0"),
        ("is_inside = depth < DEPTH - start", "is_inside = depth < BLOCK_K - 16"),
        ("b_at += BLOCK_K", "b_at += 0"),
        ("(place // num_rows) * BLOCK_N", "(place // (num_rows + 1)) * BLOCK_N"),
    ],
    ids=str,
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the variants are interpreted")
def test_faults_are_caught(
    fault: tuple[str, str], triton_device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = triton_interpreter.load_variant("fp8_linear", tmp_path, [fault])
    monkeypatch.setattr("quire.kernels.fp8_linear.triton.scaled_product", variant.scaled_product)
    with pytest.raises(AssertionError):
        check_product(5, 64, 600, torch.float32, False, triton_device)


def test_refuses_what_it_cannot_do() -> None:
    x, weight = torch.zeros(2, 8), quantize(torch.ones(4, 8), E4M3)
    for bad in (x[:, :4], x[0]):
        with pytest.raises(ValueError, match="\\[T, 8\\]"):
            fp8_linear(bad, weight)
    with pytest.raises(ValueError, match="bias"):
        fp8_linear(x, weight, torch.zeros(4, dtype=torch.float16))
    with pytest.raises(ValueError, match="out_dtype"):
        fp8_linear(x, weight, out_dtype=torch.float16)
    with pytest.raises(ValueError, match="32768"):
        quantize_tokens(torch.zeros(1, 2**15 + 1), E4M3)
    with pytest.raises(ValueError, match="float8_e5m2"):
        quantize_tokens(x, torch.float8_e5m2)
