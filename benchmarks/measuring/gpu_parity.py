"""Every Triton kernel against its reference, on the GPU at hand, before anything is timed: a fast wrong kernel is none.

The tests in tests/kernels say far more, and run on a GPU too if there is one; this is what fits before a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from measuring import gpu_cascade
from measuring.gpu_cases import EPS, Scale, paged_problems, with_codes
from quire.kernels.backend import Backend
from quire.kernels.log_probs import log_probs
from quire.kernels.paged_decode import paged_decode
from quire.kernels.paged_prefill import paged_prefill
from quire.kernels.rms_norm import rms_norm
from quire.kernels.rope_kv_write import rope_kv_write
from quire.kernels.sample import sample
from quire.kernels.targets import current_target

Result = Callable[[Backend], torch.Tensor]


@dataclass(frozen=True)
class Check:
    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def checked(name: str, compute: Result, tolerance: float, backend: Backend) -> Check:
    found, expected = compute(backend).double(), compute("reference").double()
    error = (found - expected).abs().max().item() if not found.isnan().any() else float("inf")
    return Check(name, error, tolerance)


def checks(scale: Scale, device: torch.device, backend: Backend) -> Iterator[Check]:
    """`backend`: "triton" on a GPU; a rehearsal takes "cpu"."""
    torch.manual_seed(0)
    for block_size in (16, 32):
        for name, lens, window in (("even", (96, 96), None), ("skewed", (1, 700, 33), None), ("window", (400, 90), 64)):
            (problem, *_) = paged_problems(scale, 1, lens, block_size, device)

            def decode(backend: Backend, p: object = problem, window: int | None = window) -> torch.Tensor:
                return paged_decode(
                    p.query, p.k_cache, p.v_cache, p.block_tables, p.seq_lens, p.scale, window, backend=backend
                )

            yield checked(f"decode, {name}, page {block_size}", decode, 1e-2, backend)
            (problem, *_) = paged_problems(scale, 48, [length + 48 for length in lens], block_size, device)

            def prefill(backend: Backend, p: object = problem, window: int | None = window) -> torch.Tensor:
                tables = p.block_tables, p.seq_lens, p.query_start
                return paged_prefill(
                    p.query, p.k_cache, p.v_cache, *tables, p.scale, p.query_len, window, backend=backend
                )

            yield checked(f"prefill, {name}, page {block_size}", prefill, 1e-2, backend)
    for name, compute in gpu_cascade.checks(scale, device):
        yield checked(name, compute, 1e-2, backend)
    yield from _codes_checks(scale, device, backend)
    yield from _small_checks(scale, device, backend)


def _codes_checks(scale: Scale, device: torch.device, backend: Backend) -> Iterator[Check]:
    """Pages of codes against float32 attention over what the codes stand for, relative to the largest result."""
    (problem, *_) = paged_problems(scale, 1, (300, 17, 96), 16, device)
    fp8 = current_target(device).fp8 if device.type == "cuda" else None
    for pages in (torch.int8, *([] if fp8 is None else [fp8])):
        p = with_codes(problem, pages)
        found = paged_decode(
            *(p.query, p.k_cache, p.v_cache, p.block_tables, p.seq_lens, p.scale, None, None, p.k_scales, p.v_scales),
            backend=backend,
        )
        caches = ((p.k_cache, p.k_scales), (p.v_cache, p.v_scales))
        keys, values = (codes.float() * scales.float().unsqueeze(-1) for codes, scales in caches if scales is not None)
        expected = paged_decode(
            p.query.float(), keys, values, p.block_tables, p.seq_lens, p.scale, backend="reference"
        ).double()
        error = ((found.double() - expected).abs().max() / expected.abs().max()).item()
        name = f"decode, pages {str(pages).removeprefix('torch.')}, relative"
        yield Check(name, error if math.isfinite(error) else math.inf, 5e-3)


def _small_checks(scale: Scale, device: torch.device, backend: Backend) -> Iterator[Check]:
    rows, dim = 37, 256
    x, residual = torch.randn((2, rows, dim), dtype=torch.bfloat16, device=device)
    weight = torch.randn(dim, dtype=torch.bfloat16, device=device)
    yield checked("RMS norm", lambda b: rms_norm(x, weight, EPS, residual.clone(), backend=b), 6e-2, backend)

    heads, kv_heads, head_dim = scale.num_heads, scale.num_kv_heads, scale.head_dim
    qkv = torch.randn((rows, heads + 2 * kv_heads, head_dim), dtype=torch.bfloat16, device=device)
    positions, slots = torch.arange(rows, device=device), torch.randperm(rows, device=device) + 16
    cos_sin = torch.rand((rows, head_dim), device=device)
    norm = torch.ones(head_dim, dtype=torch.bfloat16, device=device)

    def rotate(backend: Backend) -> torch.Tensor:
        query, key, value = qkv.clone().split([heads, kv_heads, kv_heads], dim=1)
        caches = torch.zeros((2, 5, kv_heads, 16, head_dim), dtype=torch.bfloat16, device=device)
        rope_kv_write(
            query, key, value, positions, cos_sin, caches[0], caches[1], slots, norm, norm, EPS, backend=backend
        )
        return torch.cat([query.flatten(), caches.flatten()])

    yield checked("head norms + RoPE + KV write", rotate, 6e-2, backend)

    logits = torch.randn((64, scale.vocab_size), device=device) * 3
    ids = torch.arange(64, device=device)
    yield checked("log-probabilities", lambda b: log_probs(logits, ids, 5, backend=b)[0], 1e-4, backend)
    options = [torch.full((64,), value, device=device) for value in (0.7, 0.9, 0.01)]
    top_k = torch.full((64,), 40, dtype=torch.int32, device=device)
    uniform = torch.rand(64, device=device).double().clamp(2**-24, 1 - 2**-24)

    def draw(backend: Backend) -> torch.Tensor:
        return sample(logits, options[0], top_k, options[1], options[2], uniform, backend=backend)

    yield checked("sampling, same tokens", draw, 0.0, backend)
