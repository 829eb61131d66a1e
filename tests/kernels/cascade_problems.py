"""Decodes whose sequences begin with the same blocks, in groups, among poisoned pages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import paged_problems
import torch
from paged_problems import TOLERANCE, Problem, Shape, make_problem

from quire.kernels.cascade_decode import PrefixGroups, cascade_decode
from quire.kernels.paged_decode import paged_decode


def make_groups(members: list[list[int]], prefix_lens: list[int], device: torch.device) -> PrefixGroups:
    """Groups of the rows [0, S), all of which are in one."""
    rows = [row for group in members for row in group]
    starts = torch.tensor([0, *(len(group) for group in members)]).cumsum(0)
    by_row = dict(
        zip(rows, (length for group, length in zip(members, prefix_lens, strict=True) for _ in group), strict=True)
    )
    numbers = (rows, starts.tolist(), prefix_lens, [by_row[row] for row in sorted(by_row)])
    return PrefixGroups(*(torch.tensor(part, dtype=torch.int32, device=device) for part in numbers))


def make_cascade(
    seq_lens: list[int],
    members: list[list[int]],
    prefix_blocks: list[int],
    dtype: torch.dtype,
    device: torch.device,
    **shape: Any,
) -> tuple[Problem, PrefixGroups]:
    """As make_problem; then each group's first blocks are those of its first member, and the others' are poison."""
    problem = make_problem(Shape((1,) * len(seq_lens), tuple(seq_lens), **shape), dtype, device)
    tables = problem.block_tables.clone()
    for group, num_blocks in zip(members, prefix_blocks, strict=True):
        for row in group[1:]:
            unused = tables[row, :num_blocks].long()
            problem.k_cache[unused] = problem.v_cache[unused] = float("nan")
            tables[row, :num_blocks] = tables[group[0], :num_blocks]
    prefix_lens = [num_blocks * problem.shape.block_size for num_blocks in prefix_blocks]
    return replace(problem, block_tables=tables), make_groups(members, prefix_lens, device)


def run_cascade(problem: Problem, groups: PrefixGroups, run: Any = cascade_decode, **options: Any) -> torch.Tensor:
    p = problem
    arguments = (p.query, p.k_cache, p.v_cache, p.block_tables, p.seq_lens, groups, p.scale)
    return run(*arguments, **p.scales, **options)  # type: ignore[no-any-return]


def check_cascade(problem: Problem, groups: PrefixGroups, **options: Any) -> torch.Tensor:
    """Compare with the flat float64 answer, as paged_problems.check does; the output starts out as NaN. Returns it."""
    out = torch.full_like(problem.query, float("nan"))
    result = run_cascade(problem, groups, out=out, **(options or {"backend": "triton"}))
    assert result is out
    expected = paged_problems.run_decode(problem.to(torch.float64), paged_decode, backend="reference")
    assert not expected.isnan().any()
    assert not result.isnan().any(), "poison reached the result"
    error = (result.double() - expected).abs().max().item()
    assert error <= TOLERANCE[problem.query.dtype], f"off by {error}"
    return result
