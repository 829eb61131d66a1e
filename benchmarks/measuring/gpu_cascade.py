"""What `gpu.py` measures of shared prefixes and of prefills in pieces, beside our own kernels that know of neither."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from measuring import gpu_cases, gpu_peers
from measuring.gpu_cases import Case, Goal, Scale
from measuring.gpu_peers import Paged
from measuring.gpu_timing import Call
from quire.kernels.backend import Backend
from quire.kernels.cascade_decode import PrefixGroups, cascade_decode
from quire.kernels.paged_decode import paged_decode
from quire.kernels.paged_prefill import paged_prefill


@dataclass(frozen=True)
class Shared:
    """A decode in which `num_groups` equal groups share `prefix_len` tokens each; rows of a group are apart."""

    paged: Paged
    groups: PrefixGroups
    prefix_len: int


def shared_prefixes(
    scale: Scale, num_groups: int, num_rows: int, prefix_len: int, own_len: int, device: torch.device
) -> list[Shared]:
    """NUM_COPIES times the same lengths in shuffled blocks; `prefix_len` is a multiple of the block size, 16."""
    lens = [num_groups * prefix_len, *[own_len] * num_rows]  # the first holds all prefixes, one after another
    prefix_blocks, problems = prefix_len // 16, []
    for holder in gpu_cases.paged_problems(scale, 1, lens, 16, device):
        group_of = torch.arange(num_rows, device=device) % num_groups
        prefixes = holder.block_tables[0, : num_groups * prefix_blocks].view(num_groups, prefix_blocks)
        own = holder.block_tables[1:, : -(-own_len // 16)]
        problem = replace(
            holder,
            query=holder.query[1:],
            block_tables=torch.cat([prefixes[group_of], own], dim=1).contiguous(),
            seq_lens=torch.full((num_rows,), prefix_len + own_len, dtype=torch.int32, device=device),
            host_seq_lens=(prefix_len + own_len,) * num_rows,
        )
        counts = torch.bincount(group_of, minlength=num_groups)
        groups = PrefixGroups(
            rows=group_of.argsort(stable=True).int(),
            group_start=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
            prefix_lens=torch.full((num_groups,), prefix_len, dtype=torch.int32, device=device),
            row_prefix_lens=torch.full((num_rows,), prefix_len, dtype=torch.int32, device=device),
        )
        problems.append(Shared(problem, groups, prefix_len))
    return problems


def run_cascade(shared: Shared, backend: Backend, out: torch.Tensor | None = None) -> torch.Tensor:
    """A rehearsal's backend, "cpu", has no such kernel: there it is the reference."""
    p, backend = shared.paged, "reference" if backend == "cpu" else backend
    arguments = (p.query, p.k_cache, p.v_cache, p.block_tables, p.seq_lens, shared.groups, p.scale, out)
    return cascade_decode(*arguments, backend=backend)


def cascade_cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    peers_goals = (Goal("ratio", 15, 30, "our flat decode"), Goal("ratio", 1.0, 1.0, "FlashInfer cascade"))
    for name, num_groups, num_rows, prefix_len, goals in (
        ("8 cascade, 256 rows, one prefix of 32768", 1, 256, 32_768, peers_goals),
        ("8b cascade, 256 rows, 8 prefixes of 4096", 8, 256, 4096, ()),
        ("8c cascade, 32 rows, 4 prefixes of 8192", 4, 32, 8192, ()),
    ):
        num_rows, num_groups = scale.batch(num_rows), min(num_groups, scale.batch(num_rows))
        prefix_len, own_len = scale.length(prefix_len), scale.length(128)
        problems = shared_prefixes(scale, num_groups, num_rows, prefix_len, own_len, device)
        backend: Backend = "triton" if device.type == "cuda" else "reference"
        calls = [_cascade(problem, backend) for problem in problems]
        peers = {"our flat decode": [gpu_cases.decode_call(problem.paged) for problem in problems]}
        if num_groups == 1:
            peers |= gpu_peers.available({"FlashInfer cascade": _flashinfer_cascade}, problems)
        heads = scale.num_kv_heads * scale.head_dim
        num_tokens = num_groups * prefix_len + num_rows * own_len
        num_bytes = 2 * (2 * num_tokens * heads + 2 * num_rows * scale.num_heads * scale.head_dim)
        num_flops = 4 * num_rows * (prefix_len + own_len) * scale.num_heads * scale.head_dim
        yield Case(name, calls, peers, num_bytes, num_flops, goals)


def _cascade(shared: Shared, backend: Backend) -> Call:
    out = torch.empty_like(shared.paged.query)
    return lambda: run_cascade(shared, backend, out)


def _flashinfer_cascade(shared: Shared) -> Call:
    """Two levels: the prefix of all, and what each has behind it."""
    package: Any = importlib.import_module("flashinfer")
    p, device = shared.paged, shared.paged.query.device
    num_rows, num_heads, head_dim = p.query.shape
    block_size = p.k_cache.shape[2]
    prefix_blocks = shared.prefix_len // block_size
    own = p.block_tables[:, prefix_blocks:]
    own_len = p.host_seq_lens[0] - shared.prefix_len

    def numbers(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    each = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
    last = torch.full((num_rows,), (own_len - 1) % block_size + 1, dtype=torch.int32, device=device)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    wrapper = package.MultiLevelCascadeAttentionWrapper(2, workspace, "HND")
    wrapper.plan(
        [numbers(0, num_rows), each],
        [numbers(0, prefix_blocks), each * own.shape[1]],
        [p.block_tables[0, :prefix_blocks].contiguous(), own.flatten().contiguous()],
        [numbers(block_size), last],
        *(num_heads, p.k_cache.shape[1], head_dim, block_size),
        sm_scale=p.scale,
        q_data_type=p.query.dtype,
    )
    cache = torch.stack([p.k_cache, p.v_cache], dim=1)
    return lambda: wrapper.run(p.query, cache)


def short_chunk_cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    """Few new tokens on a long context: with a program for each tile of queries most of a GPU would be idle."""
    for name, query_len, seq_len, batch in (
        ("6b chunk of 512 on 16384, 1 sequence", 512, 16_384, 1),
        ("6c chunk of 64 on 16384, 2 sequences", 64, 16_384, 2),
        ("6d chunk of 16 on 131072, 1 sequence", 16, 131_072, 1),
    ):
        lens = [scale.length(seq_len)] * scale.batch(batch)
        sizes = scale, scale.length(query_len), lens
        problems = gpu_cases.paged_problems(scale, scale.length(query_len), lens, 16, device)
        calls, peers = [gpu_cases.prefill_call(problem) for problem in problems], gpu_peers.attention(problems)
        if device.type == "cuda":
            peers["ours, not in pieces"] = [in_whole_tiles(problem) for problem in problems]
        num_bytes, num_flops = gpu_cases.attention_bytes(*sizes), gpu_cases.attention_flops(*sizes)
        yield Case(name, calls, peers, num_bytes, num_flops)


def in_whole_tiles(problem: Paged) -> Call:
    """The kernel in Triton with a program for each query tile, whatever else would be chosen."""
    from quire.kernels.paged_prefill.parameters import prefill_parameters
    from quire.kernels.paged_prefill.triton import launch
    from quire.kernels.targets import current_target

    p, out = problem, torch.empty_like(problem.query)
    group_size = p.query.shape[1] // p.k_cache.shape[1]
    parameters = prefill_parameters(
        p.query.dtype, p.query.shape[2], group_size, p.query_len, current_target(p.query.device)
    )
    starts = p.query_start
    return lambda: launch(
        *(p.query, p.k_cache, p.v_cache, p.block_tables, p.seq_lens, starts, p.scale, None, out, None, None),
        parameters,
    )


def checks(scale: Scale, device: torch.device) -> Iterator[tuple[str, Any]]:
    """Names, and what computes for a backend: for the parity stage."""
    for name, num_groups, num_rows in (("one group", 1, 9), ("three groups", 3, 20)):
        (shared, *_) = shared_prefixes(scale, num_groups, num_rows, 640, 40, device)

        def decode(backend: Backend, shared: Shared = shared) -> torch.Tensor:
            """To compare with: a decode that knows of no groups. So a rehearsal compares two computations, too."""
            p = shared.paged
            if backend != "reference":
                return run_cascade(shared, backend)
            return paged_decode(p.query, p.k_cache, p.v_cache, p.block_tables, p.seq_lens, p.scale, backend="reference")

        yield f"cascade decode, {name}", decode
    for window in (None, 700):
        (p, *_) = gpu_cases.paged_problems(scale, 20, (4096, 900), 16, device)

        def prefill(backend: Backend, p: Paged = p, window: int | None = window) -> torch.Tensor:
            tables = p.block_tables, p.seq_lens, p.query_start
            return paged_prefill(p.query, p.k_cache, p.v_cache, *tables, p.scale, 20, window, backend=backend)

        yield f"prefill in pieces, window {window}", prefill
