"""Norm and rotation of each head's query and key, and the way of key and value into their pages, in one pass."""

from __future__ import annotations

import torch

from quire.kernels.backend import Backend, choose_body
from quire.kernels.checks import check_caches, check_dtype, check_page_dtype, require


def rope_kv_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    query_norm: torch.Tensor | None = None,
    key_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    *,
    backend: Backend = "auto",
) -> None:
    """What `rms_norm` (of each head, if there are norms), `rope` and `kv_write` do one after the other.

    Query is changed IN PLACE; key may be, and is of no use afterwards: what counts is in the cache. Computed in
    float32; whether results are rounded in between is the body's choice.

    Args:
        query: [T, Hq, D]; float32, float16 or bfloat16. The last dimension is contiguous, the others may have any
            strides, so views of a fused qkv tensor are fine.
        key, value: [T, Hk, D], like query.
        positions: [T] int64, contiguous, each in [0, max_positions).
        cos_sin: [max_positions, rotary_dim] float32, as for `rope`.
        k_cache, v_cache: [num_blocks, Hk, block_size, D] in query's dtype, or on a CPU in 16 bits for a query in
            float32, as for `kv_write`.
        slot_mapping: [T] int64, contiguous, as for `kv_write`.
        query_norm, key_norm: [D] in query's dtype, contiguous: weights of the norms; both or neither.
        eps: added to the mean of squares.
        backend: "auto" goes by query's device.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.

    Source: rms_norm, rope and kv_write name theirs.
    """
    body = choose_body(backend, query.device)
    check_dtype(query, body)
    for tensor in (query, key, value):
        require(
            tensor.dim() == 3
            and tensor.stride(2) == 1
            and tensor.dtype == query.dtype
            and tensor.shape[0] == query.shape[0]
            and tensor.shape[2] == query.shape[2],
            "query, key and value must be [T, heads, D] of one dtype, the last dimension contiguous",
            tensor,
            query,
        )
    require(key.shape == value.shape, "key and value must have one shape", key, value)
    check_caches(k_cache, v_cache, key.shape[1], key.shape[2])
    check_page_dtype(k_cache, query.dtype, body)
    for indices in (positions, slot_mapping):
        require(
            indices.shape == query.shape[:1] and indices.dtype == torch.int64 and indices.is_contiguous(),
            "positions and slot_mapping must be contiguous int64 [T]",
            indices,
            query,
        )
    require(
        cos_sin.dim() == 2
        and cos_sin.dtype in (torch.float32, torch.float64)
        and cos_sin.is_contiguous()
        and cos_sin.shape[1] % 2 == 0
        and cos_sin.shape[1] <= query.shape[2],
        "cos_sin must be contiguous float32 [max_positions, rotary_dim], rotary_dim even and at most D",
        cos_sin,
        query,
    )
    require((query_norm is None) == (key_norm is None), "norms come for both query and key, or for neither")
    for norm in (query_norm, key_norm):
        if norm is not None:
            require(
                norm.shape == query.shape[2:] and norm.dtype == query.dtype and norm.is_contiguous(),
                "a norm's weight must be contiguous [D] in query's dtype",
                norm,
                query,
            )
    on_one_device = (key, value, positions, cos_sin, k_cache, slot_mapping)
    require(all(x.device == query.device for x in on_one_device), "all tensors must be on one device", query)
    if body == "triton":
        from quire.kernels.rope_kv_write.triton import rope_kv_write as run
    elif body == "cpu":
        from quire.kernels.rope_kv_write.cpu import rope_kv_write as run
    else:
        from quire.kernels.rope_kv_write.reference import rope_kv_write as run
    run(query, key, value, positions, cos_sin, k_cache, v_cache, slot_mapping, query_norm, key_norm, eps)
