"""SGLang's Triton attention as a peer on GPUs: its files out of its wheel, on the least of its packages."""

from __future__ import annotations

import importlib
import types
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from measuring.gathering import token_slots
from measuring.stub_modules import add_module

if TYPE_CHECKING:
    from measuring.gpu_peers import Paged
    from measuring.gpu_timing import Call

OPERATIONS = "sglang.kernels.ops.attention"
MAX_KV_SPLITS = 8  # of a sequence, as its server has it unless told otherwise


def install_stubs(root: Path) -> None:
    """`root`/sglang holds decode_attention, extend_attention, metadata and score_mod."""
    module = partial(add_module, root)
    for package in ("sglang", "sglang.kernels", "sglang.kernels.ops", OPERATIONS, "sglang.srt"):
        module(package)
    module("sglang.srt.environ", envs=types.SimpleNamespace())
    module(
        "sglang.srt.utils",
        get_device_core_count=_num_cores,
        is_cuda=torch.cuda.is_available,
        is_hip=lambda: False,
        is_gfx95_supported=lambda: False,
        is_gfx1250_supported=lambda: False,
    )


def attention(problem: Paged) -> Call:
    """Its decode kernel, with the number of splits computed on the device in each call, or its kernel for chunks, which
    wants what is new by itself. A page is a token there, so a sequence is a list of slots."""
    keys, values = (
        cache.transpose(1, 2).reshape(-1, cache.shape[1], cache.shape[3]).contiguous()
        for cache in (problem.k_cache, problem.v_cache)
    )
    lengths = torch.tensor(problem.host_seq_lens, dtype=torch.int32, device=problem.query.device)
    return (_decode if problem.query_len == 1 else _extend)(problem, keys, values, lengths)


def _decode(problem: Paged, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor) -> Call:
    operations: Any = importlib.import_module(f"{OPERATIONS}.decode_attention")
    metadata: Any = importlib.import_module(f"{OPERATIONS}.metadata")
    query, device = problem.query, problem.query.device
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads, num_cores = keys.shape[1], _num_cores()
    indices = token_slots(problem.block_tables, problem.k_cache.shape[2], problem.host_seq_lens)
    starts, out = _starts(lengths), torch.empty_like(query)
    parts = torch.empty((num_seqs, num_heads, MAX_KV_SPLITS, head_dim), device=device)
    sums = torch.empty((num_seqs, num_heads, MAX_KV_SPLITS), device=device)
    num_splits = torch.empty(num_seqs, dtype=torch.int32, device=device)
    padded = 1 << (num_seqs - 1).bit_length()

    def attend() -> torch.Tensor:
        metadata.get_num_kv_splits_triton[(1,)](
            num_splits, lengths, num_seqs, 1, num_heads, num_kv_heads, MAX_KV_SPLITS, num_cores, MAX_NUM_SEQ=padded
        )
        operations.decode_attention_fwd(
            *(query, keys, values, out, starts, indices, parts, sums, num_splits, MAX_KV_SPLITS),
            *(problem.scale, 1.0, 1.0),
        )
        return out

    return attend


def _extend(problem: Paged, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor) -> Call:
    operations: Any = importlib.import_module(f"{OPERATIONS}.extend_attention")
    block_size, lens = problem.k_cache.shape[2], problem.host_seq_lens
    before = [length - problem.query_len for length in lens]
    indices = token_slots(problem.block_tables, block_size, before)
    slots = token_slots(problem.block_tables, block_size, lens).split(list(lens))
    new = torch.cat([each[length:] for each, length in zip(slots, before, strict=True)]).long()
    new_keys, new_values, out = keys[new], values[new], torch.empty_like(problem.query)
    starts, query_start = _starts(lengths - problem.query_len), problem.query_start

    def attend() -> torch.Tensor:
        operations.extend_attention_fwd(
            *(problem.query, new_keys, new_values, out, keys, values, query_start, starts, indices),
            *(None, True, None, problem.query_len, 1.0, 1.0, problem.scale),
        )
        return out

    return attend


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])


def _num_cores(device_id: int = 0) -> int:
    return torch.cuda.get_device_properties(device_id).multi_processor_count if torch.cuda.is_available() else 1
