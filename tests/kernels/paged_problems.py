"""Attention problems whose every foreign slot is poisoned, and the float64 answer to them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quire.kernels.paged_decode import paged_decode
from quire.kernels.paged_prefill import paged_prefill
from quire.kernels.quantization import quantize

TOLERANCE = {torch.float32: 4e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}

Run = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """One case: for each sequence how many tokens are new and how many it has in all."""

    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    num_kv_heads: int = 2
    group_size: int = 4
    head_dim: int = 64
    block_size: int = 16
    window: int | None = None
    seed: int = 0

    def __str__(self) -> str:
        heads = f"{self.num_kv_heads}x{self.group_size}x{self.head_dim}"
        lens = "+".join(f"{new}of{total}" for new, total in zip(self.query_lens, self.seq_lens, strict=True))
        return f"{lens}-heads{heads}-page{self.block_size}-window{self.window}"


@dataclass(frozen=True)
class Problem:
    shape: Shape
    query: torch.Tensor  # [T, Hq, D]
    k_cache: torch.Tensor  # [num_blocks, Hk, block_size, D]
    v_cache: torch.Tensor
    block_tables: torch.Tensor  # [S, M] int32
    seq_lens: torch.Tensor  # [S] int32
    query_start: torch.Tensor  # [S + 1] int32
    k_scales: torch.Tensor | None = None  # [num_blocks, Hk, block_size] bfloat16 if the caches hold codes
    v_scales: torch.Tensor | None = None

    @property
    def scale(self) -> float:
        return float(self.shape.head_dim**-0.5)

    @property
    def scales(self) -> dict[str, torch.Tensor]:
        """Arguments of a kernel that reads pages of codes."""
        if self.k_scales is None or self.v_scales is None:
            return {}
        return {"k_scales": self.k_scales, "v_scales": self.v_scales}

    def to(self, dtype: torch.dtype) -> Problem:
        query = self.query.to(dtype)
        if self.k_scales is not None:
            return replace(self, query=query)
        return replace(self, query=query, k_cache=self.k_cache.to(dtype), v_cache=self.v_cache.to(dtype))

    def as_codes(self, dtype: torch.dtype = torch.int8) -> Problem:
        """The same tokens as codes and scales. A foreign slot keeps NaN as its scale and gets codes of 85."""
        codes, scales = zip(*(quantize(cache, dtype) for cache in (self.k_cache, self.v_cache)), strict=True)
        k_cache, v_cache = (
            code.view(torch.int8).masked_fill(scale.isnan()[..., None], 85).view(dtype)
            for code, scale in zip(codes, scales, strict=True)
        )
        return replace(self, k_cache=k_cache, v_cache=v_cache, k_scales=scales[0], v_scales=scales[1])


def make_problem(shape: Shape, dtype: torch.dtype, device: torch.device, table_seed: int = 0) -> Problem:
    """Random tokens in randomly chosen blocks (by `table_seed`).

    All slots that hold no visible token are NaN: the null block, blocks of nobody, the end of each last block. Table
    entries past the end and before the sliding window are 0, the null block.
    """
    generator = torch.Generator().manual_seed(shape.seed)
    block_size, head_dim, num_seqs = shape.block_size, shape.head_dim, len(shape.seq_lens)
    num_table_blocks = max(-(-length // block_size) for length in shape.seq_lens) + 1
    num_blocks = 1 + num_seqs * num_table_blocks + 3
    cache_shape = (num_blocks, shape.num_kv_heads, block_size, head_dim)
    caches = torch.full((2, *cache_shape), float("nan"))
    block_ids = iter((torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(table_seed)) + 1).tolist())
    tables = torch.zeros((num_seqs, num_table_blocks), dtype=torch.int32)
    for sequence, (query_len, seq_len) in enumerate(zip(shape.query_lens, shape.seq_lens, strict=True)):
        first = 0 if shape.window is None else max(0, seq_len - query_len - shape.window + 1)
        for block in range(first // block_size, -(-seq_len // block_size)):
            tables[sequence, block] = block_id = next(block_ids)
            begin, end = max(first - block * block_size, 0), min(seq_len - block * block_size, block_size)
            token_shape = (2, shape.num_kv_heads, end - begin, head_dim)
            caches[:, block_id, :, begin:end] = torch.randn(token_shape, generator=generator)
    num_tokens = sum(shape.query_lens)
    query = torch.randn((num_tokens, shape.num_kv_heads * shape.group_size, head_dim), generator=generator)
    query_start = torch.tensor([0, *shape.query_lens]).cumsum(0).int()
    return Problem(
        shape=shape,
        query=query.to(dtype).to(device),
        k_cache=caches[0].to(dtype).to(device),
        v_cache=caches[1].to(dtype).to(device),
        block_tables=tables.to(device),
        seq_lens=torch.tensor(shape.seq_lens, dtype=torch.int32, device=device),
        query_start=query_start.to(device),
    )


def run_decode(problem: Problem, run: Run = paged_decode, **options: Any) -> torch.Tensor:
    p = problem
    arguments = (p.query, p.k_cache, p.v_cache, p.block_tables, p.seq_lens, p.scale)
    return run(*arguments, sliding_window=p.shape.window, **p.scales, **options)


def run_prefill(problem: Problem, run: Run = paged_prefill, **options: Any) -> torch.Tensor:
    p = problem
    tables = (p.block_tables, p.seq_lens, p.query_start)
    arguments = (p.query, p.k_cache, p.v_cache, *tables, p.scale)
    lens = {"max_query_len": max(p.shape.query_lens), "sliding_window": p.shape.window}
    return run(*arguments, **lens, **p.scales, **options)


def check(
    attend: Callable[..., torch.Tensor], problem: Problem, out: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """Compare with float64 of the same rounded inputs; the output, `out` or a tensor of its own, starts out as NaN.
    Returns it.

    `attend` is run_decode or run_prefill; options are what it hands on, backend="triton" if there are none.
    The tolerance is absolute, and the values are averages of standard normal ones: it allows a rounding of the result
    and of the softmax weights to the dtype, and little more.
    """
    out = torch.full_like(problem.query, float("nan")) if out is None else out.fill_(float("nan"))
    result = attend(problem, out=out, **(options or {"backend": "triton"}))
    assert result is out
    expected = attend(problem.to(torch.float64), backend="reference")
    assert not expected.isnan().any()
    assert not result.isnan().any(), "poison reached the result"
    error = (result.double() - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= TOLERANCE[problem.query.dtype], f"off by {error}"
    return result


def launched(op: str, parameters: Any) -> Run:
    """`op` with launch parameters of the test's own; the module is looked up when called, as it may be interpreted."""

    def run(
        *arguments: Any,
        sliding_window: int | None,
        max_query_len: int = 1,
        out: torch.Tensor | None = None,
        k_scales: torch.Tensor | None = None,
        v_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = torch.empty_like(arguments[0]) if out is None else out
        launch = importlib.import_module(f"quire.kernels.{op}.triton").launch
        launch(*arguments, sliding_window, out, k_scales, v_scales, parameters)
        return out

    return run


def far_apart(tensor: torch.Tensor, stride: int, path: Path) -> torch.Tensor:
    """A copy of `tensor` whose first dimension has that stride, in a file that is almost all holes."""
    file = torch.from_file(str(path), shared=True, size=stride * tensor.shape[0], dtype=tensor.dtype)
    view = file.as_strided(tensor.shape, (stride, *tensor.contiguous().stride()[1:]))
    view.copy_(tensor)
    return view
