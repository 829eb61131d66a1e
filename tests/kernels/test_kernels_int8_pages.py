"""int8 pages: writing against the quantizer in plain torch, attention against float64 of what the codes stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from paged_problems import Shape, check, make_problem, run_decode, run_prefill

from quire.kernels.kv_write import kv_write
from quire.kernels.quantization import LARGEST_CODE, quantize, read_slots

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

DECODES = [
    Shape((1,) * 5, (1, 15, 16, 17, 300), group_size=3, head_dim=64),
    Shape((1,) * 3, (31, 100, 257), group_size=1, head_dim=128, block_size=32),
    Shape((1,) * 3, (1, 21, 300), num_kv_heads=1, group_size=8, head_dim=96, window=20),
    Shape((1,) * 2, (61, 200), num_kv_heads=1, group_size=5, head_dim=36, block_size=8, window=33),
]
PREFILLS = [
    Shape((1, 7, 33, 64), (1, 7, 33, 64), num_kv_heads=1, group_size=4, head_dim=64),
    Shape((16, 16, 32), (16, 48, 64), group_size=1, head_dim=128, block_size=32),
    Shape((20, 45, 129), (20, 111, 129), num_kv_heads=1, group_size=4, head_dim=40, window=10),
]
CASES = [pytest.param(run_decode, shape, id=f"decode-{shape}") for shape in DECODES] + [
    pytest.param(run_prefill, shape, id=f"prefill-{shape}") for shape in PREFILLS
]

Attend = Callable[..., torch.Tensor]


@pytest.mark.parametrize(("attend", "shape"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_on_a_cpu_equals_float64(attend: Attend, shape: Shape, dtype: torch.dtype) -> None:
    check(attend, make_problem(shape, dtype, CPU).as_int8(), backend="cpu")


def written(
    key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (6, key.shape[1], 16, key.shape[2])
    caches = torch.full((2, *shape), 99, dtype=torch.int8)
    scales = torch.full((2, *shape[:3]), -1.0)
    kv_write(key, value, caches[0], caches[1], slots, scales[0], scales[1], backend=backend)  # type: ignore[arg-type]
    return caches[0], caches[1], scales[0], scales[1]


def check_written(backend: str, dtype: torch.dtype, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    sizes = 9 * torch.rand(11, 6, 1, generator=generator)
    heads = (torch.randn(11, 6, head_dim, generator=generator) * sizes).to(dtype)
    key, value = heads[:, :2], heads[:, 3:5]
    key[3, 0] = 0.0
    value[4, 1, -1] = float("inf")
    key[5, 1, 0] = float("nan")
    slots = torch.randperm(96, generator=generator)[:11]
    k_cache, v_cache, k_scales, v_scales = written(key, value, slots, backend)
    for tokens, cache, scales in ((key, k_cache, k_scales), (value, v_cache, v_scales)):
        codes, expected_scales = quantize(tokens)
        finite = expected_scales.isfinite()
        blocks, offsets = slots // 16, slots % 16
        assert torch.equal(cache[blocks, :, offsets][finite], codes[finite])
        torch.testing.assert_close(scales[blocks, :, offsets], expected_scales, rtol=1e-7, atol=0, equal_nan=True)
        read = read_slots(cache, scales, blocks, offsets, torch.float64)
        error = (read - tokens.double()).abs()[finite]
        bound = 0.5 * expected_scales.double()[finite] * (1 + 1e-4)  # of a tie: codes are computed in float32
        assert (error <= bound[:, None] + 1e-30).all()
        assert not read[~finite].isfinite().any(dim=-1).all()
        untouched = torch.ones(6, 16, dtype=torch.bool)
        untouched[blocks, offsets] = False
        assert (cache.transpose(1, 2)[untouched] == 99).all()
        assert (scales.transpose(1, 2)[untouched] == -1).all()
        assert codes.abs().max() <= LARGEST_CODE


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 36, 5])
def test_codes_are_those_of_the_quantizer(backend: str, dtype: torch.dtype, head_dim: int) -> None:
    check_written(backend, dtype, head_dim)


def test_caches_and_scales_belong_together() -> None:
    key, slots = torch.zeros(1, 2, 8), torch.zeros(1, dtype=torch.int64)
    codes, floats, scales = (
        torch.zeros(2, 4, 2, 16, 8, dtype=torch.int8),
        torch.zeros(2, 4, 2, 16, 8),
        torch.ones(2, 4, 2, 16),
    )
    with pytest.raises(ValueError, match="scales"):
        kv_write(key, key, codes[0], codes[1], slots)
    with pytest.raises(ValueError, match="scales"):
        kv_write(key, key, floats[0], floats[1], slots, scales[0], scales[1])


def test_gpus_have_no_kernels_for_them() -> None:
    problem = make_problem(DECODES[0], torch.bfloat16, CPU).as_int8()
    with pytest.raises(ValueError, match="int8 pages are for CPUs"):
        run_decode(problem, backend="triton")
