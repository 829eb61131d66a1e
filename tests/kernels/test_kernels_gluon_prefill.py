"""Prefill in Gluon for Hopper, interpreted: its source against float64, its protocol against planted faults."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import gluon_interpreter
import pytest
import torch
from gluon_machine import Deadlock, Race
from paged_problems import Problem, Shape, check, far_apart, make_problem, run_prefill

from quire.kernels import launch_tables
from quire.kernels.launch_tables import Entry, Table
from quire.kernels.paged_prefill.parameters import GLUON_LAUNCH, gluon_parameters, prefill_parameters, warp_specialized
from quire.kernels.targets import A100, B200, H100, MI300, Target

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return gluon_interpreter.load_prefill(tmp_path_factory.mktemp("gluon"))


def attend(
    module: ModuleType,
    problem: Problem,
    tile: tuple[int, int] | None = None,
    seed: int = 0,
    out: torch.Tensor | None = None,
) -> None:
    """Compare with float64; `tile` is block_n and num_slots, `seed` the order in which partitions and copies go.

    `out` is where the result is written, if not to a tensor of its own.
    """
    shape = problem.shape
    longest = max(shape.query_lens)
    reasoned = prefill_parameters(problem.query.dtype, shape.head_dim, shape.group_size, longest, H100)
    parameters = gluon_parameters(reasoned, *(tile or GLUON_LAUNCH[shape.head_dim]))

    def run(*arguments: Any, out: torch.Tensor, **_: Any) -> torch.Tensor:
        gluon_interpreter.Kernel.seed = seed
        module.launch_gluon(*arguments, out, parameters)
        return out

    check(run_prefill, problem, out, run=run)


def attend_in_orders(module: ModuleType, problem: Problem) -> None:
    for seed in range(4):
        attend(module, problem, (32, 3), seed)


SHAPES = [
    Shape((1, 7, 33, 64), (1, 7, 33, 64), num_kv_heads=1, group_size=4, head_dim=64),
    Shape((100,), (421,), num_kv_heads=2, group_size=2, head_dim=64, block_size=16),
    Shape((70, 33), (300, 65), num_kv_heads=2, group_size=4, head_dim=128),
    Shape((70, 33, 0), (300, 65, 12), num_kv_heads=1, group_size=7, head_dim=128, block_size=64),
    Shape((130,), (257,), num_kv_heads=1, group_size=1, head_dim=128, block_size=128),
    Shape((150, 5), (600, 7), num_kv_heads=1, group_size=1, head_dim=64, block_size=256),
    Shape((40, 9), (131, 200), num_kv_heads=1, group_size=17, head_dim=256, block_size=32),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64(shape: Shape, dtype: torch.dtype, interpreted: ModuleType) -> None:
    attend(interpreted, make_problem(shape, dtype, CPU))


@pytest.mark.parametrize("seed", range(12))
def test_any_order_and_ring(seed: int, interpreted: ModuleType) -> None:
    """Partitions and copies in random order, tiles and rings of all sizes, lengths on and off the borders."""
    generator = random.Random(seed)
    block_n = generator.choice([32, 64, 128])
    seq_lens = [generator.choice([block_n, 2 * block_n - 1, generator.randint(1, 400)]) for _ in range(2)]
    shape = Shape(
        tuple(generator.choice([length, generator.randint(1, length)]) for length in seq_lens),
        tuple(seq_lens),
        num_kv_heads=1,
        group_size=generator.choice([1, 3, 8]),
        head_dim=generator.choice([64, 128]),
        block_size=generator.choice([16, 32, 64, 128]),
        seed=seed,
    )
    tile = (block_n, generator.randint(2, 6))
    attend(interpreted, make_problem(shape, torch.bfloat16, CPU, table_seed=seed), tile, seed)


UNSAFE = {
    "the loader does not wait": ("mbarrier.wait(empty.index(slot)", "gl.maximum(slot"),
    "the loader waits for the wrong phase": ("(turn // num_slots & 1) ^ 1)", "turn // num_slots & 1)"),
    "one group's leaving is enough": ("count=NUM_GROUPS", "count=1"),
    "a barrier counts more groups than there are": ("count=NUM_GROUPS", "count=NUM_GROUPS + 1"),
    "too few bytes are expected": ("num_panels * num_boxes * desc", "num_boxes * desc"),
    "keys are left before they are multiplied": (
        "    scores = warpgroup_mma_wait(1, deps=(scores,))\n    leave(buffers, k_turn)\n",
        "    leave(buffers, k_turn)\n    scores = warpgroup_mma_wait(1, deps=(scores,))\n",
    ),
    "values are left before they are multiplied": (
        "    acc, factors = warpgroup_mma_wait(0, deps=(acc, factors))\n    leave(buffers, v_turn)\n",
        "    leave(buffers, v_turn)\n    acc, factors = warpgroup_mma_wait(0, deps=(acc, factors))\n",
    ),
    "values are never left": ("    leave(buffers, v_turn)\n", ""),
    "scores are not waited for": ("warpgroup_mma_wait(1, deps=(scores,))", "warpgroup_mma_wait(2, deps=(scores,))"),
    "a tile is not waited for": ("mbarrier.wait(full.index(turn % num_slots)", "gl.maximum(turn"),
    "a tile is waited for in the wrong phase": (
        "mbarrier.wait(full.index(turn % num_slots), turn // num_slots & 1)",
        "mbarrier.wait(full.index(turn % num_slots), turn // num_slots + 1 & 1)",
    ),
    "the next keys are not waited for": ("    wait_for(buffers, v_turn + 1)\n", ""),
    "the first values or second keys are not waited for": ("    wait_for(buffers, 1)\n", ""),
    "the next keys are waited for in the turn of the ones after": ("buffers, v_turn + 1)", "buffers, v_turn + 3)"),
    "weights are not kept until they are multiplied": (
        "    wait_for(buffers, v_turn + 1)\n    acc, factors = warpgroup_mma_wait(0, deps=(acc, factors))\n",
        "    wait_for(buffers, v_turn + 1)\n    acc = warpgroup_mma_wait(0, deps=(acc,))\n",
    ),
    "queries are not fenced": ("other=0.0))\n    fence_async_shared()\n", "other=0.0))\n"),
    "barriers are not fenced": ("    fence_async_shared()  # the TMA", "    # the TMA"),
    "values come in another order": ("gl.minimum(2 * tile + 2,", "gl.minimum(2 * tile + 4,"),
}


@pytest.mark.parametrize("fault", UNSAFE)
def test_faults_of_the_protocol_are_noticed(fault: str, tmp_path: Path) -> None:
    """In one order of a few, as some day on a GPU."""
    module = gluon_interpreter.load_prefill(tmp_path, [UNSAFE[fault]])
    problem = make_problem(Shape((140,), (300,), num_kv_heads=1, head_dim=128), torch.bfloat16, CPU)
    with pytest.raises((Race, Deadlock)):
        attend_in_orders(module, problem)


WRONG = {
    "slots behind the last position are read": (
        "gl.minimum(gl.maximum(first + BOX_ROWS - kv_end, 0), BOX_ROWS)",
        "first * 0",
    ),
    "a row sees the token after it": ("position[None, :] <= row_position", "position[None, :] <= 1 + row_position"),
    "a row does not see itself": ("position[None, :] <= row_position", "position[None, :] < row_position"),
    "what stands before a box is seen": ("(position >= first)[None, :] &", "(position >= 0)[None, :] &"),
    "a tile too many is not masked": ("(first_position + 1) // block_n", "first_position // block_n + 1"),
    "what was before does not decay": ("gl.convert_layout(decay,", "gl.convert_layout(decay * 0 + 1,"),
    "panels are in another order": ("row, panel * PANEL]", "row, (num_panels - 1 - panel) * PANEL]"),
    "the last tile is fetched like the others": ("if IS_LAST:\n            shift", "if False:\n            shift"),
    "pages come in another order": ("_block_ids(table, tile,", "_block_ids(table, last - 1 - tile,"),
    "the last pages come from the tile before": ("_block_ids(table, last,", "_block_ids(table, last - 1,"),
    "the second group has the first one's rows": ("strides, scale_log2, ROWS,", "strides, scale_log2, 0,"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_faults_of_the_arithmetic_are_noticed(fault: str, tmp_path: Path) -> None:
    module = gluon_interpreter.load_prefill(tmp_path, [WRONG[fault]])
    problem = make_problem(Shape((61,), (196,), num_kv_heads=1, head_dim=128), torch.bfloat16, CPU)
    with pytest.raises(AssertionError, match=r"poison|off by"):
        attend(module, problem, (64, 3))


def test_tables_are_not_read_beyond_the_last_page(interpreted: ModuleType, tmp_path: Path) -> None:
    """The table has but the pages that there are; a load from behind it is an error."""
    problem = make_problem(Shape((61,), (196,), num_kv_heads=1, head_dim=128), torch.bfloat16, CPU)
    exact = replace(problem, block_tables=problem.block_tables[:, :13].clone())
    attend(interpreted, exact, (64, 3))
    careless = gluon_interpreter.load_prefill(tmp_path, [("gl.minimum(first, kv_end - 1)", "first")])
    with pytest.raises(IndexError, match="outside its tensor"):
        attend(careless, exact, (64, 3))


def test_offsets_past_2_to_the_31(interpreted: ModuleType, tmp_path: Path) -> None:
    """Tokens so far apart that 32-bit offsets wrap around: each stride fits, their multiples do not."""
    problem = make_problem(Shape((70,), (100,), num_kv_heads=1, group_size=1), torch.bfloat16, CPU)
    far = replace(problem, query=far_apart(problem.query, 2**25 + 64, tmp_path / "query"))
    assert 69 * far.query.stride(0) > 2**31
    out = far_apart(torch.full_like(problem.query, float("nan")), 2**25 + 64, tmp_path / "out")
    attend(interpreted, far, out=out)
    narrow = ("    token = (start + token).to(gl.int64)\n", "    token = start + token\n")
    careless = gluon_interpreter.load_prefill(tmp_path, [narrow])
    with pytest.raises(OverflowError):
        attend(careless, far, out=out)


@pytest.mark.parametrize(("num_heads", "group_size"), [(2, 4), (1, 17)])
def test_nothing_else_is_written(num_heads: int, group_size: int, interpreted: ModuleType) -> None:
    """Rows and heads of a larger tensor, also where heads leave rows of a tile without a token."""
    shape = Shape((70, 0, 33), (300, 12, 65), num_heads, group_size, head_dim=64)
    problem = make_problem(shape, torch.bfloat16, CPU)
    num_tokens, num_heads, head_dim = problem.query.shape
    wide = torch.full((num_tokens + 2, num_heads + 3, head_dim + 32), 7.0, dtype=torch.bfloat16)
    attend(interpreted, problem, out=wide[1:-1, 1:-2, 16:-16])
    wide[1:-1, 1:-2, 16:-16] = 7.0
    assert (wide == 7.0).all()


def chosen(target: Target = H100, window: int | None = None, query_len: int = 512, **changes: Any) -> bool:
    dtype, pages = changes.get("dtype", torch.bfloat16), changes.get("pages")
    head_dim, block_size = changes.get("head_dim", 128), changes.get("block_size", 16)
    query = torch.empty((query_len, 8, head_dim), dtype=dtype, device="meta")
    k_cache = torch.empty((9, 2, block_size, head_dim), dtype=pages or dtype, device="meta")
    reasoned = prefill_parameters(dtype, head_dim, 4, query_len, target)
    found = warp_specialized(reasoned, query, k_cache, query_len, window, target)
    return found is not None and found.num_slots is not None


@pytest.fixture
def all_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_tables, "measured", lambda kernel, *_: {"block_n": 64, "num_slots": 4})


def test_nothing_is_chosen_that_no_table_has() -> None:
    assert not chosen()


def test_is_chosen_where_a_table_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry({"block_n": 128, "num_slots": 5}, 1.0, 2.0)
    table = Table({}, {"gluon_prefill": {"bfloat16, head 128, pages bfloat16": entry}})
    monkeypatch.setattr(launch_tables, "_table", lambda target: table)
    assert chosen()
    assert not chosen(dtype=torch.float16)


@pytest.mark.usefixtures("all_measured")
def test_is_chosen_for_what_it_computes() -> None:
    assert all(chosen(head_dim=head_dim) for head_dim in GLUON_LAUNCH)
    assert all(chosen(block_size=block_size) for block_size in (16, 32, 64, 128, 256))
    assert not any(chosen(target) for target in (A100, B200, MI300))
    assert not chosen(head_dim=96)
    assert not chosen(dtype=torch.float32)
    assert not chosen(pages=torch.int8)
    assert not chosen(block_size=8)
    assert not chosen(block_size=24)
    assert not chosen(window=1024)
    assert not chosen(query_len=16)
