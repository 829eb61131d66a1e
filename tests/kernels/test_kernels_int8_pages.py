"""int8 pages: writing against the quantizer in plain torch, attention against float64 of what the codes stand for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton_interpreter
from paged_problems import Shape, check, make_problem, run_decode, run_prefill

from quire.kernels.kv_write import kv_write
from quire.kernels.paged_decode import paged_decode
from quire.kernels.paged_prefill import paged_prefill
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

FAULTS = [
    pytest.param(*case, id=f"{case[2]}-{case[3]}")
    for op, attend, shape in (("paged_decode", run_decode, DECODES[2]), ("paged_prefill", run_prefill, PREFILLS[2]))
    for case in [
        (attend, shape, op, "scale_at = block_id", "scale_at = 1 + block_id"),
        (attend, shape, op, "= position % BLOCK_SIZE\n", "= (position + 1) % BLOCK_SIZE\n"),
        (attend, shape, op, "result *= 1 / CODE_UNITS", "result *= 1 / 127"),
        (attend, shape, op, "scores *= ", "scores *= 1.01 * "),
        (attend, shape, op, "* CODE_UNITS)[None, :]", "* CODE_UNITS * 0 + CODE_UNITS)[None, :]"),
    ]
]


@pytest.mark.parametrize(("attend", "shape"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_on_a_cpu_equals_float64(attend: Attend, shape: Shape, dtype: torch.dtype) -> None:
    check(attend, make_problem(shape, dtype, CPU).as_codes(), backend="cpu")


def written(
    key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (6, key.shape[1], 16, key.shape[2])
    caches = torch.full((2, *shape), 99, dtype=torch.int8)
    scales = torch.full((2, *shape[:3]), -1.0, dtype=torch.bfloat16)
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
        torch.testing.assert_close(scales[blocks, :, offsets], expected_scales, rtol=0, atol=0, equal_nan=True)
        read = read_slots(cache, scales, blocks, offsets, torch.float64)
        error = (read - tokens.double()).abs()[finite]
        bound = 0.5 * expected_scales.double()[finite] * (1 + 1e-4)  # of a tie: codes are computed in float32
        assert (error <= bound[:, None] + 1e-30).all()
        assert not read[~finite].isfinite().any(dim=-1).all()
        untouched = torch.ones(6, 16, dtype=torch.bool)
        untouched[blocks, offsets] = False
        assert (cache.transpose(1, 2)[untouched] == 99).all()
        assert (scales.transpose(1, 2)[untouched] == -1).all()
        assert codes.abs().max() <= LARGEST_CODE[torch.int8]


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
        torch.ones(2, 4, 2, 16, dtype=torch.bfloat16),
    )
    with pytest.raises(ValueError, match="scales"):
        kv_write(key, key, codes[0], codes[1], slots)
    with pytest.raises(ValueError, match="scales"):
        kv_write(key, key, floats[0], floats[1], slots, scales[0], scales[1])


@pytest.mark.parametrize(("attend", "shape"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_in_triton_equals_float64(
    attend: Attend, shape: Shape, dtype: torch.dtype, triton_device: torch.device
) -> None:
    check(attend, make_problem(shape, dtype, triton_device).as_codes())


@pytest.mark.parametrize("head_dim", [64, 36])
def test_codes_of_triton_are_those_of_the_quantizer(head_dim: int, triton_device: torch.device) -> None:
    check_written("triton", torch.bfloat16, head_dim)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the variants are interpreted")
@pytest.mark.parametrize(("attend", "shape", "op", "old", "new"), FAULTS)
def test_faults_are_caught(
    attend: Attend, shape: Shape, op: str, old: str, new: str, triton_device: torch.device, tmp_path: Path
) -> None:
    problem = make_problem(shape, torch.float32, triton_device).as_codes()
    run = getattr(triton_interpreter.load_variant(op, tmp_path, []), op)
    check(attend, problem, run=run)
    run = getattr(triton_interpreter.load_variant(op, tmp_path, [(old, new)]), op)
    with pytest.raises(AssertionError):
        check(attend, problem, run=run)


@pytest.mark.parametrize("window", [None, 50])
def test_chunks_batches_and_blocks_change_no_bit(window: int | None) -> None:
    """On a CPU: written in one call or in five, read in one call or in many, wherever the blocks lie."""
    generator = torch.Generator().manual_seed(1)
    key, value = torch.randn(2, 300, 2, 40, generator=generator).bfloat16()
    query = torch.randn(300, 6, 40, generator=generator).bfloat16()
    results = []
    for cuts in ([0, 300], [0, 1, 65, 128, 299, 300]):
        caches = torch.full((2, 25, 2, 16, 40), 85, dtype=torch.int8)
        scales = torch.full((2, 25, 2, 16), float("nan"), dtype=torch.bfloat16)
        blocks = torch.randperm(24, generator=generator)[:19].int() + 1
        rows = []
        for first, last in itertools.pairwise(cuts):
            positions = torch.arange(first, last)
            slots = blocks[positions // 16].long() * 16 + positions % 16
            kv_write(key[first:last], value[first:last], caches[0], caches[1], slots, scales[0], scales[1])
            lens, starts = torch.tensor([last], dtype=torch.int32), torch.tensor([0, last - first], dtype=torch.int32)
            arguments = (query[first:last], caches[0], caches[1], blocks[None], lens)
            rows.append(
                paged_prefill(*arguments, starts, 0.2, last - first, window, k_scales=scales[0], v_scales=scales[1])
            )
        decoded = paged_decode(query[-1:], *arguments[1:], 0.2, window, k_scales=scales[0], v_scales=scales[1])
        results.append((torch.cat(rows), decoded))
    for whole, in_chunks in zip(*results, strict=True):
        assert torch.equal(whole, in_chunks)
