"""Some rows of a matrix: the tokens whose logits are wanted."""

from __future__ import annotations

import torch

from quire.kernels.backend import Backend, choose_body
from quire.kernels.checks import require


def take_rows(x: torch.Tensor, indices: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor:
    """Row i of x for each index i.

    Args:
        x: [T, D], the last dimension contiguous; on a CPU float32, float16 or bfloat16.
        indices: [R] int64, contiguous, each in [0, T), on x's device.
        backend: "auto" goes by x's device; a GPU runs plain torch.

    Returns:
        [R, D] in x's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype or stride is not as above.
    """
    body = choose_body(backend, x.device)
    require(x.dim() == 2 and x.stride(1) == 1, "x must be [T, D], its last dimension contiguous", x)
    require(
        indices.dim() == 1 and indices.dtype == torch.int64 and indices.is_contiguous() and indices.device == x.device,
        "indices must be contiguous int64 [R] on x's device",
        indices,
        x,
    )
    if body == "cpu":
        from quire.kernels.take_rows.cpu import take_rows as run
    else:
        from quire.kernels.take_rows.reference import take_rows as run
    return run(x, indices)
