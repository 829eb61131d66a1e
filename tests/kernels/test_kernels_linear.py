"""Packed linear layers and the argmax on the CPU, against float64 and plain torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from quire.kernels.argmax import argmax
from quire.kernels.cpu_activation import CODES
from quire.kernels.linear import Activation, embedding, linear, pack, pack_bias, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64, 64), (3, 31, 6), (6, 30, 50), (7, 128, 200), (13, 33, 66), (100, 96, 70)]  # T, K, N


def problem(num_rows: int, depth: int, num_features: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_rows * depth)
    weight = (torch.randn(num_features, depth, generator=generator) / depth**0.5).to(dtype)
    bias = torch.randn(num_features, generator=generator).to(dtype)
    return torch.randn(num_rows, depth, generator=generator).to(dtype) * 2, weight, bias


def activated(x: torch.Tensor, activation: Activation | None) -> torch.Tensor:
    functions = {
        None: lambda y: y,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "relu": F.relu,
    }
    return functions[activation](x)  # type: ignore[no-untyped-call, no-any-return]


def exact(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation | None, *, gated: bool
) -> torch.Tensor:
    out = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if not gated:
        return activated(out, activation)
    gate, up = out.chunk(2, dim=-1)
    return activated(gate, activation) * up


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_product(shape: tuple[int, int, int], gated: bool, dtype: torch.dtype) -> None:
    x, weight, bias = problem(*shape, dtype)
    packed = pack(weight, gated=gated)
    assert torch.equal(unpack(packed), weight)
    for its_bias, activation in ((None, None), (bias, "silu")):
        packed_bias = None if its_bias is None else pack_bias(its_bias, gated=gated)
        expected = exact(x, weight, its_bias, activation, gated=gated)
        for backend in ("cpu", "reference"):
            found = linear(x, packed, packed_bias, activation=activation, out_dtype=torch.float32, backend=backend)
            torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6 * expected.abs().max().item())
        rounded = linear(x, packed, packed_bias, activation=activation)
        assert rounded.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(rounded.double(), expected, rtol=eps, atol=2e-6 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 512, 40), (101, 517, 70)], ids=str)
def test_float32_rows_on_narrow_weights_are_as_on_wide_ones(
    shape: tuple[int, int, int], gated: bool, dtype: torch.dtype
) -> None:
    x, weight, bias = (tensor.float() for tensor in problem(*shape, dtype))
    x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) / 64  # no longer of 16 bits
    narrow, wide = pack(weight.to(dtype), gated=gated), pack(weight, gated=gated)
    bias = pack_bias(bias, gated=gated)
    found = linear(x, narrow, bias, activation="silu")
    assert found.dtype == torch.float32
    assert torch.equal(found, linear(x, wide, bias, activation="silu"))
    torch.testing.assert_close(found, linear(x, narrow, bias, activation="silu", backend="reference"))


@pytest.mark.parametrize("activation", sorted(CODES))
def test_activations_at_every_magnitude(activation: Activation) -> None:
    """The identity as weight: what comes out is the function of what went in."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e30, -100.0, -0.0, 1e-30, 100.0, 1e30])])
    packed = pack(torch.eye(1))
    found = linear(x[:, None], packed, activation=activation)[:, 0]
    torch.testing.assert_close(found.double(), activated(x.double(), activation), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("row_dtype", [None, torch.float32], ids=["as the weight", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_row_is_the_same_in_every_batch(dtype: torch.dtype, row_dtype: torch.dtype | None, num_threads: int) -> None:
    x, weight, bias = problem(101, 300, 130, dtype)
    x = x.to(row_dtype or dtype)
    packed, packed_bias = pack(weight, gated=True), pack_bias(bias, gated=True)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = linear(x, packed, packed_bias, activation="silu")
        for first, last in ((0, 1), (3, 5), (7, 14), (40, 57), (100, 101)):
            alone = linear(x[first:last].clone(), packed, packed_bias, activation="silu")
            assert torch.equal(alone, together[first:last])
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finite_stays_in_its_row() -> None:
    x, weight, _ = problem(9, 64, 80, torch.bfloat16)
    clean = linear(x, pack(weight))
    x[4, 3], x[6, 0] = math.nan, math.inf
    found = linear(x, pack(weight))
    assert found[4].isnan().all()
    assert not found[6].isfinite().any()
    others = [0, 1, 2, 3, 5, 7, 8]
    assert torch.equal(found[others], clean[others])


def test_rows_may_be_a_view() -> None:
    x, weight, _ = problem(5, 32, 40, torch.float32)
    wide = F.pad(x, (0, 9))
    assert torch.equal(linear(wide[:, :32], pack(weight)), linear(x, pack(weight)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_takes_rows_of_the_packed_weight(dtype: torch.dtype) -> None:
    _, weight, _ = problem(1, 31, 200, dtype)
    indices = torch.tensor([0, 63, 64, 199, 64])
    for out_dtype in {dtype, torch.float32}:
        for backend in ("cpu", "reference"):
            found = embedding(indices, pack(weight), out_dtype, backend=backend)
            assert found.dtype == out_dtype
            assert torch.equal(found, weight[indices].to(out_dtype))


def test_refuses_what_it_cannot_do() -> None:
    packed = pack(torch.zeros(4, 8))
    with pytest.raises(ValueError, match=r"x must be \[T, 8\]"):
        linear(torch.zeros(2, 7), packed)
    with pytest.raises(ValueError, match="must be float32, float16 or bfloat16"):
        pack(torch.zeros(4, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="even number of rows"):
        pack(torch.zeros(3, 8), gated=True)
    with pytest.raises(ValueError, match="pack_bias"):
        linear(torch.zeros(2, 8), packed, torch.zeros(4))
    with pytest.raises(ValueError, match="not gated"):
        embedding(torch.zeros(1, dtype=torch.int64), pack(torch.zeros(4, 8), gated=True), torch.float32)
    with pytest.raises(ValueError, match="out_dtype must be"):
        embedding(torch.zeros(1, dtype=torch.int64), packed, torch.bfloat16)
    with pytest.raises(ValueError, match="or float32"):
        linear(torch.zeros(2, 8, dtype=torch.float16), pack(torch.zeros(4, 8, dtype=torch.bfloat16)))


@pytest.mark.parametrize("vocab_size", [1, 5, 16, 33, 8192, 151937])
@pytest.mark.parametrize("num_rows", [1, 7])
def test_argmax_takes_the_first_of_the_largest_and_hides_nothing(num_rows: int, vocab_size: int) -> None:
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    logits[0, vocab_size // 2] = logits[0, vocab_size // 3] = 9.0
    if num_rows > 1:
        logits[1] = 3.0
        logits[2, -1] = math.nan
        logits[3, 0] = math.nan
        logits[4, vocab_size // 2] = math.inf
        logits[5] = -math.inf
        logits[6, : vocab_size // 2] = -math.inf
    assert torch.equal(argmax(logits), argmax(logits, backend="reference"))
