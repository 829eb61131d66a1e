"""Norm, rotation and KV write in one pass, against the three operations in float64 and plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton_interpreter
from paged_problems import far_apart

from quire.kernels.backend import Backend
from quire.kernels.rope_kv_write import rope_kv_write

BLOCK_SIZE, NUM_BLOCKS, EPS = 16, 8, 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CANARY = {2: 0x7FA5, 4: 0x7FA5A5A5, 8: 0x7FF5A5A5A5A5A5A5}
"""NaN with a payload, by the dtype's bytes: what slots hold that no token is written to."""


@dataclass(frozen=True)
class Problem:
    """A step's tokens as views of a fused qkv tensor; slots are permuted, two of the tokens are padding."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    with_norms: bool
    num_tokens: int = 9

    def run(self, dtype: torch.dtype, backend: Backend, device: torch.device) -> tuple[torch.Tensor, ...]:
        """(query, qkv before, qkv afterwards, caches, slots), in `dtype` on inputs that were rounded to bfloat16."""
        generator = torch.Generator().manual_seed(self.head_dim)

        def random(*shape: int, around: float = 0.0) -> torch.Tensor:
            return (around + torch.randn(shape, generator=generator)).bfloat16().to(dtype).to(device)

        qkv = random(self.num_tokens, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        positions = torch.randint(0, 50, (self.num_tokens,), generator=generator).to(device)
        angles = torch.rand(50, self.rotary_dim // 2, generator=generator) * 6.28
        table = torch.cat([angles.cos(), angles.sin()], dim=1).to(device)
        slots = BLOCK_SIZE + torch.randperm((NUM_BLOCKS - 1) * BLOCK_SIZE, generator=generator)[: self.num_tokens]
        slots[[1, self.num_tokens // 2]] = 0
        norms = [random(self.head_dim, around=1.0) if self.with_norms else None for _ in range(2)]
        caches = torch.empty((2, NUM_BLOCKS, self.num_kv_heads, BLOCK_SIZE, self.head_dim), dtype=dtype, device=device)
        bits(caches).fill_(CANARY[dtype.itemsize])
        before = qkv.clone()
        query, key, value = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        rope_kv_write(
            *(query, key, value, positions, table.double() if dtype == torch.float64 else table),
            *(caches[0], caches[1], slots.to(device), *norms, EPS),
            backend=backend,
        )
        return query, before, qkv, caches, slots


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def check(problem: Problem, dtype: torch.dtype, backend: Backend, device: torch.device) -> None:
    """Query and written slots are float64's but for one rounding (float32: of each operation); no other bit changes."""
    query, before, after, caches, slots = problem.run(dtype, backend, device)
    exact_query, _, _, exact_caches, _ = problem.run(torch.float64, "reference", torch.device("cpu"))
    unit = torch.finfo(dtype).eps
    tolerance = (
        {"rtol": unit / 2 * 1.01, "atol": unit} if dtype != torch.float32 else {"rtol": 8 * unit, "atol": 8 * unit}
    )
    torch.testing.assert_close(query.cpu().double(), exact_query, **tolerance)
    written = torch.zeros(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    written[slots] = True
    found, exact = (x.cpu().transpose(2, 3).flatten(1, 2) for x in (caches, exact_caches))  # [2, slots, Hk, D]
    own = written.clone()
    own[0] = False  # what padding left in the null block
    torch.testing.assert_close(found[0, own].double(), exact[0, own], **tolerance)
    assert torch.equal(found[1, own].double(), exact[1, own])
    assert (bits(found[:, ~written]) == CANARY[dtype.itemsize]).all()
    first_value = problem.num_heads + problem.num_kv_heads
    assert torch.equal(after[:, first_value:], before[:, first_value:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize("heads", [(4, 2, 64, 64), (3, 1, 20, 12), (2, 2, 5, 2)], ids=str)
def test_cpu(heads: tuple[int, int, int, int], with_norms: bool, dtype: torch.dtype) -> None:
    check(Problem(*heads, with_norms), dtype, "cpu", torch.device("cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize(
    "heads",
    [(4, 2, 64, 64), (8, 1, 80, 32), (3, 3, 96, 96), (5, 1, 128, 128), (2, 2, 256, 64), (71, 1, 16, 16), (3, 1, 20, 2)],
    ids=str,
)
def test_triton(
    heads: tuple[int, int, int, int], with_norms: bool, dtype: torch.dtype, triton_device: torch.device
) -> None:
    check(Problem(*heads, with_norms), dtype, "triton", triton_device)


@pytest.mark.parametrize("num_tokens", [3, 4, 64, 65])
def test_triton_on_few_and_many_tokens(num_tokens: int, triton_device: torch.device) -> None:
    check(Problem(6, 2, 64, 64, with_norms=True, num_tokens=num_tokens), torch.bfloat16, "triton", triton_device)


def test_no_tokens(triton_device: torch.device) -> None:
    nothing, cache = torch.empty((0, 2, 8), device=triton_device), torch.zeros((2, 2, 16, 8), device=triton_device)
    indices = torch.empty(0, dtype=torch.int64, device=triton_device)
    table = torch.zeros((4, 8), device=triton_device)
    rope_kv_write(nothing, nothing, nothing, indices, table, cache, cache, indices, backend="triton")
    assert not cache.any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU orders its programs itself")
def test_order_of_programs_changes_no_bit(triton_device: torch.device) -> None:
    problem = Problem(8, 2, 128, 128, with_norms=True, num_tokens=12)
    in_order = problem.run(torch.float16, "triton", triton_device)
    with triton_interpreter.shuffled_programs(0):
        shuffled = problem.run(torch.float16, "triton", triton_device)
    assert torch.equal(in_order[2], shuffled[2])
    assert torch.equal(bits(in_order[3])[:, 1:], bits(shuffled[3])[:, 1:])


def test_offsets_past_2_to_the_31(triton_device: torch.device, tmp_path: Path) -> None:
    """Rows and blocks so far apart that 32-bit offsets wrap around."""
    if triton_device.type != "cpu":
        pytest.skip("the far rows lie in a sparse file")
    dtype, stride = torch.float16, 2**30 + 64
    near = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    table, indices = torch.randn(8, 32), torch.tensor([5, 0, 3, 1])
    far = far_apart(near, stride, tmp_path / "x")
    near_caches = torch.zeros((2, 4, 1, 16, 32), dtype=dtype)
    far_caches = [far_apart(cache, stride, tmp_path / str(index)) for index, cache in enumerate(near_caches)]
    for x, caches in ((near, list(near_caches)), (far, far_caches)):
        slots = torch.tensor([63, 16, 40, 1])
        rope_kv_write(x[:, :1], x[:, 1:2], x[:, 2:], indices, table, *caches, slots, backend="triton")
    assert torch.equal(far[:, :1], near[:, :1])
    for far_cache, near_cache in zip(far_caches, near_caches, strict=True):
        assert torch.equal(far_cache, near_cache)


FAULTS = {
    "a pair is rotated backwards": ("first * cos - second * sin", "first * cos + second * sin"),
    "the rest is not part of the norm": ("squares += tl.sum(rest * rest, axis=1)", "squares += 0.0"),
    "the key takes the query's norm": ("is_row, angles, key_norm", "is_row, angles, query_norm"),
    "the last heads are left out": ("is_row = row < num_tokens * NUM_KV_HEADS", "is_row = row < num_tokens"),
    "heads take each other's slots": ("head * cache_stride_head", "(head ^ 1) * cache_stride_head"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the variants are interpreted")
def test_faults_are_caught(
    fault: str, triton_device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = triton_interpreter.load_variant("rope_kv_write", tmp_path, [FAULTS[fault]])
    monkeypatch.setattr("quire.kernels.rope_kv_write.triton.rope_kv_write", variant.rope_kv_write)
    with pytest.raises(AssertionError):
        check(Problem(3, 2, 40, 32, with_norms=True), torch.float32, "triton", triton_device)


def test_refuses_what_it_cannot_do() -> None:
    query, key = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8)
    caches = torch.zeros(2, 4, 2, 16, 8)
    indices, table = torch.zeros(2, dtype=torch.int64), torch.zeros(9, 8)
    with pytest.raises(ValueError, match="both query and key"):
        rope_kv_write(query, key, key, indices, table, caches[0], caches[1], indices, torch.ones(8), None)
    with pytest.raises(ValueError, match="must have the dtype"):
        rope_kv_write(query, key, key, indices, table, *caches.double(), indices)
    with pytest.raises(ValueError, match="int64"):
        rope_kv_write(query, key, key, indices.int(), table, caches[0], caches[1], indices)
