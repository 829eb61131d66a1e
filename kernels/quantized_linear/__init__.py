"""Linear layers on weights of 8 or 4 bits, rounded at load.

For CPUs: reading the weights is what a decode step takes its time for, and these are a half and a quarter of bfloat16.
"""

from __future__ import annotations

import torch

from quire.kernels.backend import Backend, choose_body
from quire.kernels.checks import KERNEL_DTYPES, require
from quire.kernels.cpu_matrix import PANEL
from quire.kernels.cpu_quantized import HAS_BYTE_PRODUCT
from quire.kernels.linear import Activation
from quire.kernels.quantized_linear.weight import Bits, QuantizedWeight, dequantize, quantize

__all__ = ["Bits", "QuantizedWeight", "dequantize", "embedding", "is_fast_here", "quantize", "quantized_linear"]


def is_fast_here() -> bool:
    """Whether the processor has the products of bytes that the kernel is made for; the results are the same without."""
    return HAS_BYTE_PRODUCT


def quantized_linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None = None,
    *,
    activation: Activation | None = None,
    out_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """`f(x @ weight.T + bias)`, or `f(gate) * up` of the two halves if the weight is gated.

    The kernel rounds each row of x, in groups of `weight.group_size` features, to 16 bits: to multiples of
    max|x| / 32639. The sums of a group are exact integers, those of the groups are added in float32 in their order, so
    a row's result is the same in every batch, and for the same weights on every CPU until the activation. A NaN or an
    infinity in a row of x makes all of that row's sums NaN; groups whose inputs are all below 1e-30 count as zeros.

    Args:
        x: [T, K] float32, float16 or bfloat16; the last dimension is contiguous.
        weight: from `quantize`.
        bias: from `quire.kernels.linear.pack_bias` (with the weight's `gated`), or None.
        activation: f; None is the identity.
        out_dtype: x's dtype, or float32.
        backend: "auto" is the CPU kernel. The reference does not round x.

    Returns:
        [T, out_features], contiguous.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.

    Source: symmetric weight-only rounding, as in Dettmers et al., "LLM.int8()", 2022 (arXiv 2208.07339), by rows, and
    in Frantar et al., "GPTQ", 2022 (arXiv 2210.17323), by groups.
    """
    body = choose_body(backend, x.device)
    require(body != "triton", "quantized weights are for the CPU")
    require(
        x.dim() == 2 and x.shape[1] == weight.in_features and x.stride(1) == 1 and x.dtype in KERNEL_DTYPES,
        f"x must be [T, {weight.in_features}] float32, float16 or bfloat16, its last dimension contiguous",
        x,
    )
    require(out_dtype in (None, x.dtype, torch.float32), f"out_dtype must be {x.dtype} or float32, not {out_dtype}")
    if bias is not None:
        require(
            bias.dtype == torch.float32 and bias.numel() == weight.data.shape[0] * PANEL and bias.is_contiguous(),
            "bias must come from pack_bias",
            bias,
        )
    if body == "cpu":
        from quire.kernels.quantized_linear.cpu import quantized_linear as run
    else:
        from quire.kernels.quantized_linear.reference import quantized_linear as run
    return run(x, weight, bias, activation, out_dtype or x.dtype)


def embedding(
    indices: torch.Tensor, weight: QuantizedWeight, out_dtype: torch.dtype, *, backend: Backend = "auto"
) -> torch.Tensor:
    """Row i of a weight of 8 bits that is not gated for each index i: [T] int64 to [T, K] in `out_dtype`.

    Raises:
        ValueError: indices are not [T] int64 on the CPU, or the weight is gated or of 4 bits. That they are in range
            is the caller's duty.
    """
    body = choose_body(backend, indices.device)
    require(body != "triton", "quantized weights are for the CPU")
    require(
        indices.dim() == 1 and indices.dtype == torch.int64 and indices.is_contiguous(),
        "indices must be contiguous int64 [T]",
        indices,
    )
    require(weight.bits == 8 and not weight.gated, "the weight must have 8 bits and not be gated")
    if body == "cpu":
        from quire.kernels.quantized_linear.cpu import embedding as run
    else:
        from quire.kernels.quantized_linear.reference import embedding as run
    return run(indices, weight, out_dtype)
