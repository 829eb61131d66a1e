"""Writing the keys and values of a step into their pages."""

from __future__ import annotations

import torch

from quire.kernels.backend import Backend, choose_body
from quire.kernels.checks import check_caches, check_dtype, check_scales, require


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> None:
    """Store token t's key and value at slot `slot_mapping[t]` of the caches, cast to their dtype or as codes.

    Codes, int8 or fp8, are multiplied with a scale that each token has of its own for each KV head: they depend on
    nothing but the token (`kernels/quantization.py`).

    A slot is block_id * block_size + offset. Padding tokens point into block 0, the null block, where several may
    collide: its contents are undefined. All other slots of a call must differ.

    Args:
        key: [T, num_kv_heads, head_dim]; float32, float16 or bfloat16. The last dimension is contiguous, the others may
            have any strides.
        value: like key.
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim], floating-point, or codes: int8 and on GPUs fp8
            (float8_e4m3fn, on AMD's float8_e4m3fnuz); a block of one head is contiguous.
        v_cache: like k_cache, with the same strides.
        slot_mapping: [T] int64, contiguous, each in [0, num_blocks * block_size).
        k_scales: [num_blocks, num_kv_heads, block_size] bfloat16 for a cache of codes, the last dimension
            contiguous; None for other caches.
        v_scales: like k_scales, with the same strides.
        backend: "auto" goes by key's device.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.

    Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023
    (arXiv 2309.06180), section 4.2.
    """
    body = choose_body(backend, key.device)
    require(
        key.dim() == 3 and key.stride(2) == 1,
        "key must be [T, num_kv_heads, head_dim], its last dimension contiguous",
        key,
    )
    check_dtype(key, body)
    require(
        value.shape == key.shape and value.stride(2) == 1 and value.dtype == key.dtype and value.device == key.device,
        "value must be like key",
        value,
        key,
    )
    check_caches(k_cache, v_cache, key.shape[1], key.shape[2])
    check_scales(k_cache, k_scales, v_scales, k_cache.dtype, body)
    if k_scales is None:
        check_dtype(k_cache, body)
    require(
        slot_mapping.shape == key.shape[:1] and slot_mapping.dtype == torch.int64 and slot_mapping.is_contiguous(),
        "slot_mapping must be contiguous int64 [T]",
        slot_mapping,
        key,
    )
    require(
        key.device == k_cache.device == slot_mapping.device,
        "all tensors must be on one device",
        key,
        k_cache,
        slot_mapping,
    )
    if body == "triton":
        from quire.kernels.kv_write.triton import kv_write as run
    elif body == "cpu":
        from quire.kernels.kv_write.cpu import kv_write as run
    else:
        from quire.kernels.kv_write.reference import kv_write as run
    run(key, value, k_cache, v_cache, slot_mapping, k_scales, v_scales)
