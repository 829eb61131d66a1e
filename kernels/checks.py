"""What the kernels rely on. Only shapes, dtypes, strides and devices are looked at, never a value: no device waits."""

from __future__ import annotations

import torch

from quire.kernels.backend import Body
from quire.kernels.quantization import LARGEST_CODE

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def require(condition: bool, message: str, *tensors: torch.Tensor) -> None:
    """Raise ValueError with `message` and what the tensors are, unless `condition` holds."""
    if not condition:
        found = "; ".join(f"{tuple(t.shape)} {t.dtype} strides {t.stride()} on {t.device}" for t in tensors)
        raise ValueError(f"{message} (got {found})" if found else message)


def check_dtype(tensor: torch.Tensor, body: Body) -> None:
    """float32, float16 or bfloat16; the reference also computes in float64."""
    if tensor.dtype not in KERNEL_DTYPES and not (tensor.dtype == torch.float64 and body == "reference"):
        raise ValueError(f"dtype {tensor.dtype} is not supported; use float32, float16 or bfloat16")


def check_caches(k_cache: torch.Tensor, v_cache: torch.Tensor, num_kv_heads: int, head_dim: int) -> None:
    """Two caches [num_blocks, num_kv_heads, block_size, head_dim], laid out alike, a block of one head contiguous."""
    require(
        k_cache.dim() == 4 and k_cache.shape[1] == num_kv_heads and k_cache.shape[3] == head_dim,
        f"k_cache must be [num_blocks, {num_kv_heads}, block_size, {head_dim}]",
        k_cache,
    )
    require(k_cache.stride()[2:] == (head_dim, 1), "a block of one head must be contiguous in the cache", k_cache)
    require(
        v_cache.shape == k_cache.shape
        and v_cache.stride() == k_cache.stride()
        and v_cache.dtype == k_cache.dtype
        and v_cache.device == k_cache.device,
        "k_cache and v_cache must have the same shape, strides, dtype and device",
        k_cache,
        v_cache,
    )


def check_page_dtype(k_cache: torch.Tensor, dtype: torch.dtype, body: Body) -> None:
    """A cache in `dtype`, of what it is used with; on a CPU one of 16 bits under float32."""
    is_narrow = body != "triton" and dtype == torch.float32 and k_cache.dtype in (torch.bfloat16, torch.float16)
    require(
        k_cache.dtype == dtype or is_narrow, f"the cache must have the dtype of what it is used with, {dtype}", k_cache
    )


def check_scales(
    k_cache: torch.Tensor, k_scales: torch.Tensor | None, v_scales: torch.Tensor | None, dtype: torch.dtype, body: Body
) -> None:
    """A cache in `dtype` and no scales, or a cache of int8 or fp8 codes and a bfloat16 scale for each slot of each."""
    if k_scales is None or v_scales is None:
        require(k_scales is None and v_scales is None, "scales come for both k_cache and v_cache, or for neither")
        require(k_cache.dtype not in LARGEST_CODE, "a cache of codes needs k_scales and v_scales", k_cache)
        check_page_dtype(k_cache, dtype, body)
        return
    require(k_cache.dtype in LARGEST_CODE, "only a cache of int8 or fp8 codes has scales", k_cache)
    require(body != "cpu" or k_cache.dtype == torch.int8, "fp8 pages are for GPUs; use int8 ones on a CPU", k_cache)
    for scales in (k_scales, v_scales):
        require(
            scales.shape == k_cache.shape[:3]
            and scales.dtype == torch.bfloat16
            and scales.stride() == k_scales.stride()
            and scales.stride(2) == 1
            and scales.device == k_cache.device,
            "scales must be bfloat16 [num_blocks, num_kv_heads, block_size] with the same strides, the last dimension "
            "contiguous",
            scales,
            k_cache,
        )


def check_attention(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    sliding_window: int | None,
    out: torch.Tensor | None,
    body: Body,
) -> None:
    """What paged_decode and paged_prefill share."""
    require(
        query.dim() == 3 and query.stride(2) == 1,
        "query must be [tokens, heads, head_dim], its last dimension contiguous",
        query,
    )
    check_dtype(query, body)
    require(k_cache.dim() == 4, "k_cache must be [num_blocks, num_kv_heads, block_size, head_dim]", k_cache)
    check_caches(k_cache, v_cache, k_cache.shape[1], query.shape[2])
    check_scales(k_cache, k_scales, v_scales, query.dtype, body)
    require(
        query.shape[1] % k_cache.shape[1] == 0, "the query heads must be a multiple of the KV heads", query, k_cache
    )
    require(
        block_tables.dim() == 2 and block_tables.dtype == torch.int32 and block_tables.stride(1) == 1,
        "block_tables must be int32 [sequences, blocks], its rows contiguous",
        block_tables,
    )
    require(
        seq_lens.shape == block_tables.shape[:1] and seq_lens.dtype == torch.int32 and seq_lens.is_contiguous(),
        "seq_lens must be contiguous int32 [sequences]",
        seq_lens,
        block_tables,
    )
    require(
        query.device == k_cache.device == block_tables.device == seq_lens.device,
        "all tensors must be on one device",
        query,
        k_cache,
        block_tables,
        seq_lens,
    )
    require(scale > 0.0, f"scale must be positive, not {scale}")
    require(
        sliding_window is None or sliding_window >= 1,
        f"sliding_window must be None or at least 1, not {sliding_window}",
    )
    if out is not None:
        require(
            out.shape == query.shape and out.dtype == query.dtype and out.device == query.device and out.stride(2) == 1,
            "out must be like query, its last dimension contiguous",
            out,
            query,
        )


def check_logits(logits: torch.Tensor, body: Body) -> None:
    """[R, V] float32 with V > 0, rows at any stride; the reference also computes in float64."""
    allowed = (torch.float32, torch.float64) if body == "reference" else (torch.float32,)
    require(
        logits.dim() == 2 and logits.shape[1] > 0 and logits.stride(1) == 1 and logits.dtype in allowed,
        "logits must be float32 [R, V], V > 0, the last dimension contiguous",
        logits,
    )
    require(body != "triton" or logits.shape[1] <= 2**18, "on a GPU the vocabulary may have 2^18 tokens", logits)
