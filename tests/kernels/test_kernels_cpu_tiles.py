"""Linear layers and prefill attention in tile registers, where the processor has them; and in vectors there too."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from paged_problems import Problem, Shape, make_problem, run_prefill

from quire.engine.device import tokens_per_thread
from quire.kernels.cpu_tiles import has_tiles
from quire.kernels.linear import cpu as linear_cpu
from quire.kernels.linear import linear, pack, pack_bias
from quire.kernels.paged_prefill import cpu as prefill_cpu

CPU = torch.device("cpu")
needs_tiles = pytest.mark.skipif(
    not has_tiles(), reason="this processor has no tile registers (AMX), or may not use them"
)
IN = pytest.mark.parametrize(
    "in_tiles", [pytest.param(True, marks=needs_tiles, id="tiles"), pytest.param(False, id="vectors")]
)
NUM_ROWS = [1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 64, 90, 127, 128, 129, 145, 260]
SHAPES = [
    Shape((1,), (1,), num_kv_heads=1, group_size=1),
    Shape((5, 130, 33), (300, 130, 96), num_kv_heads=2, group_size=3),
    Shape((64, 65, 1), (128, 129, 64), num_kv_heads=1, group_size=4, head_dim=128, block_size=32),
    Shape((90,), (200,), num_kv_heads=1, group_size=2, head_dim=96, block_size=8, window=70),
    Shape((77, 3), (77, 500), num_kv_heads=2, group_size=1, head_dim=80, block_size=5),
    Shape((40,), (150,), num_kv_heads=1, group_size=5, head_dim=256, window=64),
    Shape((150,), (150,), num_kv_heads=1, group_size=7, head_dim=8),
    Shape((60,), (122,), num_kv_heads=1, group_size=1),  # the first row sees all of a tile but its last position
    Shape((38,), (165,), num_kv_heads=1, group_size=1, window=100),  # and here the last row all but the first one
]


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def multiply(x: torch.Tensor, weight: torch.Tensor, *, gated: bool, in_tiles: bool, has_bias: bool) -> torch.Tensor:
    bias = gaussian(len(weight), seed=2)
    packed_bias = pack_bias(bias, gated=gated) if has_bias else None
    with patch.object(linear_cpu, "has_tiles", lambda: in_tiles):
        return linear(x, pack(weight, gated=gated), packed_bias, activation="silu" if gated else None)


@IN
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("num_features", [128, 200])
@pytest.mark.parametrize("depth", [32, 96, 800])
def test_products_of_any_number_of_rows(
    depth: int, num_features: int, gated: bool, has_bias: bool, in_tiles: bool
) -> None:
    """Against float64; and a row is the same bit for bit whatever rows are beside it."""
    x, weight = gaussian(max(NUM_ROWS), depth, seed=0), gaussian(num_features, depth, seed=1) / depth**0.5
    exact = x.double() @ weight.double().T
    exact += gaussian(num_features, seed=2).double() if has_bias else 0.0
    if gated:
        gate, up = exact.chunk(2, dim=-1)
        exact = F.silu(gate) * up
    whole = multiply(x, weight, gated=gated, in_tiles=in_tiles, has_bias=has_bias)
    torch.testing.assert_close(whole.double(), exact, rtol=2**-8, atol=1e-5)
    for num_rows in NUM_ROWS:
        found = multiply(x[-num_rows:], weight, gated=gated, in_tiles=in_tiles, has_bias=has_bias)
        assert torch.equal(found, whole[-num_rows:]), num_rows


@needs_tiles
def test_no_row_behind_the_last_is_read() -> None:
    """The last row ends where memory ends: to read on would end the process."""
    script = f"""
import ctypes, mmap, torch
from quire.kernels.linear import linear, pack
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 17 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + 16 * page), ctypes.c_size_t(page), 0) == 0
whole = torch.frombuffer(memory, dtype=torch.bfloat16, count=8 * page)
weight = pack(torch.ones(128, 64, dtype=torch.bfloat16))
for num_rows in {NUM_ROWS}:
    assert (linear(whole[-64 * num_rows :].view(num_rows, 64), weight) == 0).all()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@IN
def test_a_gate_of_every_magnitude(in_tiles: bool) -> None:
    values = torch.cat([torch.logspace(-30, 4, 1000), torch.tensor([0.0, 88.0, 89.0, 104.0, 3e38])]).bfloat16()
    gate = torch.cat([values, -values])
    x = torch.zeros(len(gate), 32, dtype=torch.bfloat16)
    x[:, 0], x[:, 1] = gate, 1.0
    weight = torch.zeros(64, 32, dtype=torch.bfloat16)
    weight[:32, 0], weight[32:, 1] = 1.0, 1.0
    found = multiply(x, weight, gated=True, in_tiles=in_tiles, has_bias=False)
    exact = F.silu(gate.double()).unsqueeze(1).expand(-1, 32)
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-36)
    x[0, 0] = math.nan
    assert multiply(x, weight, gated=True, in_tiles=in_tiles, has_bias=False)[0].isnan().all()


def attend(problem: Problem, *, in_tiles: bool) -> torch.Tensor:
    with patch.object(prefill_cpu, "has_tiles", lambda: in_tiles):
        return run_prefill(problem, backend="cpu")


@IN
@pytest.mark.parametrize("pages", ["bfloat16", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_off_by_its_last_rounding_alone(shape: Shape, pages: str, in_tiles: bool) -> None:
    """As exact as with float32: one bfloat16 for each weight would be off by some 1e-3."""
    problem = make_problem(shape, torch.bfloat16, CPU)
    if pages == "int8":
        problem = problem.as_codes()
    exact = run_prefill(problem.to(torch.float64), backend="reference")
    torch.testing.assert_close(attend(problem, in_tiles=in_tiles).double(), exact, rtol=2**-8 * 1.01, atol=1e-4)


@IN
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("which", ["k_scales", "v_scales"])
def test_a_bad_scale_spoils_those_that_see_it_alone(which: str, window: int | None, in_tiles: bool) -> None:
    shape = Shape((150,), (170,), num_kv_heads=2, group_size=3, head_dim=32, window=window)
    problem = make_problem(shape, torch.bfloat16, CPU).as_codes()
    expected = attend(problem, in_tiles=in_tiles)
    position = 20 + 75
    block_id = int(problem.block_tables[0, position // 16])
    scales = getattr(problem, which).clone()
    scales[block_id, 1, position % 16] = math.nan
    result = attend(replace(problem, **{which: scales}), in_tiles=in_tiles)
    reached = torch.zeros(150, 6, dtype=torch.bool)
    reached[75 : 150 if window is None else 75 + window, 3:] = True
    assert torch.equal(result[~reached], expected[~reached])
    assert result[reached].isnan().all()


def test_steps_are_larger_where_arithmetic_is_faster() -> None:
    for in_tiles, expected in ((True, 128), (False, 64)):
        with patch("quire.engine.device.has_tiles", lambda in_tiles=in_tiles: in_tiles):
            assert tokens_per_thread(torch.bfloat16, None) == expected
            assert tokens_per_thread(torch.float32, None) == 64
            assert tokens_per_thread(torch.bfloat16, "int8") == 64
