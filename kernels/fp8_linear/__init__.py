"""Linear layers whose weights and inputs have 8 bits: fp8 products on a GPU's matrix units, summed in float32."""

from __future__ import annotations

import torch

from quire.kernels.backend import Backend, choose_body
from quire.kernels.checks import check_dtype, require
from quire.kernels.fp8_linear.weight import CODE_DTYPES, Fp8Weight, code_dtype, in_code_dtype, quantize

__all__ = ["CODE_DTYPES", "Fp8Weight", "code_dtype", "fp8_linear", "in_code_dtype", "quantize", "quantize_tokens"]


def quantize_tokens(
    x: torch.Tensor, dtype: torch.dtype, *, backend: Backend = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to fp8 as multiples of a scale of its own, its largest magnitude over the largest code.

    A row depends on nothing but itself. One with NaN or infinity gets a code that is NaN.

    Args:
        x: [T, K], K at most 32768; float32, float16 or bfloat16, the last dimension contiguous.
        dtype: of the codes, one of CODE_DTYPES.
        backend: "auto" goes by x's device; on a CPU this is plain torch.

    Returns:
        codes [T, K] and scales [T] float32.

    Raises:
        ValueError: a shape, dtype or stride is not as above.
    """
    body = choose_body(backend, x.device)
    require(
        x.dim() == 2 and x.stride(1) == 1 and 0 < x.shape[1] <= 2**15,
        "x must be [T, K], K at most 32768, its last dimension contiguous",
        x,
    )
    check_dtype(x, "triton" if body == "triton" else "reference")
    require(dtype in CODE_DTYPES, f"codes are float8_e4m3fn or float8_e4m3fnuz, not {dtype}")
    if body == "triton":
        from quire.kernels.fp8_linear.triton import quantize_tokens as run
    else:
        from quire.kernels.fp8_linear.reference import quantize_tokens as run
    return run(x, dtype)


def fp8_linear(
    x: torch.Tensor,
    weight: Fp8Weight,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """`x @ weight.T + bias` of x rounded by `quantize_tokens`.

    Products are exact and summed in float32; scales and bias come after the sum, which is then rounded once. (Matrix
    units of compute capability 9.0 sum with fewer bits than float32 has: their sums are of 128 products at most.)

    Args:
        x: [T, K]; float32, float16 or bfloat16, the last dimension contiguous.
        weight: [N, K], on x's device.
        bias: [N] in x's dtype, contiguous, or None.
        out_dtype: x's dtype, or float32.
        backend: "auto" goes by x's device; on a CPU this is plain torch, meant for tests.

    Returns:
        [T, N], contiguous.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022 (arXiv 2209.05433).
    """
    body = choose_body(backend, x.device)
    num_features, depth = weight.codes.shape
    require(
        x.dim() == 2 and x.shape[1] == depth and x.device == weight.codes.device,
        f"x must be [T, {depth}] on the weight's device",
        x,
    )
    require(out_dtype in (None, x.dtype, torch.float32), f"out_dtype must be {x.dtype} or float32, not {out_dtype}")
    if bias is not None:
        require(
            bias.shape == (num_features,) and bias.dtype == x.dtype and bias.is_contiguous(),
            f"bias must be contiguous [{num_features}] in x's dtype",
            bias,
        )
    codes, scales = quantize_tokens(x, weight.codes.dtype, backend=backend)
    if body == "triton":
        from quire.kernels.fp8_linear.triton import scaled_product as run
    else:
        from quire.kernels.fp8_linear.reference import scaled_product as run
    return run(codes, scales, weight.codes, weight.scales, bias, out_dtype or x.dtype)
