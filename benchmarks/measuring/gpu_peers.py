"""What Quire's GPU kernels are measured against: whatever of it can be imported. Nothing here is ours.

torch is always there. FlashInfer is a package. FlashAttention-3 is a shared library out of vLLM's wheel, vLLM's and
SGLang's Triton kernels are files out of theirs; `benchmarks/gpu_peers.sh` puts all of them into one folder, which
`gpu.py --peers` names.
A peer that cannot be had, or fails, is left out of the tables and named under "absent" with the reason.
"""

from __future__ import annotations

import importlib
import logging
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from measuring import gpu_sglang
from measuring.gathering import gathered
from measuring.gpu_timing import Call
from measuring.stub_modules import add_module

absent: dict[str, str] = {}
"""Why a peer is missing, by name."""


@dataclass(frozen=True)
class Paged:
    """An attention problem over pages; `query_len` tokens of each sequence are new. `k_cache` and `v_cache` are
    [num_blocks, Hk, block_size, D], query [S * query_len, Hq, D]."""

    query: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    host_seq_lens: tuple[int, ...]
    query_len: int
    scale: float
    k_scales: torch.Tensor | None = None
    """[num_blocks, Hk, block_size] if the caches hold codes, like v_scales."""
    v_scales: torch.Tensor | None = None

    @property
    def query_start(self) -> torch.Tensor:
        count = len(self.host_seq_lens) + 1
        return torch.arange(count, dtype=torch.int32, device=self.query.device) * self.query_len


def use_folder(folder: Path | None) -> None:
    """Where `gpu_peers.sh` put what is not installed."""
    if folder is not None:
        sys.path.insert(0, str(folder / "python"))
        if (folder / "vllm").is_dir():
            install_vllm_stubs(folder)
        if (folder / "sglang").is_dir():
            gpu_sglang.install_stubs(folder)


def attention(problems: Sequence[Paged]) -> dict[str, Sequence[Call]]:
    """The peers that compute this, each with a call for each problem."""
    makers: dict[str, Callable[[Paged], Call]] = {
        "torch SDPA, keys and values side by side": _torch_sdpa,
        "FlexAttention, keys and values side by side": _flex_attention,
        "FlashInfer": _flashinfer,
        "FlashAttention-3": _flash_attention_3,
        "vLLM Triton": _vllm_triton,
        "SGLang Triton": gpu_sglang.attention,
    }
    if not problems[0].query.is_cuda:  # there the compiler takes longer than all the rest
        del makers["FlexAttention, keys and values side by side"]
    return available(makers, problems)


def rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> dict[str, Sequence[Call]]:
    def compiled(index: int) -> Call:
        norm: Any = torch.compile(_norm, dynamic=False)
        return lambda: norm(x[index], residual[index], weight, eps)

    def flashinfer(index: int) -> Call:
        norm = importlib.import_module("flashinfer.norm").fused_add_rmsnorm
        return lambda: norm(x[index], residual[index], weight, eps)

    makers = {"torch.compile": compiled, "FlashInfer": flashinfer}
    if not x.is_cuda:  # there the compiler takes longer than all the rest
        del makers["torch.compile"]
    return available(makers, range(len(x)))


def sampling(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> dict[str, Sequence[Call]]:
    def flashinfer(rows: torch.Tensor) -> Call:
        """Without min-p, which it has no joint kernel for."""
        draw = importlib.import_module("flashinfer.sampling").top_k_top_p_sampling_from_logits
        return lambda: draw(rows / temperature[:, None], top_k, top_p)

    def sorting(rows: torch.Tensor) -> Call:
        def draw() -> torch.Tensor:
            values, order = (rows / temperature[:, None]).sort(-1, descending=True)
            mass = values.softmax(-1)
            kept = (mass.cumsum(-1) - mass < top_p[:, None]) & (
                torch.arange(rows.shape[1], device=rows.device) < top_k[:, None]
            )
            noise = torch.empty_like(mass).exponential_()
            return order.gather(-1, (mass.masked_fill(~kept, 0) / noise).argmax(-1, keepdim=True))

        return draw

    return available({"torch, sorted": sorting, "FlashInfer": flashinfer}, list(logits))


def available(makers: dict[str, Callable[..., Call]], problems: Sequence[Any]) -> dict[str, Sequence[Call]]:
    """Those that can be imported and run once, each with a call for each problem; why not is noted in `absent`."""
    found: dict[str, Sequence[Call]] = {}
    for name, make in makers.items():
        if name in absent:
            continue
        try:
            calls = [make(problem) for problem in problems]
            calls[0]()
        except Exception as error:  # whatever a foreign library raises
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            found[name] = calls
    return found


def _side_by_side(problem: Paged) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Query, keys, values [S, H, length, D], all of one length, and this: gathering them is not counted."""
    if len(set(problem.host_seq_lens)) > 1:
        raise ValueError("lengths differ")
    num_seqs, length = len(problem.host_seq_lens), problem.host_seq_lens[0]
    caches = problem.k_cache, problem.v_cache
    keys, values = (gathered(cache, problem.block_tables)[:, :, :length].contiguous() for cache in caches)
    query = problem.query.view(num_seqs, problem.query_len, *problem.query.shape[1:]).transpose(1, 2).contiguous()
    return query, keys, values, length


def _flex_attention(problem: Paged) -> Call:
    """Compiled, with a mask of blocks."""
    module: Any = importlib.import_module("torch.nn.attention.flex_attention")
    query, keys, values, length = _side_by_side(problem)
    offset = length - problem.query_len

    def is_seen(batch: Any, head: Any, position: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return position + offset >= key

    mask = module.create_block_mask(is_seen, None, None, problem.query_len, length, device=query.device)
    attend: Any = torch.compile(module.flex_attention, dynamic=False)
    return lambda: attend(query, keys, values, block_mask=mask, scale=problem.scale, enable_gqa=True)


def _torch_sdpa(problem: Paged) -> Call:
    query, keys, values, length = _side_by_side(problem)
    is_causal = 1 < problem.query_len == length
    mask = None
    if 1 < problem.query_len < length:
        shape = (problem.query_len, length)
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(length - problem.query_len)
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def attend() -> torch.Tensor:
        with sdpa_kernel(backends, set_priority=True):
            return scaled_dot_product_attention(
                query, keys, values, mask, scale=problem.scale, is_causal=is_causal, enable_gqa=True
            )

    return attend


def _token_major(cache: torch.Tensor) -> torch.Tensor:
    """[num_blocks, block_size, Hk, D], as the others want it."""
    return cache.transpose(1, 2).contiguous()


def _flashinfer(problem: Paged) -> Call:
    package: Any = importlib.import_module("flashinfer")
    num_heads, num_kv_heads, head_dim = problem.query.shape[1], problem.k_cache.shape[1], problem.query.shape[2]
    block_size, device = problem.k_cache.shape[2], problem.query.device
    counts = torch.tensor([-(-length // block_size) for length in problem.host_seq_lens])
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    ids = torch.cat([row[:count] for row, count in zip(problem.block_tables.cpu(), counts.tolist(), strict=True)])
    last = torch.tensor([(length - 1) % block_size + 1 for length in problem.host_seq_lens], dtype=torch.int32)
    indptr, ids, last = indptr.to(device), ids.to(device), last.to(device)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    cache = torch.stack([problem.k_cache, problem.v_cache], dim=1)
    if problem.query_len == 1:
        wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        types_ = {"q_data_type": problem.query.dtype, "kv_data_type": cache.dtype}
        wrapper.plan(indptr, ids, last, num_heads, num_kv_heads, head_dim, block_size, sm_scale=problem.scale, **types_)
    else:
        wrapper = package.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend="auto")
        wrapper.plan(
            problem.query_start, indptr, ids, last, num_heads, num_kv_heads, head_dim, block_size,
            causal=True, sm_scale=problem.scale, q_data_type=problem.query.dtype,
        )  # fmt: skip
    return lambda: wrapper.run(problem.query, cache)


def _flash_attention_3(problem: Paged) -> Call:
    """vLLM's build, called as its own `flash_attn_varlen_func` does."""
    interface: Any = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    keys, values = _token_major(problem.k_cache), _token_major(problem.v_cache)
    out, starts = torch.empty_like(problem.query), problem.query_start
    return lambda: interface.flash_attn_varlen_func(
        problem.query, keys, values, problem.query_len, starts, max(problem.host_seq_lens),
        seqused_k=problem.seq_lens, softmax_scale=problem.scale, causal=True, block_table=problem.block_tables,
        out=out, fa_version=3,
    )  # fmt: skip


def _vllm_triton(problem: Paged) -> Call:
    """With its split softmax where vLLM would use it: batches of few decodes."""
    module: Any = importlib.import_module("vllm.v1.attention.ops.triton_unified_attention")
    keys, values = _token_major(problem.k_cache), _token_major(problem.v_cache)
    out, starts = torch.empty_like(problem.query), problem.query_start
    num_heads, head_dim = problem.query.shape[1:]
    num_kv_heads, num_segments = problem.k_cache.shape[1], 16
    threshold = 128 // num_kv_heads
    shape = (max(threshold, len(problem.host_seq_lens)), num_heads, num_segments)
    device = problem.query.device
    segments = {
        "seq_threshold_3D": threshold,
        "num_par_softmax_segments": num_segments,
        "softmax_segm_output": torch.empty((*shape, head_dim), device=device),
        "softmax_segm_max": torch.empty(shape, device=device),
        "softmax_segm_expsum": torch.empty(shape, device=device),
    }
    one = torch.ones((len(problem.host_seq_lens), num_kv_heads), device=device)
    return lambda: module.unified_attention(
        problem.query, keys, values, out, starts, problem.query_len, problem.seq_lens, max(problem.host_seq_lens),
        problem.scale, True, (-1, -1), problem.block_tables, 0.0, None, one, one, **segments,
    )  # fmt: skip


def _norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    residual.add_(x)
    wide = residual.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def install_vllm_stubs(root: Path) -> None:
    """vLLM's files out of `root`/vllm, on the least of its packages that they ask for."""
    import triton
    import triton.language

    module = partial(add_module, root)
    platform = types.SimpleNamespace(
        fp8_dtype=lambda: torch.float8_e4m3fn,
        is_cuda=lambda: True,
        is_rocm=lambda: False,
        is_xpu=lambda: False,
        is_cuda_alike=lambda: True,
        get_device_capability=lambda *_: torch.cuda.get_device_capability(),
        is_device_capability_family=lambda *_: False,
        is_device_capability=lambda *_: False,
    )
    for package in ("vllm", "vllm.v1", "vllm.v1.attention", "vllm.v1.attention.ops", "vllm.vllm_flash_attn"):
        module(package)
    module("vllm.envs", VLLM_BATCH_INVARIANT=False)
    module("vllm.logger", init_logger=logging.getLogger)
    module("vllm.platforms", current_platform=platform)
    module("vllm.triton_utils", tl=triton.language, triton=triton)
    modes = ("NONE", "FP8_PER_TENSOR", "INT8_PER_TOKEN_HEAD", "FP8_PER_TOKEN_HEAD", "INT4_PER_TOKEN_HEAD", "NVFP4")
    module("vllm.v1.kv_cache_interface", KVQuantMode=IntEnum("KVQuantMode", modes, start=0))
    for library in root.glob("_vllm_fa3_C*.so"):
        torch.ops.load_library(str(library))
