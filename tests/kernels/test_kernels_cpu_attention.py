"""Attention of the CPU kernels against float64, on shapes that do not fit their tiles, among poisoned pages."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paged_problems import Problem, Shape, check, far_apart, make_problem, run_decode, run_prefill

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")
NAN = float("nan")

Attend = Callable[..., torch.Tensor]


def decode_of(*seq_lens: int, **options: int | None) -> Shape:
    return Shape((1,) * len(seq_lens), seq_lens, **options)  # type: ignore[arg-type]


DECODES = [
    decode_of(1, 15, 16, 17, 33, group_size=4, head_dim=64),
    decode_of(31, 32, 33, 100, group_size=1, head_dim=128, block_size=32),
    decode_of(127, 128, 129, 256, 257, num_kv_heads=4, group_size=3, head_dim=64),
    decode_of(63, 500, group_size=3, head_dim=80),
    decode_of(1, 20, 21, 90, 300, num_kv_heads=1, group_size=8, head_dim=96, window=20),
    decode_of(70, 7, 290, group_size=4, head_dim=40, window=200, block_size=32),
    decode_of(77, 130, 131, group_size=2, head_dim=32, block_size=8, window=64),
    decode_of(300, 2, num_kv_heads=1, group_size=1, head_dim=24, block_size=256),
    decode_of(61, 200, num_kv_heads=1, group_size=5, head_dim=36, block_size=5, window=33),
    decode_of(45, num_kv_heads=1, group_size=40, head_dim=16),
    decode_of(600, 1, 257, num_kv_heads=1, group_size=7, head_dim=256, block_size=24),
]

PREFILLS = [
    Shape((1, 7, 33, 64), (1, 7, 33, 64), num_kv_heads=1, group_size=4, head_dim=64),
    Shape((5, 17, 1), (70, 17, 130), num_kv_heads=1, group_size=8, head_dim=96),
    Shape((16, 16, 32), (16, 48, 64), group_size=1, head_dim=128, block_size=32),
    Shape((31, 65, 200), (95, 65, 330), num_kv_heads=1, group_size=3, head_dim=80),
    Shape((20, 45, 129), (20, 111, 129), num_kv_heads=1, group_size=4, head_dim=40, window=10),
    Shape((20, 45), (20, 111), num_kv_heads=1, group_size=1, head_dim=64, window=500, block_size=32),
    Shape((170,), (300,), num_kv_heads=1, group_size=2, head_dim=32, window=130),
    Shape((3, 0, 5), (3, 40, 50), num_kv_heads=1, group_size=2, head_dim=16, block_size=8),
    Shape((30,), (77,), num_kv_heads=2, group_size=5, head_dim=36, block_size=5, window=33),
    Shape((9,), (20,), num_kv_heads=1, group_size=40, head_dim=24),
    Shape((40,), (90,), num_kv_heads=1, group_size=2, head_dim=256),
]

EITHER = pytest.mark.parametrize(
    ("attend", "shape"),
    [
        pytest.param(run_decode, decode_of(90, 33, 700, num_kv_heads=2, group_size=3), id="decode"),
        pytest.param(
            run_decode,
            decode_of(900, 33, 700, *[130] * 14, num_kv_heads=2, group_size=3),
            id="decode, heads of a block together, the first sequence in parts",
        ),
        pytest.param(run_prefill, Shape((20, 33, 150), (90, 33, 300), num_kv_heads=2, group_size=3), id="prefill"),
    ],
)


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def only(problem: Problem, sequence: int, first: int = 0, last: int | None = None) -> Problem:
    """Tokens [first, last) of the new ones of one sequence, as a problem of its own: a chunk of its prompt."""
    query_len, seq_len = problem.shape.query_lens[sequence], problem.shape.seq_lens[sequence]
    last = query_len if last is None else last
    start = int(problem.query_start[sequence])
    length = seq_len - query_len + last
    return replace(
        problem,
        shape=replace(problem.shape, query_lens=(last - first,), seq_lens=(length,)),
        query=problem.query[start + first : start + last],
        block_tables=problem.block_tables[sequence : sequence + 1],
        seq_lens=torch.tensor([length], dtype=torch.int32),
        query_start=torch.tensor([0, last - first], dtype=torch.int32),
    )


def slot_of(problem: Problem, sequence: int, position: int) -> tuple[int, int]:
    block, offset = divmod(position, problem.shape.block_size)
    return int(problem.block_tables[sequence, block]), offset


@pytest.mark.parametrize("shape", DECODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_equals_float64(shape: Shape, dtype: torch.dtype) -> None:
    check(run_decode, make_problem(shape, dtype, CPU), backend="cpu")


@pytest.mark.parametrize("shape", PREFILLS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_equals_float64(shape: Shape, dtype: torch.dtype) -> None:
    check(run_prefill, make_problem(shape, dtype, CPU), backend="cpu")


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed: int) -> None:
    generator = random.Random(seed)
    query_lens = tuple(generator.randint(0, 90) for _ in range(generator.randint(1, 4)))
    shape = Shape(
        query_lens,
        tuple(length + generator.choice([0, 0, 1, 15, 63, 64, 200]) + (length == 0) for length in query_lens),
        num_kv_heads=generator.randint(1, 3),
        group_size=generator.choice([1, 2, 3, 4, 6, 9]),
        head_dim=generator.choice([8, 16, 20, 64, 72]),
        block_size=generator.choice([1, 4, 8, 16, 24, 64]),
        window=generator.choice([None, generator.randint(1, 150)]),
        seed=seed,
    )
    check(run_prefill, make_problem(shape, torch.float32, CPU), backend="cpu")
    decode = replace(shape, query_lens=(1,) * len(query_lens))
    check(run_decode, make_problem(decode, torch.float32, CPU), backend="cpu")


@EITHER
def test_a_wrong_page_is_noticed(attend: Attend, shape: Shape) -> None:
    """The tests above would see one foreign token: a planted one does not pass."""
    problem = make_problem(shape, torch.float32, CPU)
    block_id, offset = slot_of(problem, 2, 40)
    problem.v_cache[block_id, 1, offset] += 0.01
    spoilt = attend(problem, backend="cpu")
    problem.v_cache[block_id, 1, offset] -= 0.01
    with pytest.raises(AssertionError, match="off by"):
        check(attend, problem, run=lambda *arguments, out, **_: out.copy_(spoilt))
    problem.block_tables[2, 2] = 0
    with pytest.raises(AssertionError):
        check(attend, problem, backend="cpu")


@EITHER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_which_blocks_hold_a_sequence_changes_no_bit(attend: Attend, shape: Shape, dtype: torch.dtype) -> None:
    results = [attend(make_problem(shape, dtype, CPU, table_seed), backend="cpu") for table_seed in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@EITHER
def test_the_number_of_threads_changes_no_bit(attend: Attend, shape: Shape, num_threads: Callable[[int], None]) -> None:
    problem = make_problem(shape, torch.float32, CPU)
    num_threads(1)
    expected = attend(problem, backend="cpu")
    for count in (2, 3, 16):
        num_threads(count)
        for _ in range(3):
            assert torch.equal(attend(problem, backend="cpu"), expected)


@EITHER
def test_the_batch_changes_no_bit(attend: Attend, shape: Shape, num_threads: Callable[[int], None]) -> None:
    """A sequence alone gives what it gives among others, also where its context is divided among threads."""
    problem = make_problem(shape, torch.bfloat16, CPU)
    num_threads(4)
    together = attend(problem, backend="cpu")
    for sequence in range(3):
        rows = slice(int(problem.query_start[sequence]), int(problem.query_start[sequence + 1]))
        assert torch.equal(attend(only(problem, sequence), backend="cpu"), together[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 50])
def test_chunks_of_a_prompt_change_no_bit(window: int | None, dtype: torch.dtype) -> None:
    whole = make_problem(Shape((300,), (333,), group_size=3, head_dim=40, window=window), dtype, CPU)
    expected = run_prefill(whole, backend="cpu")
    for first, last in [(0, 1), (1, 65), (65, 128), (128, 300)]:
        chunk = run_prefill(only(whole, 0, first, last), backend="cpu")
        assert torch.equal(chunk, expected[first:last])


@EITHER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_bad_query_spoils_its_own_row_alone(attend: Attend, shape: Shape, dtype: torch.dtype, bad: float) -> None:
    problem = make_problem(shape, dtype, CPU)
    expected = attend(problem, backend="cpu")
    row, head = int(problem.query_start[2]), 4
    problem.query[row, head, 11] = bad
    result = attend(problem, backend="cpu")
    assert result[row, head].isnan().all()
    result[row, head] = expected[row, head]
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [NAN, float("inf")])
@pytest.mark.parametrize("window", [None, 30])
def test_a_bad_token_spoils_those_that_see_it_alone(bad: float, window: int | None, dtype: torch.dtype) -> None:
    """What one token leaves in the cache reaches no earlier token and none past its window, though tiles share it."""
    shape = Shape((150,), (170,), num_kv_heads=2, group_size=3, head_dim=32, window=window)
    problem = make_problem(shape, dtype, CPU)
    expected = run_prefill(problem, backend="cpu")
    position = 20 + 75
    block_id, offset = slot_of(problem, 0, position)
    for cache in (problem.k_cache, problem.v_cache):
        spoilt = replace(problem, k_cache=problem.k_cache.clone(), v_cache=problem.v_cache.clone())
        (spoilt.k_cache if cache is problem.k_cache else spoilt.v_cache)[block_id, 1, offset] = bad
        result = run_prefill(spoilt, backend="cpu")
        last = 150 if window is None else 75 + window
        reached = torch.zeros(150, 6, dtype=torch.bool)
        reached[75:last, 3:] = True
        assert torch.equal(result[~reached], expected[~reached])
        assert not result[reached].isfinite().all(dim=-1).any()


@EITHER
def test_the_pages_stay_as_they_are(attend: Attend, shape: Shape) -> None:
    problem = make_problem(shape, torch.float32, CPU)
    before = [tensor.clone() for tensor in (problem.query, problem.k_cache, problem.v_cache, problem.block_tables)]
    attend(problem, backend="cpu")
    for tensor, old in zip(
        (problem.query, problem.k_cache, problem.v_cache, problem.block_tables), before, strict=True
    ):
        assert torch.equal(tensor.view(torch.int32), old.view(torch.int32))


@EITHER
def test_strided_query_and_output(attend: Attend, shape: Shape) -> None:
    """Views of a fused qkv tensor, and of a wider output, around which nothing changes."""
    problem = make_problem(shape, torch.float32, CPU)
    num_tokens = problem.query.shape[0]
    qkv = torch.full((num_tokens, 10, 64), NAN)
    qkv[:, :6] = problem.query
    wide = torch.full((num_tokens, 8, 100), 7.0)
    attend(replace(problem, query=qkv[:, :6]), backend="cpu", out=wide[:, 1:7, 10:74])
    assert torch.equal(wide[:, 1:7, 10:74], attend(problem, backend="cpu"))
    wide[:, 1:7, 10:74] = 7.0
    assert (wide == 7.0).all()


@EITHER
def test_no_sequences(attend: Attend, shape: Shape) -> None:
    problem = make_problem(shape, torch.float32, CPU)
    none = replace(
        problem,
        query=problem.query[:0],
        block_tables=problem.block_tables[:0],
        seq_lens=problem.seq_lens[:0],
        query_start=problem.query_start[:1],
    )
    assert attend(none, backend="cpu").shape == (0, 6, 64)


@EITHER
def test_offsets_past_2_to_the_31(attend: Attend, shape: Shape, tmp_path: Path) -> None:
    """Blocks and query rows so far apart that 32-bit offsets wrap around (CVE-2026-73558 in vLLM)."""
    lens = (40, 21, 35)
    query_lens = tuple(min(length, 5) for length in shape.query_lens[: len(lens)])
    problem = make_problem(Shape(query_lens, lens, num_kv_heads=1, head_dim=32), torch.float16, CPU)
    stride = 2**29 + 4096
    far = replace(
        problem,
        query=far_apart(problem.query, stride, tmp_path / "query"),
        k_cache=far_apart(problem.k_cache, stride, tmp_path / "keys"),
        v_cache=far_apart(problem.v_cache, stride, tmp_path / "values"),
    )
    assert int(problem.block_tables.max()) * stride > 2**31
    assert torch.equal(attend(far, backend="cpu"), attend(problem, backend="cpu"))


def test_large_scores_neither_overflow_nor_vanish() -> None:
    """Scores in the thousands, of which the softmax must subtract the largest across chunks and tiles."""
    for attend, shape in ((run_decode, decode_of(400)), (run_prefill, Shape((300,), (400,)))):
        problem = make_problem(shape, torch.float32, CPU)
        big = replace(problem, query=problem.query * 1000)
        result = attend(big, backend="cpu")
        expected = attend(big.to(torch.float64), backend="reference")
        assert (result.double() - expected).abs().max() < 2e-3  # a score's last place is 1e-4


@pytest.mark.parametrize("attend", [run_decode, run_prefill])
@pytest.mark.parametrize("group_size", [1, 2, 3, 5])
def test_what_an_earlier_call_left_in_memory_does_not_matter(attend: Attend, group_size: int) -> None:
    """The same problem with NaN as its queries, keys and values comes first and leaves its scratch memory to be reused.

    The single token ends with its tile, its vector, its page or none of them.
    """
    for length in (1, 15, 16, 17, 31, 32, 48, 63, 64, 65, 80, 127, 128):
        problem = make_problem(
            decode_of(length, num_kv_heads=1, group_size=group_size, head_dim=24), torch.float32, CPU
        )
        attend(replace(problem, query=problem.query * NAN), backend="cpu")
        nothing = problem.k_cache * NAN
        attend(replace(problem, k_cache=nothing, v_cache=nothing), backend="cpu")
        check(attend, problem, backend="cpu")


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_bad_token_is_seen_in_decode(bad: float) -> None:
    """By the heads that read it, in the sequence it is in; it is not averaged away."""
    problem = make_problem(decode_of(90, 300, num_kv_heads=2, group_size=3), torch.float32, CPU)
    expected = run_decode(problem, backend="cpu")
    block_id, offset = slot_of(problem, 1, 140)
    for cache in (problem.k_cache, problem.v_cache):
        before = cache[block_id, 0, offset].clone()
        cache[block_id, 0, offset] = bad
        result = run_decode(problem, backend="cpu")
        cache[block_id, 0, offset] = before
        assert not result[1, :3].isfinite().all(dim=-1).any()
        result[1, :3] = expected[1, :3]
        assert torch.equal(result, expected)
