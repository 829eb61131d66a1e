"""Measure the kernels on the device at hand against plain torch: medians, ratios, and how near the memory's speed.

    python benchmarks/kernels.py [--dtype bfloat16] [--output kernels.json]

The peer of attention gathers the pages into one tensor and calls scaled_dot_product_attention; that of the small
operations is written in plain torch. Both are timed turn by turn in the same run, and only after their results agree.
`floor` is the time to move the bytes that must move, at the speed of a copy measured first; for a prefill, which
computes rather than reads, TFLOP/s say more, and a few tokens stay in the processor's own cache and can beat it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from measuring.gathering import gathered
from measuring.rates import copy_bandwidth, synchronize
from measuring.report import write_json
from torch.nn.functional import scaled_dot_product_attention

from quire.kernels.backend import Backend
from quire.kernels.fp8_linear import Fp8Weight, code_dtype, fp8_linear, quantize, quantize_tokens
from quire.kernels.gated_activation import gated_activation
from quire.kernels.kv_write import kv_write
from quire.kernels.paged_decode import paged_decode
from quire.kernels.paged_prefill import paged_prefill
from quire.kernels.rms_norm import rms_norm
from quire.kernels.rope import rope
from quire.kernels.rope_kv_write import rope_kv_write

BLOCK_SIZE = 16
EPS = 1e-6
NUM_COPIES = 4
"""Caches that calls rotate over, so that a small one is not read from the processor's own cache."""

Run = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Model:
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Case:
    """`ours` and `peer` take one of `inputs`, which they may overwrite."""

    name: str
    ours: Run
    peer: Run
    inputs: Sequence[tuple[torch.Tensor, ...]]
    num_bytes: int
    num_flops: int = 0


@dataclass(frozen=True)
class Row:
    """Medians in microseconds."""

    name: str
    ours_us: float
    peer_us: float
    ratio: float  # peer / ours
    floor_us: float
    floor_share: float  # floor / ours
    tflops: float


def timed(call: Callable[[], object], device: torch.device, num_calls: int) -> float:
    """Seconds a call."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(num_calls):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / num_calls


def repeatable(run: Run, inputs: Sequence[tuple[torch.Tensor, ...]], device: torch.device) -> Callable[[], object]:
    """One call that runs all inputs: on a GPU a captured graph, which leaves launching out of the figure."""

    def run_all() -> None:
        for tensors in inputs:
            run(*tensors)

    run_all()
    if device.type != "cuda":
        return run_all
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all()
    return graph.replay


def measure(case: Case, device: torch.device, bytes_per_second: float, seconds: float) -> Row:
    """Alternate ours and the peer for about `seconds`, after checking that they agree."""
    results = [run(*(tensor.clone() for tensor in case.inputs[0])).clone() for run in (case.ours, case.peer)]
    torch.testing.assert_close(*results, atol=2e-2, rtol=2e-2)
    calls = [repeatable(run, case.inputs, device) for run in (case.ours, case.peer)]
    num_calls = [max(1, int(0.005 / timed(call, device, 1))) for call in calls]
    times: list[list[float]] = [[], []]
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times[1]) < 5:
        for call, number, measured in zip(calls, num_calls, times, strict=True):
            measured.append(timed(call, device, number) / len(case.inputs))
    ours, peer = (statistics.median(measured) for measured in times)
    floor = case.num_bytes / bytes_per_second
    return Row(case.name, ours * 1e6, peer * 1e6, peer / ours, floor * 1e6, floor / ours, case.num_flops / ours / 1e12)


def attention_case(
    model: Model, num_seqs: int, query_len: int, seq_len: int, dtype: torch.dtype, device: torch.device
) -> Case:
    """Sequences of one length, a whole number of pages, in shuffled blocks; a query_len of 1 is a decode."""
    num_blocks = num_seqs * seq_len // BLOCK_SIZE
    shape = (NUM_COPIES, 2, num_blocks + 1, model.num_kv_heads, BLOCK_SIZE, model.head_dim)
    caches = torch.randn(shape, dtype=dtype, device=device)
    tables = (torch.randperm(num_blocks, device=device) + 1).int().view(num_seqs, -1)
    seq_lens = torch.full((num_seqs,), seq_len, dtype=torch.int32, device=device)
    starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * query_len
    query = torch.randn((num_seqs * query_len, model.num_heads, model.head_dim), dtype=dtype, device=device)
    scale = model.head_dim**-0.5
    visible = None
    if query_len > 1:
        visible = torch.ones((query_len, seq_len), dtype=torch.bool, device=device).tril(seq_len - query_len)

    def ours(k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        if query_len == 1:
            return paged_decode(query, k_cache, v_cache, tables, seq_lens, scale)
        return paged_prefill(query, k_cache, v_cache, tables, seq_lens, starts, scale, query_len)

    def peer(k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        keys, values = gathered(k_cache, tables), gathered(v_cache, tables)
        rows = query.view(num_seqs, query_len, model.num_heads, model.head_dim).transpose(1, 2)
        is_causal = query_len == seq_len
        mask = None if is_causal else visible
        out = scaled_dot_product_attention(
            rows, keys, values, mask, scale=scale, is_causal=is_causal and query_len > 1, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(query.shape)

    num_bytes = (2 * num_seqs * seq_len * model.num_kv_heads * model.head_dim + 2 * query.numel()) * dtype.itemsize
    seen_per_head = num_seqs * (query_len * seq_len - query_len * (query_len - 1) // 2)
    kind = "decode" if query_len == 1 else "prefill"
    name = f"{kind} {num_seqs} x {query_len} of {seq_len}"
    inputs = [(keys, values) for keys, values in caches]
    return Case(name, ours, peer, inputs, num_bytes, 4 * seen_per_head * model.num_heads * model.head_dim)


def small_cases(model: Model, num_tokens: int, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """Norm with residual, rotation and cache write of one layer, the last two (with norms of heads) also in one."""
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    hidden = torch.randn((NUM_COPIES, 2, num_tokens, heads * head_dim), dtype=dtype, device=device)
    qkv = torch.randn((NUM_COPIES, num_tokens, heads + 2 * kv_heads, head_dim), dtype=dtype, device=device)
    projections = [copy.split([heads, kv_heads, kv_heads], dim=1) for copy in qkv]
    weight = torch.ones(heads * head_dim, dtype=dtype, device=device)
    positions = torch.arange(num_tokens, device=device)
    angles = torch.rand((num_tokens, head_dim // 2), device=device)
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    num_blocks = num_tokens // BLOCK_SIZE + 2
    cache = torch.zeros((2, num_blocks, kv_heads, BLOCK_SIZE, head_dim), dtype=dtype, device=device)
    slots = torch.randperm(num_tokens, device=device) + BLOCK_SIZE

    def norm(backend: Backend) -> Run:
        return lambda x, residual: rms_norm(x, weight, EPS, residual, backend=backend)

    def rotation(backend: Backend) -> Run:
        def run(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            rope(query, key, positions, table, backend=backend)
            return query

        return run

    def write(backend: Backend) -> Run:
        def run(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            kv_write(key, value, cache[0], cache[1], slots, backend=backend)
            return cache

        return run

    def fused(backend: Backend) -> Run:
        def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            norms = (weight[:head_dim], weight[:head_dim], EPS)
            rope_kv_write(query, key, value, positions, table, *cache, slots, *norms, backend=backend)
            return query

        return run

    def gate(backend: Backend) -> Run:
        return lambda x: gated_activation(x, "silu", backend=backend)

    operations = [
        ("norm", norm, 4 * num_tokens * heads * head_dim, [(x, residual) for x, residual in hidden]),
        ("rope", rotation, 2 * num_tokens * (heads + kv_heads) * head_dim, [(q, k) for q, k, _ in projections]),
        ("kv_write", write, 4 * num_tokens * kv_heads * head_dim, [(k, v) for _, k, v in projections]),
        ("rope_kv_write", fused, 2 * num_tokens * (heads + 2 * kv_heads) * head_dim, projections),
        ("gated_activation", gate, 3 * num_tokens * heads * head_dim, [(x.view(num_tokens, -1),) for x in hidden]),
    ]
    return [
        Case(f"{name} {num_tokens} tokens", make("auto"), make("reference"), inputs, elements * dtype.itemsize)
        for name, make, elements, inputs in operations
    ]


def fp8_case(num_tokens: int, depth: int, num_features: int, fp8: torch.dtype, device: torch.device) -> Case:
    """A linear layer with fp8 weights in bfloat16, its inputs' rounding included; the peer is torch's fp8 product."""
    x = torch.randn((num_tokens, depth), dtype=torch.bfloat16, device=device)
    weights = [quantize(torch.randn_like(x[:1].expand(num_features, -1)), fp8) for _ in range(NUM_COPIES)]

    def ours(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return fp8_linear(x, Fp8Weight(codes, scales))

    def peer(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        inputs, input_scales = quantize_tokens(x, fp8)
        scale_a, scale_b = input_scales[:, None], scales[None, :]
        out: torch.Tensor = torch._scaled_mm(inputs, codes.t(), scale_a, scale_b, out_dtype=torch.bfloat16)
        return out

    num_bytes = num_features * depth + 2 * num_tokens * (depth + num_features)
    inputs = [(weight.codes, weight.scales) for weight in weights]
    name = f"fp8 {num_tokens} x {depth} to {num_features}"
    return Case(name, ours, peer, inputs, num_bytes, 2 * num_tokens * num_features * depth)


def cases(dtype: torch.dtype, device: torch.device) -> list[Callable[[], list[Case]]]:
    """Made one after another, so that only one case's caches exist at a time."""
    if device.type == "cuda":
        model = Model(num_heads=32, num_kv_heads=8, head_dim=128)
        lens = [(1, 1, 4096), (8, 1, 4096), (64, 1, 4096), (256, 1, 1024), (1, 1, 131_072)]
        lens += [(1, 2048, 2048), (4, 8192, 8192), (8, 512, 16_384)]
        token_counts = [64, 8192]
    else:
        model = Model(num_heads=16, num_kv_heads=8, head_dim=128)
        lens = [(1, 1, 256), (1, 1, 4096), (8, 1, 1024), (32, 1, 512), (1, 512, 512), (1, 64, 1024)]
        token_counts = [1, 16, 512]

    def attention(num_seqs: int, query_len: int, seq_len: int) -> list[Case]:
        return [attention_case(model, num_seqs, query_len, seq_len, dtype, device)]

    made: list[Callable[[], list[Case]]] = [lambda shape=shape: attention(*shape) for shape in lens]  # type: ignore[misc]
    fp8 = code_dtype(device)
    if device.type == "cuda" and fp8 is not None:
        shapes = [(number, 4096, features) for number in (1, 64, 256, 8192) for features in (4096, 28_672)]
        made += [lambda shape=shape: [fp8_case(*shape, fp8, device)] for shape in shapes]  # type: ignore[misc]
    made += [lambda number=number: small_cases(model, number, dtype, device) for number in token_counts]  # type: ignore[misc]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time of each case (default 1)")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON to this file")
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if arguments.device == "cuda" or (arguments.device == "auto" and has_gpu) else "cpu")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "num_threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "copy_gb_per_second": round(bandwidth / 1e9, 1),
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'case':32} {'ours us':>10} {'peer us':>10} {'ratio':>6} {'floor us':>9} {'of floor':>8} {'TFLOP/s':>8}")
    rows = []
    with torch.inference_mode():
        for make in cases(getattr(torch, arguments.dtype), device):
            for case in make():
                row = measure(case, device, bandwidth, arguments.seconds)
                rows.append(row)
                print(
                    f"{row.name:32} {row.ours_us:10.1f} {row.peer_us:10.1f} {row.ratio:6.2f} {row.floor_us:9.1f}"
                    f" {row.floor_share:8.0%} {row.tflops:8.3f}",
                    flush=True,
                )
    if arguments.output is not None:
        write_json(arguments.output, {"rows": [asdict(row) for row in rows]}, **facts)


if __name__ == "__main__":
    main()
