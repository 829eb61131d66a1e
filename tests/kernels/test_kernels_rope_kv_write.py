"""Norm, rotation and KV write in one pass, against the three operations in float64 and plain torch."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.rope_kv_write import rope_kv_write

BLOCK_SIZE, NUM_BLOCKS = 16, 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dim", "rotary_dim"), [(4, 2, 64, 64), (3, 1, 20, 12), (2, 2, 5, 2)]
)
def test_is_what_the_three_do(
    num_heads: int, num_kv_heads: int, dim: int, rotary_dim: int, with_norms: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(dim)
    num_tokens = 9
    heads = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, dim, generator=generator).to(dtype)
    positions = torch.randint(0, 50, (num_tokens,), generator=generator)
    cos_sin = torch.randn(50, rotary_dim, generator=generator)
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=generator)[:num_tokens]
    norms = [torch.rand(dim, generator=generator).to(dtype) if with_norms else None for _ in range(2)]

    def run(kind: torch.dtype, backend: str) -> tuple[torch.Tensor, ...]:
        query, key, value = heads.to(kind).clone().split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        caches = torch.full((2, NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, dim), 7.0, dtype=kind)
        weights = [None if norm is None else norm.to(kind) for norm in norms]
        table = cos_sin.double() if kind == torch.float64 else cos_sin
        rope_kv_write(
            *(query, key, value, positions, table, caches[0], caches[1], slots, *weights, 1e-5),
            backend=backend,  # type: ignore[arg-type]
        )
        return query, caches[0], caches[1]

    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    for found, expected in zip(run(dtype, "cpu"), run(torch.float64, "reference"), strict=True):
        torch.testing.assert_close(found.double(), expected, **tolerance)


def test_refuses_what_it_cannot_do() -> None:
    query, key = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8)
    caches = torch.zeros(2, 4, 2, 16, 8)
    indices, table = torch.zeros(2, dtype=torch.int64), torch.zeros(9, 8)
    with pytest.raises(ValueError, match="both query and key"):
        rope_kv_write(query, key, key, indices, table, caches[0], caches[1], indices, torch.ones(8), None)
    with pytest.raises(ValueError, match="one dtype"):
        rope_kv_write(query, key, key, indices, table, *caches.bfloat16(), indices)
    with pytest.raises(ValueError, match="int64"):
        rope_kv_write(query, key, key, indices.int(), table, caches[0], caches[1], indices)
