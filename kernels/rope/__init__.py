"""Rotary position embedding of queries and keys, in place."""

from __future__ import annotations

import torch

from quire.kernels.backend import Backend, choose_body
from quire.kernels.checks import check_dtype, require


def rope(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, *, backend: Backend = "auto"
) -> None:
    """Rotate query and key IN PLACE by the angles of their positions.

    Dimension i of the first half of `rotary_dim` is paired with dimension i of the second half (the pairing of GPT-NeoX
    and of Llama in transformers); dimensions past rotary_dim stay as they are. Computed in float32.

    Args:
        query: [T, Hq, D]; float32, float16 or bfloat16. The last dimension is contiguous, the others may have any
            strides, so views of a fused qkv tensor are fine.
        key: [T, Hk, D], like query.
        positions: [T] int64, contiguous, each in [0, max_positions).
        cos_sin: [max_positions, rotary_dim] float32, contiguous: the cosines of rotary_dim / 2 frequencies, then their
            sines, any attention scaling multiplied in. rotary_dim is even and at most D. (float64 for float64 tensors.)
        backend: "auto" goes by query's device.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021 (arXiv 2104.09864).
    """
    body = choose_body(backend, query.device)
    require(
        query.dim() == 3 and key.dim() == 3 and query.stride(2) == 1 and key.stride(2) == 1,
        "query and key must be [T, heads, D], their last dimension contiguous",
        query,
        key,
    )
    check_dtype(query, body)
    require(
        query.shape[0] == key.shape[0]
        and query.shape[2] == key.shape[2]
        and query.dtype == key.dtype
        and query.device == key.device,
        "query and key must agree in T, D, dtype and device",
        query,
        key,
    )
    require(
        positions.shape == query.shape[:1]
        and positions.dtype == torch.int64
        and positions.device == query.device
        and positions.is_contiguous(),
        "positions must be contiguous int64 [T]",
        positions,
        query,
    )
    table_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    require(
        cos_sin.dim() == 2
        and cos_sin.dtype == table_dtype
        and cos_sin.is_contiguous()
        and cos_sin.device == query.device
        and cos_sin.shape[1] % 2 == 0
        and cos_sin.shape[1] <= query.shape[2],
        "cos_sin must be contiguous float32 [max_positions, rotary_dim], rotary_dim even and at most D",
        cos_sin,
        query,
    )
    if body == "triton":
        from quire.kernels.rope.triton import rope as run
    elif body == "cpu":
        from quire.kernels.rope.cpu import rope as run
    else:
        from quire.kernels.rope.reference import rope as run
    run(query, key, positions, cos_sin)
