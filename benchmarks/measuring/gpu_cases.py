"""The kernels that `gpu.py` measures: inputs, ours, peers, the bytes that must move, and what is aimed at.

Goals are those of the project for an H100: a first one, and one that would be the best there is. Row numbers are those
of the table in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from measuring import gpu_peers
from measuring.gpu_peers import Paged
from measuring.gpu_timing import Call
from quire.kernels.log_probs import log_probs
from quire.kernels.paged_decode import paged_decode
from quire.kernels.paged_prefill import paged_prefill
from quire.kernels.quantization import quantize
from quire.kernels.rms_norm import rms_norm
from quire.kernels.rope_kv_write import rope_kv_write
from quire.kernels.sample import sample
from quire.kernels.targets import current_target

NUM_COPIES = 4
"""Inputs that calls rotate over: together they are larger than a GPU's second-level cache."""
EPS = 1e-6


@dataclass(frozen=True)
class Goal:
    """`figure` at least (of times, named after their unit: at most) `first`; `best` would be the best there is.

    The figures of kernels: "tb_per_s", "tflops", "us", "copy_share" and "ratio", the time of `peer` divided by ours.
    """

    figure: str
    first: float
    best: float
    peer: str = ""

    @property
    def name(self) -> str:
        return f"{self.figure} to {self.peer}" if self.peer else self.figure

    def is_met(self, value: float | None, wanted: float) -> bool | None:
        if value is None:
            return None
        is_time = self.figure == "us" or "ms" in self.figure.split("_")
        return value <= wanted if is_time else value >= wanted


@dataclass(frozen=True)
class Case:
    """`calls` run ours, one for each copy of the inputs; so do those of each peer, which compute the same."""

    name: str
    calls: Sequence[Call]
    peers: dict[str, Sequence[Call]] = field(default_factory=dict)
    num_bytes: int = 0
    """That must be read and written."""
    num_flops: int = 0
    goals: tuple[Goal, ...] = ()


@dataclass(frozen=True)
class Scale:
    """How large the problems are: those of the goals, or tiny ones for a rehearsal on a CPU."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151_936
    divisor: int = 1
    """Of batches and lengths."""

    def length(self, value: int) -> int:
        return max(16, value // self.divisor)

    def batch(self, value: int) -> int:
        return max(1, value // self.divisor)


FULL = Scale()
REHEARSAL = Scale(num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=499, divisor=128)


def paged_problems(
    scale: Scale,
    query_len: int,
    seq_lens: Sequence[int],
    block_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Paged]:
    """NUM_COPIES times the same lengths, each in caches of its own, in shuffled blocks."""
    num_blocks = [-(-length // block_size) for length in seq_lens]
    problems = []
    for _ in range(NUM_COPIES):
        shape = (2, sum(num_blocks) + 1, scale.num_kv_heads, block_size, scale.head_dim)
        caches = torch.randn(shape, dtype=dtype, device=device)
        block_ids = torch.randperm(sum(num_blocks), dtype=torch.int32) + 1
        tables = torch.zeros((len(seq_lens), max(num_blocks)), dtype=torch.int32)
        for row, ids in zip(tables, block_ids.split(num_blocks), strict=True):
            row[: len(ids)] = ids
        num_tokens = query_len * len(seq_lens)
        query = torch.randn((num_tokens, scale.num_heads, scale.head_dim), dtype=dtype, device=device)
        problems.append(
            Paged(
                query=query,
                k_cache=caches[0],
                v_cache=caches[1],
                block_tables=tables.to(device),
                seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
                host_seq_lens=tuple(seq_lens),
                query_len=query_len,
                scale=scale.head_dim**-0.5,
            )
        )
    return problems


def with_codes(problem: Paged, pages: torch.dtype) -> Paged:
    """The problem with keys and values as codes of `pages`."""
    (keys, k_scales), (values, v_scales) = quantize(problem.k_cache, pages), quantize(problem.v_cache, pages)
    return replace(problem, k_cache=keys, v_cache=values, k_scales=k_scales, v_scales=v_scales)


def _each(problems: Sequence[Paged], make: Callable[[Paged], Call]) -> list[Call]:
    return [make(problem) for problem in problems]


def decode_call(problem: Paged, window: int | None = None) -> Call:
    p, out = problem, torch.empty_like(problem.query)
    return lambda: paged_decode(
        *(p.query, p.k_cache, p.v_cache, p.block_tables, p.seq_lens, p.scale, window, out, p.k_scales, p.v_scales)
    )


def prefill_call(problem: Paged, window: int | None = None) -> Call:
    p, out = problem, torch.empty_like(problem.query)
    starts = torch.arange(len(p.host_seq_lens) + 1, dtype=torch.int32, device=p.query.device) * p.query_len
    return lambda: paged_prefill(
        p.query, p.k_cache, p.v_cache, p.block_tables, p.seq_lens, starts, p.scale, p.query_len, window, out
    )


def attention_bytes(scale: Scale, query_len: int, seq_lens: Sequence[int]) -> int:
    """Keys and values once, queries in, results out, of two bytes."""
    kv = 2 * sum(seq_lens) * scale.num_kv_heads * scale.head_dim
    return 2 * (kv + 2 * query_len * len(seq_lens) * scale.num_heads * scale.head_dim)


def attention_flops(scale: Scale, query_len: int, seq_lens: Sequence[int]) -> int:
    seen = sum(query_len * length - query_len * (query_len - 1) // 2 for length in seq_lens)
    return 4 * seen * scale.num_heads * scale.head_dim


def decode_case(
    scale: Scale,
    device: torch.device,
    name: str,
    seq_lens: Sequence[int],
    goals: tuple[Goal, ...],
    block_size: int = 16,
) -> Case:
    problems = paged_problems(scale, 1, seq_lens, block_size, device)
    calls, peers = _each(problems, decode_call), gpu_peers.attention(problems)
    num_bytes, num_flops = attention_bytes(scale, 1, seq_lens), attention_flops(scale, 1, seq_lens)
    return Case(name, calls, peers, num_bytes, num_flops, goals)


def codes_cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    """Pages of codes beside our own bfloat16 ones, at the lengths of the first case."""
    seq_lens = [scale.length(4096)] * scale.batch(64)
    problems = paged_problems(scale, 1, seq_lens, 16, device)
    peers = {"bfloat16 pages": _each(problems, decode_call)}
    num_bytes = attention_bytes(scale, 1, seq_lens) // 2 + 4 * sum(seq_lens) * scale.num_kv_heads
    goals = (Goal("ratio", 1 / 0.60, 1 / 0.53, *peers),)
    fp8 = current_target(device).fp8
    for pages in (torch.int8, *([] if fp8 is None or device.type == "cpu" else [fp8])):
        calls = _each([with_codes(problem, pages) for problem in problems], decode_call)
        name = f"4 decode, 64 of 4096, pages {str(pages).removeprefix('torch.')}"
        yield Case(name, calls, peers, num_bytes, 0, goals)


def zipf_lengths(count: int, mean: int) -> list[int]:
    """Lengths proportional to 1, 1/2, 1/3, ..., with that mean, each at least 16."""
    total = sum(1 / rank for rank in range(1, count + 1))
    return [max(16, int(mean * count / total / rank)) for rank in range(1, count + 1)]


def decode_cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    long, batch = scale.length(4096), scale.batch(64)
    goals = (Goal("tb_per_s", 2.4, 2.75), Goal("ratio", 1.3, 1.3, "vLLM Triton"), Goal("ratio", 1.0, 1.0, "FlashInfer"))
    yield decode_case(scale, device, "1 decode, 64 of 4096", [long] * batch, goals)
    goals = (Goal("copy_share", 0.70, 0.85),)
    yield decode_case(scale, device, "2 decode, 64 skewed, mean 4096", zipf_lengths(batch, long), goals)
    yield decode_case(scale, device, "3a decode, 1 of 4096", [long], (Goal("us", 18, 11),))
    yield decode_case(scale, device, "3b decode, 1 of 131072", [scale.length(131_072)], (Goal("us", 230, 200),))
    # A page of 32 costs nothing; a window is not longer to wait for than a context of its length.
    yield decode_case(scale, device, "1b decode, 64 of 4096, page 32", [long] * batch, (), block_size=32)
    far = paged_problems(scale, 1, [scale.length(32_768)] * scale.batch(16), 16, device)
    near = paged_problems(scale, 1, [long] * scale.batch(16), 16, device)
    peers = {"a context of 4096": _each(near, decode_call)}
    calls = [decode_call(problem, window=long) for problem in far]
    num_bytes = attention_bytes(scale, 1, [long] * scale.batch(16))
    yield Case(
        "7 decode, 16 of 32768, window 4096", calls, peers, num_bytes, 0, (Goal("ratio", 1 / 1.15, 1 / 1.05, *peers),)
    )


def prefill_cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    for name, query_len, seq_len, batch, goals in (
        (
            "5 prefill, 4 x 8192",
            8192,
            8192,
            4,
            (Goal("tflops", 430, 620), Goal("ratio", 0.65, 0.93, "FlashAttention-3")),
        ),
        ("5b prefill, 1 x 2048", 2048, 2048, 1, ()),
        (
            "6 chunk of 512 on 16384, 8 sequences",
            512,
            16_384,
            8,
            (Goal("ratio", 2.0, 2.0, "vLLM Triton"), Goal("ratio", 0.9, 0.9, "FlashAttention-3")),
        ),
    ):
        lens = [scale.length(seq_len)] * scale.batch(batch)
        problems = paged_problems(scale, scale.length(query_len), lens, 16, device)
        sizes = scale, scale.length(query_len), lens
        peers = gpu_peers.attention(problems)
        yield Case(name, _each(problems, prefill_call), peers, attention_bytes(*sizes), attention_flops(*sizes), goals)


def small_cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    """Norms, rotation and KV write, sampling, log-probabilities."""
    for number, goals in ((8192, (Goal("copy_share", 0.8, 0.9),)), (64, (Goal("us", 4, 4),))):
        yield _rope_case(scale, device, scale.length(number), goals)
    num_rows, dim = scale.length(8192), scale.num_heads * scale.head_dim
    x, residual = torch.randn((2, NUM_COPIES, num_rows, dim), dtype=torch.bfloat16, device=device)
    weight = torch.ones(dim, dtype=torch.bfloat16, device=device)
    calls = [lambda i=i: rms_norm(x[i], weight, EPS, residual[i]) for i in range(NUM_COPIES)]
    peers = gpu_peers.rms_norm(x, residual, weight, EPS)
    yield Case(
        "10 RMS norm + residual, 8192 x 4096", calls, peers, 8 * num_rows * dim, 0, (Goal("copy_share", 0.85, 0.93),)
    )
    yield from _sampling_cases(scale, device)


def _rope_case(scale: Scale, device: torch.device, num_tokens: int, goals: tuple[Goal, ...]) -> Case:
    """Norm of heads, rotation and KV write of a layer of Qwen3-8B."""
    heads, kv_heads, head_dim, block_size = scale.num_heads, scale.num_kv_heads, scale.head_dim, 16
    shape = (NUM_COPIES, num_tokens, heads + 2 * kv_heads, head_dim)
    projections = [
        copy.split([heads, kv_heads, kv_heads], dim=1)
        for copy in torch.randn(shape, dtype=torch.bfloat16, device=device)
    ]
    cache_shape = (2, num_tokens // block_size + 2, kv_heads, block_size, head_dim)
    k_cache, v_cache = torch.zeros(cache_shape, dtype=torch.bfloat16, device=device)
    positions = torch.arange(num_tokens, device=device)
    cos_sin = torch.rand((num_tokens, head_dim), device=device)
    slots = torch.randperm(num_tokens, device=device) + block_size
    norm = torch.ones(head_dim, dtype=torch.bfloat16, device=device)

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Call:
        return lambda: rope_kv_write(query, key, value, positions, cos_sin, k_cache, v_cache, slots, norm, norm, EPS)

    num_bytes = 2 * 2 * num_tokens * (heads + 2 * kv_heads) * head_dim
    name = f"9 head norms + RoPE + KV write, {num_tokens} tokens"
    return Case(name, [call(*tensors) for tensors in projections], {}, num_bytes, 0, goals)


def _sampling_cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    num_rows, vocab_size = scale.batch(256), scale.vocab_size
    logits = torch.randn((2, num_rows, vocab_size), device=device) * 3
    temperature = torch.full((num_rows,), 0.8, device=device)
    top_k = torch.full((num_rows,), 50, dtype=torch.int32, device=device)
    top_p, min_p = torch.full((num_rows,), 0.9, device=device), torch.full((num_rows,), 0.01, device=device)
    uniform = torch.rand(num_rows, device=device).double().clamp(2**-24, 1 - 2**-24)
    calls = [lambda rows=rows: sample(rows, temperature, top_k, top_p, min_p, uniform) for rows in logits]
    peers = gpu_peers.sampling(logits, temperature, top_k, top_p)
    goals = (Goal("us", 200, 90), Goal("ratio", 1.0, 1.0, "FlashInfer"))
    yield Case("11 sampling, 256 rows, top-k, top-p, min-p", calls, peers, 4 * num_rows * vocab_size, 0, goals)
    token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
    calls = [lambda rows=rows: log_probs(rows, token_ids, 5) for rows in logits]
    peers = {"torch log_softmax + topk": [lambda rows=rows: rows.log_softmax(-1).topk(5) for rows in logits]}
    yield Case("11b log-probabilities, 256 rows, 5 each", calls, peers, 4 * num_rows * vocab_size)
