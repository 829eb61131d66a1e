"""Paged prefill in Triton against float64: chunks, windows and mixed lengths, among poisoned pages."""

from __future__ import annotations

import random
from pathlib import Path

import paged_problems
import pytest
import torch
import triton_interpreter
from paged_problems import Problem, Shape, check, far_apart, launched, make_problem, run_prefill

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

SHAPES = [
    Shape((1, 7, 33, 64), (1, 7, 33, 64), num_kv_heads=1, group_size=4, head_dim=64),
    Shape((5, 17, 1), (70, 17, 130), num_kv_heads=1, group_size=8, head_dim=96),
    Shape((16, 16, 32), (16, 48, 64), group_size=1, head_dim=128, block_size=32),
    Shape((31, 65), (95, 65), num_kv_heads=1, group_size=3, head_dim=80),
    Shape((20, 45), (20, 111), num_kv_heads=1, group_size=4, head_dim=40, window=10),
    Shape((20, 45), (20, 111), num_kv_heads=1, group_size=1, head_dim=64, window=500, block_size=32),
    Shape((70,), (300,), num_kv_heads=1, group_size=2, head_dim=32, window=130),
    Shape((3, 0, 5), (3, 40, 50), num_kv_heads=1, group_size=2, head_dim=16, block_size=8),
    Shape((9,), (20,), num_kv_heads=1, group_size=40, head_dim=24),
    Shape((40,), (90,), num_kv_heads=1, group_size=2, head_dim=256),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64(shape: Shape, dtype: torch.dtype, triton_device: torch.device) -> None:
    check(run_prefill, make_problem(shape, dtype, triton_device))


def with_tiles(problem: Problem, block_m: int = 16, block_n: int = 16) -> dict[str, object]:
    """Options of run_prefill for small tiles, so that short sequences have tiles of every kind."""
    from quire.kernels.paged_prefill.parameters import PrefillParameters

    shape = problem.shape
    block_d = max(16, 1 << (shape.head_dim - 1).bit_length())
    parameters = PrefillParameters(shape.group_size, block_m, block_n, block_d, num_warps=4, num_stages=2)
    return {"run": launched("paged_prefill", parameters)}


@pytest.mark.parametrize("window", [None, 1, 5, 16, 17, 48, 200])
def test_every_kind_of_tile(window: int | None, triton_device: torch.device) -> None:
    """Tiles cut by the window, whole ones and those on the diagonal, with borders on and off the tiles' own."""
    shape = Shape((35, 16, 1), (99, 64, 33), num_kv_heads=1, group_size=2, head_dim=16, window=window)
    problem = make_problem(shape, torch.float32, triton_device)
    check(run_prefill, problem, **with_tiles(problem))


@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(seed: int, triton_device: torch.device) -> None:
    generator = random.Random(seed)
    num_seqs = generator.randint(1, 4)
    query_lens = tuple(generator.randint(0, 40) for _ in range(num_seqs))
    shape = Shape(
        query_lens,
        tuple(length + generator.choice([0, 0, 1, 15, 16, 50]) + (length == 0) for length in query_lens),
        num_kv_heads=generator.randint(1, 2),
        group_size=generator.choice([1, 2, 3, 5]),
        head_dim=generator.choice([8, 16, 20]),
        block_size=generator.choice([8, 16, 24]),
        window=generator.choice([None, generator.randint(1, 60)]),
        seed=seed,
    )
    problem = make_problem(shape, torch.float32, triton_device)
    check(run_prefill, problem, **with_tiles(problem))


def test_which_blocks_hold_a_sequence_changes_no_bit(triton_device: torch.device) -> None:
    shape = Shape((20, 33), (90, 33), num_kv_heads=1)
    results = [
        run_prefill(make_problem(shape, torch.bfloat16, triton_device, table_seed), backend="triton")
        for table_seed in range(3)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU orders its programs itself")
def test_order_of_programs_changes_no_bit(triton_device: torch.device) -> None:
    problem = make_problem(Shape((20, 9), (60, 9), num_kv_heads=2, head_dim=16), torch.float16, triton_device)
    in_order = run_prefill(problem, **with_tiles(problem))  # type: ignore[arg-type]
    with triton_interpreter.shuffled_programs(seed=0):
        assert torch.equal(run_prefill(problem, **with_tiles(problem)), in_order)  # type: ignore[arg-type]


def test_a_chunk_equals_the_same_rows_of_the_whole(triton_device: torch.device) -> None:
    """Prefill in two chunks gives what one gives, whatever lies past the first chunk's end."""
    whole = make_problem(Shape((75,), (75,), num_kv_heads=1, head_dim=32), torch.float32, triton_device)
    chunk = paged_problems.replace(
        whole,
        shape=Shape((40,), (40,), num_kv_heads=1, head_dim=32),
        query=whole.query[:40],
        seq_lens=torch.tensor([40], dtype=torch.int32, device=triton_device),
        query_start=torch.tensor([0, 40], dtype=torch.int32, device=triton_device),
    )
    expected = check(run_prefill, whole)[:40]
    assert torch.allclose(check(run_prefill, chunk), expected, atol=2e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's calls")
def test_a_window_skips_tiles(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 tokens with a window of 64 see 79 positions: at most 6 tiles of 16, two dots each."""
    builder = triton_interpreter.interpreter.InterpreterBuilder
    create_dot, num_dots = builder.create_dot, 0

    def counted(self: object, *arguments: object) -> object:
        nonlocal num_dots
        num_dots += 1
        return create_dot(self, *arguments)

    monkeypatch.setattr(builder, "create_dot", counted)
    shape = Shape((16,), (1003,), num_kv_heads=1, group_size=1, window=64)
    problem = make_problem(shape, torch.float32, triton_device)
    check(run_prefill, problem, **with_tiles(problem))
    assert 0 < num_dots <= 12


def test_strided_query_and_output(triton_device: torch.device) -> None:
    problem = make_problem(Shape((9, 12), (20, 37), group_size=2, head_dim=32), torch.float32, triton_device)
    qkv = torch.full((21, 8, 32), float("nan"), device=triton_device)
    qkv[:, :4] = problem.query
    wide = torch.full((21, 6, 50), 7.0, device=triton_device)
    strided = paged_problems.replace(problem, query=qkv[:, :4])
    run_prefill(strided, backend="triton", out=wide[:, 1:5, 10:42])
    assert torch.equal(wide[:, 1:5, 10:42], run_prefill(problem, backend="triton"))
    wide[:, 1:5, 10:42] = 7.0
    assert (wide == 7.0).all()


def test_offsets_past_2_to_the_31(triton_device: torch.device, tmp_path: Path) -> None:
    """Blocks and query rows so far apart that 32-bit offsets wrap around."""
    if triton_device.type != "cpu":
        pytest.skip("the far pages lie in a sparse file")
    problem = make_problem(Shape((5, 3), (40, 21), num_kv_heads=1, head_dim=32), torch.float16, triton_device)
    stride = 2**29 + 4096
    far = paged_problems.replace(
        problem,
        query=far_apart(problem.query, 2**29 + 64, tmp_path / "query"),
        k_cache=far_apart(problem.k_cache, stride, tmp_path / "keys"),
        v_cache=far_apart(problem.v_cache, stride, tmp_path / "values"),
    )
    assert problem.block_tables.max().item() * stride > 2**31
    assert torch.equal(run_prefill(far, backend="triton"), run_prefill(problem, backend="triton"))
