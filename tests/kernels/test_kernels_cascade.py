"""Cascade decode in Triton against float64 of a flat decode: groups of every kind, among poisoned pages."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_interpreter
from cascade_problems import check_cascade, make_cascade, make_groups, run_cascade
from paged_problems import TOLERANCE, far_apart, run_decode

from quire.kernels.cascade_decode import PrefixGroups
from quire.kernels.paged_decode.parameters import DecodeParameters
from quire.kernels.paged_prefill.parameters import PrefillParameters

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = {"num_kv_heads": 1, "group_size": 2, "head_dim": 16}

# Lengths, members of each group, blocks of each group's prefix.
GROUPS: dict[str, tuple[list[int], list[list[int]], list[int]]] = {
    "all in one group": ([70, 90, 65, 100], [[0, 1, 2, 3]], [4]),
    "several groups and one that shares nothing": ([100, 90, 70, 200, 5, 33], [[0, 2], [3, 1], [4, 5]], [4, 5, 0]),
    "groups of one row": ([70, 40, 20], [[0], [2], [1]], [4, 1, 2]),
    "nothing is shared": ([70, 40, 20], [[2, 0, 1]], [0]),
    "groups without members": ([70, 90], [[], [0, 1], [], []], [3, 4, 0, 2]),
    "no member has more than its prefix": ([64, 64, 32], [[0, 1], [2]], [4, 2]),
    "more rows than a tile": ([40 + i for i in range(20)], [list(range(19, 2, -1)), [0, 1, 2]], [2, 1]),
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_equals_float64(name: str, backend: str, triton_device: torch.device) -> None:
    problem, groups = make_cascade(*GROUPS[name], torch.float32, triton_device, **SMALL)
    check_cascade(problem, groups, backend=backend)


def test_rows_that_pad_a_batch(triton_device: torch.device) -> None:
    lens, members = [0, 70, 0, 90, 0, 20], [[3, 1], [0, 5, 2, 4]]
    problem, groups = make_cascade(lens, members, [4, 0], torch.float32, triton_device, **SMALL)
    out = torch.full_like(problem.query, float("nan"))
    run_cascade(problem, groups, backend="triton", out=out)
    assert (out[problem.seq_lens == 0] == 0.0).all()
    assert (out - run_decode(problem, backend="triton")).abs().max() <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        {"num_kv_heads": 2, "group_size": 3, "head_dim": 80},
        {"num_kv_heads": 1, "group_size": 1, "head_dim": 128, "block_size": 32},
        {"num_kv_heads": 1, "group_size": 40, "head_dim": 64},
        {"num_kv_heads": 1, "group_size": 4, "head_dim": 256, "block_size": 8},
    ],
    ids=str,
)
def test_every_dtype_and_shape_of_heads(dtype: torch.dtype, shape: dict[str, int], triton_device: torch.device) -> None:
    members, prefix_blocks = [[0, 3, 2], [1, 4], [5]], [3, 2, 0]
    lens = [
        block * shape.get("block_size", 16) + extra
        for block, extra in ((3, 9), (2, 1), (3, 40), (3, 1), (2, 77), (0, 20))
    ]
    problem, groups = make_cascade(lens, members, prefix_blocks, dtype, triton_device, **shape)
    check_cascade(problem, groups)


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_pages_of_codes(codes: torch.dtype, dtype: torch.dtype, triton_device: torch.device) -> None:
    problem, groups = make_cascade(*GROUPS["several groups and one that shares nothing"], dtype, triton_device, **SMALL)
    check_cascade(problem.as_codes(codes), groups)


def with_shares(problem: Any, num_prefix_shares: int, num_shares: int, block_m: int = 16) -> dict[str, Any]:
    """Options of run_cascade for so many programs and small tiles, any of which may be a piece."""
    shape = problem.shape
    block_d = max(16, 1 << (shape.head_dim - 1).bit_length())
    prefix = PrefillParameters(shape.group_size, block_m, 16, block_d, 4, 2, num_prefix_shares)
    decode = DecodeParameters(shape.group_size, 16, 16, block_d, num_shares, num_warps=4, num_stages=2)

    def run(*arguments: Any, out: torch.Tensor | None = None, **scales: Any) -> torch.Tensor:
        from quire.kernels.cascade_decode.triton import launch

        out = torch.empty_like(arguments[0]) if out is None else out
        launch(*arguments, out, scales.get("k_scales"), scales.get("v_scales"), prefix, decode)
        return out

    return {"run": run}


@pytest.fixture
def small_pieces(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from quire.kernels.paged_decode import triton as decode
    from quire.kernels.paged_prefill import triton_pieces

    monkeypatch.setattr(triton_pieces, "MIN_TILES", 1)
    monkeypatch.setattr(decode, "MIN_TILES", 1)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("num_prefix_shares", "num_shares"), [(1, 1), (1, 40), (3, 4), (40, 1), (40, 40)])
def test_any_number_of_shares(num_prefix_shares: int, num_shares: int, triton_device: torch.device) -> None:
    lens, members = [150, 90, 170, 130, 5, 33, 95], [[0, 2, 3], [1, 6], [4, 5]]
    problem, groups = make_cascade(lens, members, [7, 5, 0], torch.float32, triton_device, **SMALL)
    check_cascade(problem, groups, **with_shares(problem, num_prefix_shares, num_shares))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("seed", range(6))
def test_random_groups(seed: int, triton_device: torch.device) -> None:
    rng = random.Random(seed)
    order = rng.sample(range(12), 12)
    cuts = sorted(rng.choices(range(13), k=rng.randint(0, 4)))
    members = [order[a:b] for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
    prefix_blocks = [rng.choice([0, 1, 2, 7]) for _ in members]
    block_size = rng.choice([8, 16, 24])
    lens = [1] * 12
    for group, blocks in zip(members, prefix_blocks, strict=True):
        for row in group:
            lens[row] = max(1, blocks * block_size + rng.choice([0, 1, 5, 16, 60]))
    shape = {"num_kv_heads": rng.randint(1, 2), "group_size": rng.choice([1, 2, 5]), "head_dim": rng.choice([8, 20])}
    problem, groups = make_cascade(
        lens, members, prefix_blocks, torch.float32, triton_device, block_size=block_size, **shape
    )
    options = with_shares(problem, rng.choice([1, 5, 30]), rng.choice([1, 5, 30]), rng.choice([16, 32]))
    check_cascade(problem, groups, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU orders its programs itself")
@pytest.mark.usefixtures("small_pieces")
def test_order_of_programs_changes_no_bit(triton_device: torch.device) -> None:
    problem, groups = make_cascade(
        [150, 90, 170, 0, 95], [[0, 2], [1, 4], [3]], [7, 5, 0], torch.float16, triton_device, **SMALL
    )
    options = with_shares(problem, 5, 5)
    in_order = run_cascade(problem, groups, **options)
    assert not in_order.isnan().any()
    for seed in range(3):
        with triton_interpreter.shuffled_programs(seed):
            assert torch.equal(run_cascade(problem, groups, **options), in_order)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.usefixtures("small_pieces")
def test_what_a_neighbour_asks_changes_no_bit(triton_device: torch.device) -> None:
    """Rows of a group share tiles, and their pieces lie side by side: a NaN stays with whom it belongs to."""
    lens, members = [150, 90, 170, 130, 20], [[0, 2, 3], [1, 4]]
    problem, groups = make_cascade(lens, members, [7, 1], torch.bfloat16, triton_device, **SMALL)
    options = with_shares(problem, 5, 3)
    expected = run_cascade(problem, groups, **options)
    problem.query[2] = float("nan")
    result = run_cascade(problem, groups, **options)
    assert result[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(result[others], expected[others])


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's loads")
@pytest.mark.usefixtures("small_pieces")
def test_a_prefix_is_read_once_for_all_rows(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two dots for each tile of the prefix, not for each row; two for each row's rest."""
    builder = triton_interpreter.interpreter.InterpreterBuilder
    create_dot, num_dots = builder.create_dot, 0

    def counted(self: object, *arguments: object) -> object:
        nonlocal num_dots
        num_dots += 1
        return create_dot(self, *arguments)

    monkeypatch.setattr(builder, "create_dot", counted)
    problem, groups = make_cascade([330] * 8, [list(range(8))], [20], torch.float32, triton_device, **SMALL)
    check_cascade(problem, groups, **with_shares(problem, 4, 4))
    assert num_dots == 2 * (20 + 8)


def test_strided_query_and_output(triton_device: torch.device) -> None:
    problem, groups = make_cascade(*GROUPS["groups of one row"], torch.float32, triton_device, group_size=2)
    qkv = torch.full((3, 8, 64), float("nan"), device=triton_device)
    qkv[:, :4] = problem.query
    wide = torch.full((3, 6, 100), 7.0, device=triton_device)
    run_cascade(replace(problem, query=qkv[:, :4]), groups, backend="triton", out=wide[:, 1:5, 10:74])
    assert torch.equal(wide[:, 1:5, 10:74], run_cascade(problem, groups, backend="triton"))
    wide[:, 1:5, 10:74] = 7.0
    assert (wide == 7.0).all()


def test_offsets_past_2_to_the_31(triton_device: torch.device, tmp_path: Path) -> None:
    if triton_device.type != "cpu":
        pytest.skip("the far pages lie in a sparse file")
    lens, members, prefix_blocks = GROUPS["all in one group"]
    problem, groups = make_cascade(lens, members, prefix_blocks, torch.float16, triton_device, **SMALL)
    far = replace(
        problem,
        query=far_apart(problem.query, 2**30 + 64, tmp_path / "query"),
        k_cache=far_apart(problem.k_cache, 2**29 + 4096, tmp_path / "keys"),
        v_cache=far_apart(problem.v_cache, 2**29 + 4096, tmp_path / "values"),
    )
    out = far_apart(torch.full_like(problem.query, float("nan")), 2**30 + 64, tmp_path / "out")
    run_cascade(far, groups, backend="triton", out=out)
    assert torch.equal(out, run_cascade(problem, groups, backend="triton"))


def test_what_does_not_fit_is_refused(triton_device: torch.device) -> None:
    problem, groups = make_cascade(*GROUPS["all in one group"], torch.float32, triton_device, **SMALL)
    wrong: list[PrefixGroups] = [
        replace(groups, rows=groups.rows[:-1]),
        replace(groups, rows=groups.rows.long()),
        replace(groups, group_start=groups.group_start[:-1]),
        replace(groups, row_prefix_lens=groups.row_prefix_lens.repeat(2)[::2]),
        PrefixGroups(groups.rows, groups.group_start[:1], groups.prefix_lens[:0], groups.row_prefix_lens),
    ]
    for bad in wrong:
        with pytest.raises(ValueError, match="group"):
            run_cascade(problem, bad, backend="reference")
    with pytest.raises(ValueError, match="no body for CPUs"):
        run_cascade(problem, groups, backend="cpu")
    none = replace(
        problem, query=problem.query[:0], block_tables=problem.block_tables[:0], seq_lens=problem.seq_lens[:0]
    )
    no_groups = make_groups([[]], [0], triton_device)
    assert run_cascade(none, no_groups, backend="triton").shape == (0, 2, 16)


CASCADE = "quire.kernels.cascade_decode.triton"
PIECES = "quire.kernels.paged_prefill.triton_pieces"
TILES = "quire.kernels.paged_prefill.triton_tiles"
DECODE = "quire.kernels.paged_decode.triton"
FAULTS = {
    "a row sees its prefix again": (DECODE, "visible = visible & (position >= prefix_len)", "visible = visible"),
    "a whole rest is taken for the whole": (DECODE, "is_whole = is_whole & (prefix_len == 0)", "is_whole = is_whole"),
    "a prefix in one piece is lost": (PIECES, "is_left = piece_begin < piece_end", "is_left = is_left"),
    "a prefix is masked as if it were a chunk": (
        PIECES,
        "row_position = first_position + row * 0",
        "row_position = row_position",
    ),
    "queries are those of other rows": (PIECES, "token_row = tl.load(rows + token_row,", "tl.load(rows + token_row,"),
    "a prefix is looked for in another row": (PIECES, "tl.load(rows + start)", "start"),
    "a prefix ends a position early": (
        TILES,
        "first_position = seq_len - 1 + first_token * 0",
        "first_position = seq_len - 2 + first_token * 0",
    ),
    "results go to other rows": (
        CASCADE,
        "out_at = out + sequence *",
        "out_at = out + (start + first_member + row_in_tile) *",
    ),
    "prefixes are not merged": (CASCADE, "if prefix_len > 0:", "if prefix_len > 1000:"),
    "a rest that is empty is merged": (CASCADE, "first_share, num_pieces = 0, 0", "first_share, num_pieces = 0, 1"),
    "who shares nothing is left out": (CASCADE, "(prefix_len == 0) & (num_pieces == 1)", "(prefix_len == 0)"),
    "a padding row is not written": (CASCADE, "if seq_len == 0:", "if seq_len < 0:"),
}


def check_variant(tmp_path: Path, fault: tuple[str, str, str] | None, device: torch.device) -> None:
    def load(name: str, imports: list[Any]) -> Any:
        return triton_interpreter.load_variant_of(
            name, tmp_path, [fault[1:]] if fault and fault[0] == name else [], imports
        )

    tiles = load(TILES, [])
    pieces, decode = load(PIECES, [tiles]), load(DECODE, [])
    pieces.MIN_TILES = decode.MIN_TILES = 1
    cascade = load(CASCADE, [tiles, pieces, decode])
    lens, members = [150, 90, 170, 100, 5, 48, 24, 0], [[3, 0, 2], [6, 5], [1, 4, 7]]
    problem, groups = make_cascade(lens, members, [5, 3, 0], torch.float32, device, block_size=8, **SMALL)
    prefix = PrefillParameters(2, 16, 16, 16, num_warps=4, num_stages=2, num_shares=3)
    parameters = DecodeParameters(2, 16, 16, 16, num_shares=6, num_warps=4, num_stages=2)
    out = torch.full_like(problem.query, float("nan"))
    p = problem
    cascade.launch(
        *(p.query, p.k_cache, p.v_cache, p.block_tables, p.seq_lens, groups, p.scale, out, None, None),
        *(prefix, parameters),
    )
    assert not out.isnan().any()
    expected = run_decode(problem, backend="triton")
    assert (out - expected).abs().max() <= TOLERANCE[torch.float32]


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
