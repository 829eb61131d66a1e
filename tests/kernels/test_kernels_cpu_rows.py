"""RMS norm, RoPE and KV writes of the CPU kernels against float64, on strided views and between canaries."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from quire.kernels.kv_write import kv_write
from quire.kernels.rms_norm import rms_norm
from quire.kernels.rope import rope

# Relative to the largest magnitude: a rounding or two of the result.
TOLERANCE = {torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
NAN = float("nan")


@pytest.fixture
def many_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(result: torch.Tensor, expected: torch.Tensor) -> None:
    error = (result.double() - expected).abs().max().item()
    assert error <= TOLERANCE[result.dtype] * expected.abs().max().item()


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.double()
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return scaled.to(x.dtype).double() * weight.double()


@DTYPES
@pytest.mark.parametrize(("num_rows", "dim"), [(1, 1), (1, 64), (3, 40), (17, 257), (300, 768)])
def test_rms_norm(num_rows: int, dim: int, dtype: torch.dtype) -> None:
    x, weight = randn(num_rows, dim, dtype=dtype), randn(dim, dtype=dtype, seed=1)
    before = x.clone()
    assert_near(rms_norm(x, weight, 1e-5, backend="cpu"), normed(x, weight, 1e-5))
    assert torch.equal(x, before)


@DTYPES
def test_rms_norm_of_heads_in_a_fused_tensor(dtype: torch.dtype) -> None:
    fused, weight = randn(9, 7, 48, dtype=dtype), randn(48, dtype=dtype, seed=1)
    heads = fused[:, 2:5]
    result = rms_norm(heads, weight, 1e-6, backend="cpu")
    assert result.is_contiguous()
    assert_near(result, normed(heads, weight, 1e-6))


@DTYPES
@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize("num_rows", [1, 19, 300])
def test_rms_norm_after_a_residual(num_rows: int, dtype: torch.dtype) -> None:
    """The residual becomes the rounded sum in place, between canaries, and the sum is what is normalised."""
    x, weight = randn(num_rows, 500, dtype=dtype), randn(500, dtype=dtype, seed=1)
    wide = randn(num_rows, 512, dtype=dtype, seed=2)
    residual, before = wide[:, 6:506], wide.clone()
    result = rms_norm(x, weight, 1e-5, residual, backend="cpu")
    total = before[:, 6:506] + x
    assert torch.equal(residual, total)
    assert_near(result, normed(total, weight, 1e-5))
    wide[:, 6:506] = before[:, 6:506]
    assert torch.equal(wide, before)


@DTYPES
def test_a_bad_row_spoils_itself_alone(dtype: torch.dtype) -> None:
    x, weight = randn(20, 96, dtype=dtype), randn(96, dtype=dtype, seed=1)
    expected = rms_norm(x, weight, 1e-5, backend="cpu")
    x[7, 50] = NAN
    result = rms_norm(x, weight, 1e-5, backend="cpu")
    assert result[7].isnan().all()
    result[7] = expected[7]
    assert torch.equal(result, expected)
    for row in range(8, 20):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-5, backend="cpu")[0], expected[row])


def angles(rotary_dim: int, num_positions: int = 600) -> torch.Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    phases = torch.arange(num_positions)[:, None] * frequencies
    return torch.cat((phases.cos(), phases.sin()), dim=-1)


def rotated(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    half = cos_sin.shape[1] // 2
    wide = x.double()
    cos, sin = cos_sin[positions].double().unsqueeze(1).split(half, dim=-1)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


@DTYPES
@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "rotary_dim"),
    [(1, 1, 1, 2, 2), (5, 3, 1, 80, 80), (17, 4, 2, 96, 64), (300, 12, 4, 64, 64), (2, 2, 2, 40, 10)],
)
def test_rope_in_a_fused_tensor(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int, dtype: torch.dtype
) -> None:
    fused = randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    query, key, value = fused.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    positions = torch.randint(600, (num_tokens,), generator=torch.Generator().manual_seed(0))
    cos_sin = angles(rotary_dim)
    expected = [rotated(x, positions, cos_sin) for x in (query, key)]
    untouched = [x.clone() for x in (query[..., rotary_dim:], key[..., rotary_dim:], value)]
    rope(query, key, positions, cos_sin, backend="cpu")
    assert_near(query, expected[0])
    assert_near(key, expected[1])
    for x, before in zip((query[..., rotary_dim:], key[..., rotary_dim:], value), untouched, strict=True):
        assert torch.equal(x, before)


@DTYPES
@pytest.mark.usefixtures("many_threads")
@pytest.mark.parametrize(("num_tokens", "block_size"), [(1, 16), (37, 32), (400, 16), (11, 5)])
def test_kv_write_changes_its_slots_alone(num_tokens: int, block_size: int, dtype: torch.dtype) -> None:
    """Every other slot keeps its canary, bit by bit; keys and values are views of a fused tensor."""
    fused = randn(num_tokens, 9, 72, dtype=dtype)
    key, value = fused[:, 2:5], fused[:, 6:9]
    num_blocks = num_tokens // block_size + 3
    caches = torch.full((2, num_blocks, 3, block_size, 72), NAN, dtype=dtype)
    slots = torch.randperm(num_blocks * block_size, generator=torch.Generator().manual_seed(0))[:num_tokens]
    kv_write(key, value, caches[0], caches[1], slots, backend="cpu")
    for cache, source in zip(caches, (key, value), strict=True):
        rows = cache.transpose(1, 2).reshape(-1, 3, 72)
        assert torch.equal(rows[slots], source)
        rows[slots] = NAN
        assert rows.isnan().all()


@pytest.mark.parametrize("cache_dtype", list(TOLERANCE), ids=str)
@DTYPES
def test_kv_write_casts_to_the_cache(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    key, value = randn(6, 2, 24, dtype=dtype), randn(6, 2, 24, dtype=dtype, seed=1)
    k_cache = torch.zeros((2, 2, 16, 24), dtype=cache_dtype)
    v_cache = torch.zeros_like(k_cache)
    kv_write(key, value, k_cache, v_cache, torch.arange(16, 22), backend="cpu")
    assert torch.equal(k_cache[1, :, :6].transpose(0, 1), key.to(cache_dtype))
    assert torch.equal(v_cache[1, :, :6].transpose(0, 1), value.to(cache_dtype))


def test_no_tokens() -> None:
    x = torch.empty((0, 2, 16))
    cache = torch.zeros((2, 2, 16, 16))
    none = torch.empty(0, dtype=torch.int64)
    assert rms_norm(x, torch.ones(16), 1e-5, backend="cpu").shape == (0, 2, 16)
    rope(x, x.clone(), none, angles(16), backend="cpu")
    kv_write(x, x, cache, cache.clone(), none, backend="cpu")
    assert (cache == 0).all()


def test_a_planted_fault_is_noticed() -> None:
    """A cosine that is wrong in its third digit."""
    x = randn(5, 1, 64)
    positions, cos_sin = torch.arange(5), angles(64)
    expected = rotated(x, positions, cos_sin)
    cos_sin[4, 0] += 1e-3
    rope(x, x.clone(), positions, cos_sin, backend="cpu")
    with pytest.raises(AssertionError):
        assert_near(x, expected)
