"""Root mean square layer normalisation, with the residual addition before it."""

from __future__ import annotations

import torch

from quire.kernels.backend import Backend, choose_body
from quire.kernels.checks import check_dtype, require


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    Computed in float32, rounded to x's dtype, then multiplied by weight, as Llama does.

    Args:
        x: [T, D], or [T, H, D] for the norm of each head; float32, float16 or bfloat16. The last dimension is
            contiguous, the others may have any strides.
        weight: [D], contiguous, x's dtype.
        eps: added to the mean of squares.
        residual: None, or [T, D] in x's dtype with its last dimension contiguous. It is overwritten with x + residual
            (rounded to its dtype) and that sum is what is normalised. Only with x [T, D].
        backend: "auto" goes by x's device.

    Returns:
        The normalised tensor: x's shape and dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv 1910.07467).
    """
    body = choose_body(backend, x.device)
    require(x.dim() in (2, 3) and x.stride(-1) == 1, "x must be [T, D] or [T, H, D], its last dimension contiguous", x)
    check_dtype(x, body)
    require(
        weight.shape == x.shape[-1:]
        and weight.dtype == x.dtype
        and weight.device == x.device
        and weight.is_contiguous(),
        "weight must be contiguous [D] in x's dtype and on its device",
        weight,
        x,
    )
    if residual is not None:
        require(
            x.dim() == 2
            and residual.shape == x.shape
            and residual.dtype == x.dtype
            and residual.device == x.device
            and residual.stride(-1) == 1,
            "with a residual both must be [T, D] of one dtype and device, the last dimension contiguous",
            residual,
            x,
        )
    if body == "triton":
        from quire.kernels.rms_norm.triton import rms_norm as run
    elif body == "cpu":
        from quire.kernels.rms_norm.cpu import rms_norm as run
    else:
        from quire.kernels.rms_norm.reference import rms_norm as run
    return run(x, weight, eps, residual)
