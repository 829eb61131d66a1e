"""RMS norm, rotary embedding and cache write in Triton against float64 and bit for bit, on awkward shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton_interpreter
from paged_problems import far_apart

from quire.kernels.kv_write import kv_write
from quire.kernels.rms_norm import rms_norm
from quire.kernels.rope import rope

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def assert_rounded(result: torch.Tensor, exact: torch.Tensor, num_roundings: int) -> None:
    """Each rounding to the dtype may be off by half a unit in the last place; float32 has 8 more for its sums."""
    unit = torch.finfo(result.dtype).eps
    allowed = unit * (num_roundings / 2 + (8 if result.dtype == torch.float32 else 0.01))
    error = ((result.double() - exact).abs() / (exact.abs() + 1e-3)).max().item()
    assert error <= allowed, f"off by {error / unit} units"


@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (3, 64), (33, 100), (2, 2049), (7, 3, 40), (4, 5, 128)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_equals_float64(shape: tuple[int, ...], dtype: torch.dtype, triton_device: torch.device) -> None:
    x = random(*shape, dtype=dtype, device=triton_device)
    weight = random(shape[-1], dtype=dtype, device=triton_device, seed=1)
    result = rms_norm(x, weight, EPS, backend="triton")
    assert result.shape == x.shape
    assert result.is_contiguous()
    assert_rounded(result, rms_norm(x.double(), weight.double(), EPS, backend="reference"), num_roundings=2)


@pytest.mark.parametrize("shape", [(1, 8), (5, 100), (3, 2049)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_adds_the_residual(shape: tuple[int, int], dtype: torch.dtype, triton_device: torch.device) -> None:
    x = random(*shape, dtype=dtype, device=triton_device)
    weight = random(shape[-1], dtype=dtype, device=triton_device, seed=1)
    residual = random(*shape, dtype=dtype, device=triton_device, seed=2)
    untouched, total = x.clone(), x + residual
    result = rms_norm(x, weight, EPS, residual, backend="triton")
    assert torch.equal(residual, total)
    assert torch.equal(x, untouched)
    assert_rounded(result, rms_norm(total.double(), weight.double(), EPS, backend="reference"), num_roundings=2)


def test_rms_norm_of_each_head_of_a_fused_projection(triton_device: torch.device) -> None:
    qkv = random(9, 10, 40, dtype=torch.bfloat16, device=triton_device)
    weight = random(40, dtype=torch.bfloat16, device=triton_device, seed=1)
    for heads in (qkv[:, :6], qkv[:, 6:8], qkv.transpose(0, 1)):
        contiguous = heads.contiguous()
        expected = rms_norm(contiguous, weight, EPS, backend="triton")
        assert torch.equal(rms_norm(heads, weight, EPS, backend="triton"), expected)


def test_rms_norm_of_nothing(triton_device: torch.device) -> None:
    x = torch.empty((0, 8), device=triton_device)
    assert rms_norm(x, torch.ones(8, device=triton_device), EPS, backend="triton").shape == (0, 8)


def rotary_table(num_positions: int, rotary_dim: int, device: torch.device) -> torch.Tensor:
    frequencies = 10_000.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float().to(device)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rotary_dim"),
    [(4, 4, 64, 64), (3, 1, 80, 32), (8, 2, 40, 40), (71, 1, 16, 16), (5, 5, 20, 2)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_equals_float64(
    num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    """On views of a fused qkv tensor, whose values must stay as they are."""
    qkv = random(5, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, device=triton_device)
    before = qkv.clone()
    positions = torch.tensor([0, 511, 3, 3, 64], device=triton_device)
    table = rotary_table(512, rotary_dim, triton_device)
    query, key, value = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    exact_query, exact_key = query.double(), key.double()
    rope(exact_query, exact_key, positions, table.double(), backend="reference")
    rope(query, key, positions, table, backend="triton")
    for result, exact in ((query, exact_query), (key, exact_key)):
        error = (result.double() - exact).abs().max().item()
        assert error <= 4 * torch.finfo(dtype).eps
    heads = num_heads + num_kv_heads
    assert torch.equal(value, before[:, heads:])
    assert torch.equal(qkv[:, :heads, rotary_dim:], before[:, :heads, rotary_dim:])


def bits(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.int16 if cache.itemsize == 2 else torch.int32)


@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "block_size"), [(2, 64, 16), (1, 80, 32), (3, 40, 8), (40, 64, 16), (2, 24, 24)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kv_write_fills_its_slots_and_no_other(
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    triton_device: torch.device,
) -> None:
    """Every other page is a canary: NaN with a payload, compared bit by bit. Two tokens are padding."""
    num_blocks = 6
    caches = torch.empty((2, num_blocks, num_kv_heads, block_size, head_dim), dtype=cache_dtype, device=triton_device)
    bits(caches).fill_(0x7FA5 if cache_dtype == torch.bfloat16 else 0x7FA5A5A5)
    expected = caches.clone()
    qkv = random(7, 2 * num_kv_heads + 1, head_dim, dtype=dtype, device=triton_device)
    key, value = qkv[:, :num_kv_heads], qkv[:, num_kv_heads : 2 * num_kv_heads]
    last = num_blocks * block_size - 1
    slots = [0, block_size, last, 2 * block_size - 1, 0, 3 * block_size + 1, 3 * block_size + 2]
    slot_mapping = torch.tensor(slots, device=triton_device)
    kv_write(key, value, caches[0], caches[1], slot_mapping, backend="triton")
    kv_write(key, value, expected[0], expected[1], slot_mapping, backend="reference")
    assert torch.equal(bits(caches)[:, 1:], bits(expected)[:, 1:])
    assert torch.equal(bits(caches)[:, 0, :, 1:], bits(expected)[:, 0, :, 1:])
    assert torch.equal(caches[1, 5, :, -1], value[2].to(cache_dtype))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU orders its programs itself")
def test_order_of_programs_changes_no_bit(triton_device: torch.device) -> None:
    x = random(12, 3, 40, dtype=torch.float16, device=triton_device)
    weight = random(40, dtype=torch.float16, device=triton_device, seed=1)
    positions = torch.arange(12, device=triton_device)
    table = rotary_table(12, 40, triton_device)
    results = []
    for seed in (None, 0):
        rotated, cache = x.clone(), torch.zeros((2, 2, 3, 16, 40), dtype=torch.float16, device=triton_device)

        def run(rotated: torch.Tensor = rotated, cache: torch.Tensor = cache) -> torch.Tensor:
            rope(rotated[:, :2], rotated[:, 2:], positions, table, backend="triton")
            kv_write(rotated, x, cache[0], cache[1], positions + 10, backend="triton")
            return rms_norm(rotated, weight, EPS, backend="triton")

        if seed is None:
            results.append((run(), rotated, cache))
        else:
            with triton_interpreter.shuffled_programs(seed):
                results.append((run(), rotated, cache))
    for in_order, shuffled in zip(*results, strict=True):
        assert torch.equal(in_order, shuffled)


def test_offsets_past_2_to_the_31(triton_device: torch.device, tmp_path: Path) -> None:
    """Rows and blocks so far apart that 32-bit offsets wrap around."""
    if triton_device.type != "cpu":
        pytest.skip("the far rows lie in a sparse file")
    dtype, stride = torch.float16, 2**30 + 64
    near = random(4, 3, 32, dtype=dtype, device=triton_device)
    weight = random(32, dtype=dtype, device=triton_device, seed=1)
    positions = torch.tensor([5, 0, 3, 1])
    table = rotary_table(8, 32, triton_device)
    far = far_apart(near, stride, tmp_path / "x")
    assert torch.equal(rms_norm(far, weight, EPS, backend="triton"), rms_norm(near, weight, EPS, backend="triton"))
    far_residual = far_apart(near[:, 0], stride, tmp_path / "residual")
    near_residual = near[:, 0].clone()
    for residual in (far_residual, near_residual):
        rms_norm(near[:, 1], weight, EPS, residual, backend="triton")
    assert torch.equal(far_residual, near_residual)

    rope(far[:, :2], far[:, 2:], positions, table, backend="triton")
    rope(near[:, :2], near[:, 2:], positions, table, backend="triton")
    assert torch.equal(far, near)
    far_cache = far_apart(torch.zeros((4, 3, 16, 32), dtype=dtype), stride, tmp_path / "cache")
    near_cache = torch.zeros((4, 3, 16, 32), dtype=dtype)
    for x, cache in ((far, far_cache), (near, near_cache)):
        kv_write(x, x, cache, cache, torch.tensor([63, 16, 40, 1]), backend="triton")
    assert torch.equal(far_cache, near_cache)
