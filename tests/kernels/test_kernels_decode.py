"""Paged decode in Triton against float64, on shapes that do not fit its tiles, among poisoned pages."""

from __future__ import annotations

from pathlib import Path

import paged_problems
import pytest
import torch
import triton_interpreter
from paged_problems import Problem, Shape, check, far_apart, launched, make_problem, run_decode

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def shape_of(*seq_lens: int, **options: int | None) -> Shape:
    return Shape((1,) * len(seq_lens), seq_lens, **options)  # type: ignore[arg-type]


SHAPES = [
    shape_of(1, 15, 16, 17, 33, group_size=4, head_dim=64),
    shape_of(31, 32, 33, 100, group_size=1, head_dim=128, block_size=32),
    shape_of(63, 64, 65, group_size=3, head_dim=80),
    shape_of(1, 20, 21, 90, num_kv_heads=1, group_size=8, head_dim=96, window=20),
    shape_of(70, 7, group_size=4, head_dim=40, window=200, block_size=32),
    shape_of(77, 130, group_size=2, head_dim=32, block_size=8, window=64),
    shape_of(300, 2, num_kv_heads=1, group_size=1, head_dim=24, block_size=256),
    shape_of(45, num_kv_heads=1, group_size=40, head_dim=16),
    shape_of(600, 1, 257, num_kv_heads=1, group_size=4, head_dim=64),
    shape_of(23, 40, num_kv_heads=1, group_size=2, head_dim=256),
    shape_of(0, 20, 0, 0, 300, 0, num_kv_heads=1, group_size=2, head_dim=32),
    shape_of(0, 0, num_kv_heads=1, head_dim=32),
    shape_of(700, *[3, 18] * 8, num_kv_heads=1, group_size=2, head_dim=32),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64(shape: Shape, dtype: torch.dtype, triton_device: torch.device) -> None:
    check(run_decode, make_problem(shape, dtype, triton_device))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_dim_and_page(
    head_dim: int, block_size: int, dtype: torch.dtype, triton_device: torch.device
) -> None:
    shape = shape_of(130, 7, num_kv_heads=2, group_size=3, head_dim=head_dim, block_size=block_size, window=125)
    check(run_decode, make_problem(shape, dtype, triton_device))


def with_shares(problem: Problem, num_shares: int, block_n: int = 16) -> dict[str, object]:
    """Options of run_decode for so many programs a head and small tiles."""
    from quire.kernels.paged_decode.parameters import DecodeParameters

    shape = problem.shape
    block_d = max(16, 1 << (shape.head_dim - 1).bit_length())
    parameters = DecodeParameters(shape.group_size, 16, block_n, block_d, num_shares, num_warps=4, num_stages=2)
    return {"run": launched("paged_decode", parameters)}


@pytest.mark.parametrize("num_shares", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("window", [None, 100])
def test_any_number_of_shares(num_shares: int, window: int | None, triton_device: torch.device) -> None:
    """Sequences in one piece and in many, shares of many sequences and of none; what nobody writes stays NaN."""
    shape = shape_of(1, 64, 65, 330, 3, num_kv_heads=1, group_size=2, head_dim=32, window=window)
    problem = make_problem(shape, torch.float32, triton_device)
    check(run_decode, problem, **with_shares(problem, num_shares))


def test_default_shares_fill_the_device() -> None:
    from quire.kernels.paged_decode.parameters import decode_parameters
    from quire.kernels.targets import H100, MI300, Target

    def num_shares(num_seqs: int, max_seq_len: int, window: int | None = None, target: Target = H100) -> int:
        heads = {"head_dim": 128, "num_heads": 32, "num_kv_heads": 8}
        sizes = {"num_seqs": num_seqs, "max_seq_len": max_seq_len, "window": window}
        return decode_parameters(torch.bfloat16, **heads, **sizes, target=target).num_shares  # type: ignore[arg-type]

    assert [num_shares(num_seqs, 131_072) for num_seqs in (1, 16, 256)] == [2 * 132 // 8] * 3
    assert num_shares(256, 131_072, target=MI300) == 2 * 304 // 8
    assert num_shares(1, 1024) == 4
    assert num_shares(1, 131_072, window=1024) == 5


def test_which_blocks_hold_a_sequence_changes_no_bit(triton_device: torch.device) -> None:
    shape = shape_of(90, 33, 130, num_kv_heads=1)
    results = [
        run_decode(make_problem(shape, torch.bfloat16, triton_device, table_seed), backend="triton")
        for table_seed in range(3)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_what_a_neighbour_holds_changes_no_bit(triton_device: torch.device) -> None:
    """Sequences share programs, and pieces of them lie side by side: a NaN stays with whom it belongs to."""
    problem = make_problem(shape_of(100, 230, 90, num_kv_heads=1, head_dim=32), torch.bfloat16, triton_device)
    options = with_shares(problem, num_shares=4)
    expected = run_decode(problem, **options)  # type: ignore[arg-type]
    problem.query[1] = float("nan")
    result = run_decode(problem, **options)  # type: ignore[arg-type]
    assert result[1].isnan().all()
    assert torch.equal(result[::2], expected[::2])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU orders its programs itself")
def test_order_of_programs_changes_no_bit(triton_device: torch.device) -> None:
    problem = make_problem(shape_of(330, 0, 70, 5, num_kv_heads=2, head_dim=32), torch.float16, triton_device)
    options = with_shares(problem, num_shares=5)
    in_order = run_decode(problem, **options)  # type: ignore[arg-type]
    assert not in_order.isnan().any()
    for seed in range(3):
        with triton_interpreter.shuffled_programs(seed):
            assert torch.equal(run_decode(problem, **options), in_order)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's calls")
def test_a_window_skips_tiles(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the context, a window of 64 touches 5 or 6 tiles of 16, two dots each."""
    builder = triton_interpreter.interpreter.InterpreterBuilder
    create_dot, num_dots = builder.create_dot, 0

    def counted(self: object, *arguments: object) -> object:
        nonlocal num_dots
        num_dots += 1
        return create_dot(self, *arguments)

    monkeypatch.setattr(builder, "create_dot", counted)
    problem = make_problem(shape_of(1003, num_kv_heads=1, window=64), torch.float32, triton_device)
    check(run_decode, problem, **with_shares(problem, num_shares=3))
    assert 0 < num_dots <= 12


def test_strided_query_and_output(triton_device: torch.device) -> None:
    """Views of a fused qkv tensor, and of a wider output."""
    problem = make_problem(shape_of(20, 37, num_kv_heads=2, group_size=2), torch.float32, triton_device)
    qkv = torch.full((2, 8, 64), float("nan"), device=triton_device)
    qkv[:, :4] = problem.query
    wide = torch.full((2, 6, 100), 7.0, device=triton_device)
    strided = paged_problems.replace(problem, query=qkv[:, :4])
    run_decode(strided, backend="triton", out=wide[:, 1:5, 10:74])
    expected = run_decode(problem, backend="triton")
    assert torch.equal(wide[:, 1:5, 10:74], expected)
    wide[:, 1:5, 10:74] = 7.0
    assert (wide == 7.0).all()


def test_no_sequences(triton_device: torch.device) -> None:
    problem = make_problem(shape_of(20), torch.float32, triton_device)
    none = paged_problems.replace(
        problem, query=problem.query[:0], block_tables=problem.block_tables[:0], seq_lens=problem.seq_lens[:0]
    )
    assert run_decode(none, backend="triton").shape == (0, 8, 64)


@pytest.mark.parametrize("codes", [None, torch.int8], ids=str)
def test_offsets_past_2_to_the_31(codes: torch.dtype | None, triton_device: torch.device, tmp_path: Path) -> None:
    """Blocks, rows and scales so far apart that 32-bit offsets wrap around (CVE-2026-73558 in vLLM)."""
    if triton_device.type != "cpu":
        pytest.skip("the far pages lie in a sparse file")
    problem = make_problem(shape_of(40, 21, 35, num_kv_heads=1, head_dim=32), torch.float16, triton_device)
    problem = problem if codes is None else problem.as_codes(codes)
    stride = 2**29 + 4096
    parts = {name: getattr(problem, name) for name in ("k_cache", "v_cache", *problem.scales)}
    far = paged_problems.replace(
        problem,
        query=far_apart(problem.query, 2**30 + 64, tmp_path / "query"),
        **{name: far_apart(part, stride, tmp_path / name) for name, part in parts.items()},
    )
    out = far_apart(torch.full_like(problem.query, float("nan")), 2**30 + 64, tmp_path / "out")
    assert problem.block_tables.max().item() * stride > 2**31
    run_decode(far, backend="triton", out=out)
    assert torch.equal(out, run_decode(problem, backend="triton"))
