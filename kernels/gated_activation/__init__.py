"""The gate of a feed-forward layer: what its activation makes of one half of a projection lets the other through."""

from __future__ import annotations

import torch

from quire.kernels.backend import Backend, choose_body
from quire.kernels.checks import check_dtype, require
from quire.kernels.linear import Activation


def gated_activation(
    gate_up: torch.Tensor, activation: Activation | None, *, backend: Backend = "auto"
) -> torch.Tensor:
    """`f(gate) * up` of the two halves of each row. Computed in float32 and rounded once.

    Args:
        gate_up: [T, 2 * N]; float32, float16 or bfloat16; the gate's N features come first. The last dimension is
            contiguous.
        activation: f; None is the identity. "gelu" is the exact one, by the error function.
        backend: "auto" goes by the device. On a CPU this is plain torch: there gates are part of the product that
            makes them (`kernels/linear`).

    Returns:
        [T, N] in gate_up's dtype, contiguous.

    Raises:
        ValueError: a shape, dtype or stride is not as above.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020 (arXiv 2002.05202).
    """
    body = choose_body(backend, gate_up.device)
    require(
        gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0 and gate_up.stride(1) == 1,
        "gate_up must be [T, 2 * N], its last dimension contiguous",
        gate_up,
    )
    check_dtype(gate_up, "triton" if body == "triton" else "reference")
    if body == "triton":
        from quire.kernels.gated_activation.triton import gated_activation as run
    else:
        from quire.kernels.gated_activation.reference import gated_activation as run
    return run(gate_up, activation)
