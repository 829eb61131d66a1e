"""Prefill in pieces in Triton against float64: any number of shares, windows, mixed lengths, among poisoned pages."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import paged_problems
import pytest
import torch
import triton_interpreter
from paged_problems import Problem, Shape, check, far_apart, launched, make_problem, run_prefill

from quire.kernels.paged_prefill.parameters import MAX_HEADS_PER_PROGRAM, PrefillParameters

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PIECES = "quire.kernels.paged_prefill.triton_pieces"


def parameters_of(problem: Problem, num_shares: int, block_m: int = 16, block_n: int = 16) -> PrefillParameters:
    """Launch parameters of so many programs a set of heads and small tiles; every tile may be a piece."""
    shape = problem.shape
    block_d = max(16, 1 << (shape.head_dim - 1).bit_length())
    heads_per_program = -(-shape.group_size // -(-shape.group_size // MAX_HEADS_PER_PROGRAM))
    return PrefillParameters(heads_per_program, block_m, block_n, block_d, 4, 2, num_shares)


def with_shares(problem: Problem, num_shares: int) -> dict[str, Any]:
    return {"run": launched("paged_prefill", parameters_of(problem, num_shares))}


@pytest.fixture(autouse=True)
def small_pieces(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece of one tile is allowed, so that short sequences have many."""
    from quire.kernels.paged_prefill import triton_pieces

    monkeypatch.setattr(triton_pieces, "MIN_TILES", 1)


@pytest.mark.parametrize(
    "shape",
    [
        Shape((20, 3), (150, 90), num_kv_heads=1, group_size=4, head_dim=64),
        Shape((5, 17, 1), (70, 17, 130), num_kv_heads=2, group_size=3, head_dim=80, block_size=32),
        Shape((20, 45), (70, 111), num_kv_heads=1, group_size=1, head_dim=40, window=33, block_size=8),
        Shape((3, 0, 5), (3, 40, 90), num_kv_heads=1, group_size=2, head_dim=128),
        Shape((4,), (70,), num_kv_heads=1, group_size=40, head_dim=24),
        Shape((20,), (90,), num_kv_heads=1, group_size=2, head_dim=256),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64(shape: Shape, dtype: torch.dtype, triton_device: torch.device) -> None:
    problem = make_problem(shape, dtype, triton_device)
    check(run_prefill, problem, **with_shares(problem, 5))


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_pages_of_codes(codes: torch.dtype, triton_device: torch.device) -> None:
    shape = Shape((20, 3), (90, 33), num_kv_heads=1, group_size=2, head_dim=32)
    problem = make_problem(shape, torch.float16, triton_device).as_codes(codes)
    check(run_prefill, problem, **with_shares(problem, 5))


@pytest.mark.parametrize(("num_shares", "window"), [(1, None), (2, 17), (3, 100), (7, None), (7, 100), (64, 17)])
def test_any_number_of_shares(num_shares: int, window: int | None, triton_device: torch.device) -> None:
    """Query tiles in one piece and in many, shares of many and of none; pieces in which rows see nothing at all."""
    shape = Shape((35, 16, 1), (99, 164, 33), num_kv_heads=1, group_size=2, head_dim=16, window=window)
    problem = make_problem(shape, torch.float32, triton_device)
    check(run_prefill, problem, **with_shares(problem, num_shares))


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed: int, triton_device: torch.device) -> None:
    rng = random.Random(seed)
    query_lens = tuple(rng.randint(0, 40) for _ in range(rng.randint(1, 4)))
    shape = Shape(
        query_lens,
        tuple(length + rng.choice([0, 0, 1, 15, 16, 150]) + (length == 0) for length in query_lens),
        num_kv_heads=rng.randint(1, 2),
        group_size=rng.choice([1, 2, 3, 5]),
        head_dim=rng.choice([8, 16, 20]),
        block_size=rng.choice([8, 16, 24]),
        window=rng.choice([None, rng.randint(1, 60)]),
        seed=seed,
    )
    problem = make_problem(shape, torch.float32, triton_device)
    check(run_prefill, problem, **with_shares(problem, rng.choice([2, 5, 20])))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU orders its programs itself")
def test_order_of_programs_changes_no_bit(triton_device: torch.device) -> None:
    problem = make_problem(Shape((20, 9), (160, 9), num_kv_heads=2, head_dim=16), torch.float16, triton_device)
    options = with_shares(problem, 5)
    in_order = run_prefill(problem, **options)
    assert not in_order.isnan().any()
    for seed in range(3):
        with triton_interpreter.shuffled_programs(seed):
            assert torch.equal(run_prefill(problem, **options), in_order)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's calls")
def test_a_window_skips_tiles(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 tokens with a window of 64 see 71 positions: at most 6 tiles of 16, two dots each."""
    builder = triton_interpreter.interpreter.InterpreterBuilder
    create_dot, num_dots = builder.create_dot, 0

    def counted(self: object, *arguments: object) -> object:
        nonlocal num_dots
        num_dots += 1
        return create_dot(self, *arguments)

    monkeypatch.setattr(builder, "create_dot", counted)
    problem = make_problem(Shape((8,), (1003,), num_kv_heads=1, group_size=2, window=64), torch.float32, triton_device)
    check(run_prefill, problem, **with_shares(problem, 3))
    assert 0 < num_dots <= 12


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_what_a_neighbour_holds_changes_no_bit(triton_device: torch.device) -> None:
    problem = make_problem(Shape((9, 5, 7), (100, 130, 90), head_dim=16), torch.bfloat16, triton_device)
    options = with_shares(problem, 4)
    expected = run_prefill(problem, **options)
    problem.query[9:14] = float("nan")
    result = run_prefill(problem, **options)
    assert result[9:14].isnan().all()
    assert torch.equal(result[:9], expected[:9])
    assert torch.equal(result[14:], expected[14:])


def test_strided_query_and_output(triton_device: torch.device) -> None:
    problem = make_problem(Shape((9, 12), (80, 37), group_size=2, head_dim=32), torch.float32, triton_device)
    options = with_shares(problem, 3)
    qkv = torch.full((21, 8, 32), float("nan"), device=triton_device)
    qkv[:, :4] = problem.query
    wide = torch.full((21, 6, 50), 7.0, device=triton_device)
    run_prefill(paged_problems.replace(problem, query=qkv[:, :4]), out=wide[:, 1:5, 10:42], **options)
    assert torch.equal(wide[:, 1:5, 10:42], run_prefill(problem, **options))
    wide[:, 1:5, 10:42] = 7.0
    assert (wide == 7.0).all()


def test_offsets_past_2_to_the_31(triton_device: torch.device, tmp_path: Path) -> None:
    if triton_device.type != "cpu":
        pytest.skip("the far pages lie in a sparse file")
    problem = make_problem(Shape((5, 3), (90, 21), num_kv_heads=1, head_dim=32), torch.float16, triton_device)
    options = with_shares(problem, 3)
    far = paged_problems.replace(
        problem,
        query=far_apart(problem.query, 2**29 + 64, tmp_path / "query"),
        k_cache=far_apart(problem.k_cache, 2**29 + 4096, tmp_path / "keys"),
        v_cache=far_apart(problem.v_cache, 2**29 + 4096, tmp_path / "values"),
    )
    assert torch.equal(run_prefill(far, **options), run_prefill(problem, **options))


def test_few_query_tiles_on_a_long_context_are_cut() -> None:
    """What shapes decide: a short chunk on 16k tokens fills a GPU, a long one needs no pieces, a short context none."""
    from quire.kernels.paged_prefill.parameters import num_piece_shares, prefill_parameters
    from quire.kernels.targets import H100, MI300, Target

    def num_shares(new: int, num_seqs: int, seq_len: int, target: Target = H100) -> int | None:
        parameters = prefill_parameters(torch.bfloat16, 128, 4, new, target)
        return num_piece_shares(parameters, new * num_seqs, num_seqs, 8, seq_len, target)

    assert num_shares(512, 1, 16_384) == 2 * 132 // 8
    assert num_shares(16, 1, 131_072) == 4 * 132 // 8  # of four warps
    assert num_shares(512, 1, 16_384, MI300) == 2 * 304 // 8
    assert num_shares(512, 8, 16_384) is None
    assert num_shares(8192, 1, 8192) is None
    assert num_shares(512, 1, 512) is None


FAULTS = {
    "a row that sees nothing in a piece makes NaN": (
        f"{PIECES.replace('_pieces', '_tiles')}",
        'tl.where(new_highest == float("-inf"), 0.0, new_highest)',
        "new_highest",
    ),
    "a piece without weights makes NaN": (
        "quire.kernels.triton_shares",
        'tl.where(new_highest == float("-inf"), 0.0, new_highest)',
        "new_highest",
    ),
    "pieces are merged with equal weight": ("quire.kernels.triton_shares", "tl.exp2(lse - shift)", "tl.exp2(lse * 0)"),
    "pieces before are not scaled down": ("quire.kernels.triton_shares", "acc = acc * decay +", "acc = acc +"),
    "pieces that nobody wrote are merged": (PIECES, "+ row, piece < num_pieces)", "+ row, piece < BLOCK_P)"),
    "a piece is looked for in the wrong slot": (PIECES, "tl.where(piece == 0, item,", "tl.where(piece < 0, item,"),
    "the last piece is left out": (PIECES, "- share + 1)", "- share)"),
    "a piece is not kept": (PIECES, "is_left = piece_end - piece_begin < num_tiles", "is_left = num_tiles < 0"),
    "a piece ends a tile early": (
        PIECES,
        "first_tile + piece_begin, first_tile + piece_end,",
        "first_tile + piece_begin, first_tile + tl.maximum(piece_end - 1, piece_begin + 1),",
    ),
    "a token of another row is merged": (
        PIECES,
        "* HEADS_PER_PROGRAM + head_in_group %",
        "* BLOCK_P + head_in_group %",
    ),
    "an item begins in the wrong share": (
        "quire.kernels.triton_shares",
        "owner_of(first, num_tiles, num_used), share)",
        "owner_of(first, num_tiles, num_used) + 1, share)",
    ),
    "a piece goes on into the next share": ("quire.kernels.triton_shares", "tl.minimum(share_end, end)", "end"),
}


def check_variant(tmp_path: Path, fault: tuple[str, str, str] | None, device: torch.device) -> None:
    names = ("quire.kernels.triton_shares", PIECES.replace("_pieces", "_tiles"))
    broken = {fault[0]: [fault[1:]]} if fault else {}
    parts = [triton_interpreter.load_variant_of(name, tmp_path, broken.get(name, [])) for name in names]
    one_by_one = [("BLOCK_P=16", "BLOCK_P=1")]
    pieces = triton_interpreter.load_variant_of(PIECES, tmp_path, broken.get(PIECES, []) + one_by_one, parts)
    pieces.MIN_TILES = 1
    shape = Shape((30, 11), (150, 20), num_kv_heads=1, group_size=2, head_dim=16, window=70)
    problem = make_problem(shape, torch.float32, device)
    parameters = parameters_of(problem, 12)

    def run(*arguments: Any, max_query_len: int, sliding_window: int | None, out: torch.Tensor) -> torch.Tensor:
        pieces.launch_pieces(*arguments, sliding_window, out, None, None, parameters)
        return out

    check(run_prefill, problem, run=run)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_faults_are_caught(fault: str, triton_device: torch.device, tmp_path: Path) -> None:
    if triton_device.type != "cpu":
        pytest.skip("the variants are interpreted")
    with pytest.raises(AssertionError):
        check_variant(tmp_path, FAULTS[fault], triton_device)


def test_without_a_fault_nothing_is_caught(triton_device: torch.device, tmp_path: Path) -> None:
    if triton_device.type != "cpu":
        pytest.skip("the variants are interpreted")
    check_variant(tmp_path, None, triton_device)
