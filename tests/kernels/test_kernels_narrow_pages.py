"""Pages of 16 bits under rows of float32, on a CPU: written as the rows rounded, read as what they hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from paged_problems import Shape, check, make_problem, run_decode, run_prefill

from quire.kernels.kv_write import kv_write
from quire.kernels.rope_kv_write import rope_kv_write

CPU = torch.device("cpu")
PAGE_DTYPES = [torch.bfloat16, torch.float16]

CASES = [
    pytest.param(run, shape, id=f"{name}-{shape}")
    for name, run, shapes in (
        (
            "decode",
            run_decode,
            [
                Shape((1,) * 5, (1, 15, 16, 17, 300), group_size=3, head_dim=64),
                Shape((1,) * 3, (1, 21, 300), num_kv_heads=1, group_size=8, head_dim=96, window=20),
                Shape((1,) * 2, (61, 200), num_kv_heads=1, group_size=5, head_dim=36, block_size=8, window=33),
            ],
        ),
        (
            "prefill",
            run_prefill,
            [
                Shape((1, 7, 33, 64), (1, 7, 33, 64), num_kv_heads=1, group_size=4, head_dim=64),
                Shape((20, 45, 129), (20, 111, 129), num_kv_heads=1, group_size=4, head_dim=40, window=10),
            ],
        ),
    )
    for shape in shapes
]


@pytest.mark.parametrize("page_dtype", PAGE_DTYPES, ids=str)
@pytest.mark.parametrize(("attend", "shape"), CASES)
def test_attention_equals_float64(attend: Callable[..., torch.Tensor], shape: Shape, page_dtype: torch.dtype) -> None:
    """To float32's tolerance: nothing but what the pages hold is rounded."""
    problem = make_problem(shape, torch.float32, CPU)
    narrow = replace(problem, k_cache=problem.k_cache.to(page_dtype), v_cache=problem.v_cache.to(page_dtype))
    check(attend, narrow, backend="cpu")


@pytest.mark.parametrize(("rotary_dim", "with_norms"), [(None, False), *itertools.product((64, 36, 2), (False, True))])
@pytest.mark.parametrize("page_dtype", PAGE_DTYPES, ids=str)
def test_written_are_the_rounded_rows(page_dtype: torch.dtype, with_norms: bool, rotary_dim: int | None) -> None:
    """Of `rope_kv_write` and, where nothing is rotated, of `kv_write`; other slots keep every bit."""
    generator = torch.Generator().manual_seed(3)
    head_dim = rotary_dim if rotary_dim == 64 else 37
    qkv = torch.randn(9, 7, head_dim, generator=generator)
    qkv[2, 5, 1], qkv[3, 6, 2] = float("nan"), float("inf")
    table = torch.randn(20, rotary_dim or 2, generator=generator)
    positions = torch.randint(0, 20, (9,), generator=generator)
    slots = 16 + torch.randperm(80, generator=generator)[:9]
    norms = [torch.randn(head_dim, generator=generator) if with_norms else None for _ in range(2)]
    found = []
    for dtype in (torch.float32, page_dtype):
        query, key, value = qkv.clone().split([3, 2, 2], dim=1)
        caches = torch.full((2, 6, 2, 16, head_dim), 0.3, dtype=dtype)
        if rotary_dim is None:
            kv_write(key, value, caches[0], caches[1], slots, backend="cpu")
        else:
            rope_kv_write(query, key, value, positions, table, caches[0], caches[1], slots, *norms, backend="cpu")
        found.append((query, caches))
    (exact_query, exact), (query, narrow) = found
    torch.testing.assert_close(query, exact_query, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(narrow, exact.to(page_dtype), rtol=0, atol=0, equal_nan=True)
    assert narrow.isnan().any()


def test_other_pairs_are_refused() -> None:
    query, key, indices = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8), torch.zeros(2, dtype=torch.int64)
    caches = torch.zeros(2, 4, 2, 16, 8)
    narrow = query.bfloat16(), key.bfloat16(), key.bfloat16(), indices, torch.zeros(9, 8)
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(ValueError, match="the cache must have the dtype of what it is used with"):
            rope_kv_write(*narrow, *caches.to(dtype), indices)
