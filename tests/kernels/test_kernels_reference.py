"""The plain torch references against torch's own operations, and what the public functions refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paged_problems
import pytest
import torch
from paged_problems import Shape, make_problem, run_decode, run_prefill

from quire.kernels.kv_write import kv_write
from quire.kernels.paged_decode import paged_decode
from quire.kernels.paged_prefill import paged_prefill
from quire.kernels.rms_norm import rms_norm
from quire.kernels.rope import rope

CPU = torch.device("cpu")


def dense_attention(problem: paged_problems.Problem) -> torch.Tensor:
    """Gather each sequence whole and let torch attend with an explicit mask."""
    shape, outputs = problem.shape, []
    queries = problem.query.split(list(shape.query_lens))
    for sequence, (query_len, seq_len) in enumerate(zip(shape.query_lens, shape.seq_lens, strict=True)):
        blocks = problem.block_tables[sequence, : -(-seq_len // shape.block_size)].long()
        keys, values = (
            cache[blocks].transpose(0, 1).reshape(shape.num_kv_heads, -1, shape.head_dim)[:, :seq_len].nan_to_num(0.0)
            for cache in (problem.k_cache, problem.v_cache)
        )
        rows = torch.arange(seq_len - query_len, seq_len)[:, None]
        columns = torch.arange(seq_len)[None, :]
        visible = columns <= rows
        if shape.window is not None:
            visible &= rows - columns < shape.window
        attended = torch.nn.functional.scaled_dot_product_attention(
            queries[sequence].transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=visible,
            scale=problem.scale,
            enable_gqa=True,
        )
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 1, 20, 100])
def test_attention_references_equal_torch(window: int | None) -> None:
    shape = Shape(query_lens=(1, 7, 33), seq_lens=(45, 7, 50), group_size=3, head_dim=40, window=window)
    problem = make_problem(shape, torch.float64, CPU)
    result = run_prefill(problem, backend="reference")
    assert torch.allclose(result, dense_attention(problem), atol=1e-13)
    one_each = make_problem(Shape((1, 1, 1), (45, 1, 48), head_dim=40, window=window), torch.float64, CPU)
    decoded = run_decode(one_each, backend="reference")
    assert torch.allclose(decoded, dense_attention(one_each), atol=1e-13)
    assert torch.allclose(decoded, run_prefill(one_each, backend="reference"), atol=1e-13)


def test_rms_norm_reference_equals_torch() -> None:
    x, weight = torch.randn(5, 3, 24, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    expected = torch.nn.functional.rms_norm(x, (24,), weight, 1e-6)
    assert torch.allclose(rms_norm(x, weight, 1e-6, backend="reference"), expected, atol=1e-14)


def test_rms_norm_reference_adds_the_residual_in_place() -> None:
    x, weight = torch.randn(5, 24), torch.randn(24)
    residual = torch.randn(5, 24)
    total = x + residual
    normed = rms_norm(x, weight, 1e-6, residual, backend="reference")
    assert torch.equal(residual, total)
    assert torch.allclose(normed, torch.nn.functional.rms_norm(total, (24,), weight, 1e-6))


def test_rope_reference_is_a_rotation_of_complex_numbers() -> None:
    query, key = torch.randn(6, 4, 20, dtype=torch.float64), torch.randn(6, 2, 20, dtype=torch.float64)
    angles = torch.randn(9, 8, dtype=torch.float64)
    positions = torch.tensor([8, 0, 3, 3, 1, 7])
    expected = []
    for x in (query, key):
        numbers = torch.complex(x[..., :8], x[..., 8:16]) * torch.exp(1j * angles[positions])[:, None]
        expected.append(torch.cat([numbers.real, numbers.imag, x[..., 16:]], dim=-1))
    rope(query, key, positions, torch.cat([angles.cos(), angles.sin()], dim=-1), backend="reference")
    assert torch.allclose(query, expected[0])
    assert torch.allclose(key, expected[1])


def test_kv_write_reference_fills_the_slots() -> None:
    key, value = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    k_cache, v_cache = torch.zeros(2, 4, 2, 16, 8).half()
    kv_write(key, value, k_cache, v_cache, torch.tensor([16, 47, 30]), backend="reference")
    for cache, rows in ((k_cache, key), (v_cache, value)):
        written = {(1, 0): 0, (2, 15): 1, (1, 14): 2}
        for block in range(4):
            for offset in range(16):
                token = written.get((block, offset))
                expected = torch.zeros(2, 8).half() if token is None else rows[token].half()
                assert torch.equal(cache[block, :, offset], expected)


def test_auto_needs_a_device_with_kernels() -> None:
    x = torch.empty(2, 8, device="meta")
    with pytest.raises(ValueError, match="no kernels for device meta"):
        rms_norm(x, torch.empty(8, device="meta"), 1e-6)
    with pytest.raises(ValueError, match="none of auto, triton, cpu, reference"):
        rms_norm(torch.zeros(2, 8), torch.zeros(8), 1e-6, backend="cuda")  # type: ignore[arg-type]


PROBLEM = make_problem(Shape((1, 1), (9, 20)), torch.float32, CPU)


def attention_arguments(**changes: Any) -> dict[str, Any]:
    return {
        "query": PROBLEM.query,
        "k_cache": PROBLEM.k_cache,
        "v_cache": PROBLEM.v_cache,
        "block_tables": PROBLEM.block_tables,
        "seq_lens": PROBLEM.seq_lens,
        "scale": 0.1,
        "backend": "reference",
    } | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": PROBLEM.query[:, :, ::2]}, "query must be"),
        ({"query": PROBLEM.query.to(torch.int32)}, "dtype torch.int32 is not supported"),
        ({"query": PROBLEM.query.half()}, "must have the dtype"),
        ({"query": PROBLEM.query[:, :3]}, "multiple of the KV heads"),
        ({"query": PROBLEM.query[:1]}, "one row per sequence"),
        ({"k_cache": PROBLEM.k_cache[..., :32]}, "k_cache must be"),
        ({"v_cache": PROBLEM.v_cache[:3]}, "same shape"),
        ({"k_cache": PROBLEM.k_cache.transpose(2, 3)}, "k_cache must be"),
        ({"k_cache": PROBLEM.k_cache[:, :, ::2], "v_cache": PROBLEM.v_cache[:, :, ::2]}, "must be contiguous"),
        ({"block_tables": PROBLEM.block_tables.long()}, "block_tables must be int32"),
        ({"seq_lens": PROBLEM.seq_lens.long()}, "seq_lens must be"),
        ({"seq_lens": PROBLEM.seq_lens[:1]}, "seq_lens must be"),
        ({"seq_lens": PROBLEM.seq_lens.to("meta")}, "one device"),
        ({"sliding_window": 0}, "sliding_window must be"),
        ({"scale": 0.0}, "scale must be"),
        ({"out": PROBLEM.query.half()}, "out must be"),
    ],
)
def test_attention_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paged_decode(**attention_arguments(**changes))
    if message != "one row per sequence":
        starts = {"query_start": PROBLEM.query_start, "max_query_len": 1}
        with pytest.raises(ValueError, match=message):
            paged_prefill(**attention_arguments(**changes), **starts)


def test_prefill_refuses_a_short_query_start() -> None:
    with pytest.raises(ValueError, match="query_start must be"):
        paged_prefill(**attention_arguments(), query_start=PROBLEM.query_start[:2], max_query_len=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(torch.ones(2, 8)[:, ::2], torch.ones(4), 1e-6, backend="reference"), "x must be"),
        (lambda: rms_norm(torch.ones(2, 8), torch.ones(4), 1e-6, backend="reference"), "weight must be"),
        (lambda: rms_norm(torch.ones(2, 8), torch.ones(8).half(), 1e-6, backend="reference"), "weight must be"),
        (
            lambda: rms_norm(torch.ones(2, 2, 8), torch.ones(8), 1e-6, torch.ones(2, 2, 8), backend="reference"),
            "with a residual",
        ),
        (lambda: rotate(query=torch.ones(2, 8)), "query and key must be"),
        (lambda: rotate(key=torch.ones(3, 2, 8)), "must agree"),
        (lambda: rotate(positions=torch.zeros(2, dtype=torch.int32)), "positions must be"),
        (lambda: rotate(cos_sin=torch.ones(4, 10)), "cos_sin must be"),
        (lambda: rotate(cos_sin=torch.ones(4, 8).half()), "cos_sin must be"),
        (lambda: write(key=torch.ones(2, 8)), "key must be"),
        (lambda: write(value=torch.ones(2, 2, 4)), "value must be"),
        (lambda: write(slot_mapping=torch.zeros(2)), "slot_mapping must be"),
        (lambda: write(k_cache=torch.ones(3, 1, 16, 8)), "k_cache must be"),
    ],
)
def test_small_operations_refuse(call: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def rotate(**changes: torch.Tensor) -> None:
    arguments = {"query": torch.ones(2, 4, 8), "key": torch.ones(2, 2, 8), "positions": torch.zeros(2).long()}
    rope(**{**arguments, "cos_sin": torch.ones(4, 8), **changes}, backend="reference")


def write(**changes: torch.Tensor) -> None:
    arguments = {"key": torch.ones(2, 2, 8), "value": torch.ones(2, 2, 8), "slot_mapping": torch.zeros(2).long()}
    caches = {"k_cache": torch.ones(3, 2, 16, 8), "v_cache": torch.ones(3, 2, 16, 8)}
    kv_write(**{**arguments, **caches, **changes}, backend="reference")
