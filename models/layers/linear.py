"""Linear layers. On a CPU their weights are packed as they are loaded; the plain ones are not kept."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from quire.config import ConfigError, Quantization
from quire.kernels import fp8_linear as fp8
from quire.kernels import linear as packed
from quire.kernels import quantized_linear as quantized
from quire.kernels.fp8_linear import Fp8Weight, fp8_linear
from quire.kernels.gated_activation import gated_activation
from quire.kernels.linear import Activation
from quire.kernels.linear.reference import activate
from quire.kernels.quantized_linear import Bits, QuantizedWeight, quantized_linear
from quire.models.weights import Weights

BITS: dict[Quantization, Bits] = {"int8": 8, "int4": 4}
"""Of the roundings for CPUs."""


class Linear(Protocol):
    """`f(x @ weight.T + bias)` over [T, in_features], or `f(gate) * up` of its halves if the weight is gated."""

    def __call__(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor: ...


class TorchLinear:
    """As torch has it; on a GPU that is the vendor's library."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation | None, *, gated: bool
    ) -> None:
        self._weight = weight
        self._bias = bias
        self._activation = activation
        self._gated = gated

    def __call__(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        out = F.linear(x, self._weight, self._bias)
        out = gated_activation(out, self._activation) if self._gated else activate(out, self._activation)
        return out if out_dtype is None else out.to(out_dtype)


class Fp8Linear:
    """On a GPU, on weights in fp8; inputs are rounded to fp8 too."""

    def __init__(
        self, weight: Fp8Weight, bias: torch.Tensor | None, activation: Activation | None, *, gated: bool
    ) -> None:
        self._weight = weight
        self._bias = bias
        self._activation = activation
        self._gated = gated

    def __call__(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        out = fp8_linear(x, self._weight, self._bias)
        out = gated_activation(out, self._activation) if self._gated else activate(out, self._activation)
        return out if out_dtype is None else out.to(out_dtype)


class PackedLinear:
    """On a CPU, by our own kernel."""

    def __init__(self, weight: packed.PackedWeight, bias: torch.Tensor | None, activation: Activation | None) -> None:
        self._weight = weight
        self._bias = None if bias is None else packed.pack_bias(bias, gated=weight.gated)
        self._activation = activation

    def __call__(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return packed.linear(x, self._weight, self._bias, activation=self._activation, out_dtype=out_dtype)


class QuantizedLinear:
    """On a CPU, on weights that were rounded to 8 or 4 bits."""

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None, activation: Activation | None) -> None:
        self._weight = weight
        self._bias = None if bias is None else packed.pack_bias(bias, gated=weight.gated)
        self._activation = activation

    def __call__(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return quantized_linear(x, self._weight, self._bias, activation=self._activation, out_dtype=out_dtype)


def make_linear(
    weights: Weights,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: Activation | None = None,
    gated: bool = False,
) -> Linear:
    """The layer for `weight` [out_features, in_features], taken from `weights`; gated: the gate's rows come first."""
    if weights.quantization == "fp8":
        return Fp8Linear(quantize_fp8(weights, weight), bias, activation, gated=gated)
    if weights.quantization is not None:
        return QuantizedLinear(quantize(weights, weight, BITS[weights.quantization], gated=gated), bias, activation)
    if weight.device.type == "cpu":
        return PackedLinear(packed.pack(weight, gated=gated), bias, activation)
    return TorchLinear(weight, bias, activation, gated=gated)


def quantize(weights: Weights, weight: torch.Tensor, bits: Bits, *, gated: bool = False) -> QuantizedWeight:
    """Round a weight that was taken from `weights`.

    Raises:
        ConfigError: it is not finite.
    """
    try:
        rounded = quantized.quantize(weight, bits, gated=gated)
    except ValueError as error:
        raise ConfigError(f"--quantization {weights.quantization}: {error}; load the model without it.") from error
    weights.replaced(weight, rounded.num_bytes)
    return rounded


def quantize_fp8(weights: Weights, weight: torch.Tensor) -> Fp8Weight:
    """As `quantize`, to what the device multiplies."""
    try:
        rounded = fp8.quantize(weight, fp8_dtype(weights))
    except ValueError as error:
        raise ConfigError(f"--quantization fp8: {error}; load the model without it.") from error
    weights.replaced(weight, rounded.num_bytes)
    return rounded


def fp8_dtype(weights: Weights) -> torch.dtype:
    """Raises ConfigError if the device multiplies no fp8."""
    dtype = fp8.code_dtype(weights.device)
    if dtype is None:
        raise ConfigError(f"{weights.device} has no products of fp8; load the model without --quantization fp8.")
    return dtype


def fused_linear(
    weights: Weights,
    rows: dict[str, int],
    in_features: int,
    *,
    bias: bool,
    activation: Activation | None = None,
    gated: bool = False,
) -> Linear:
    """Several projections of one input as one: their outputs side by side, in the order of `rows` (name: features)."""
    names = {f"{name}.weight": num for name, num in rows.items()}
    bias_vector = weights.stacked({f"{name}.bias": num for name, num in rows.items()}) if bias else None
    stored = weights.stacked_fp8(names, in_features)
    if stored is not None:
        return Fp8Linear(
            fp8.in_code_dtype(Fp8Weight(*stored), fp8_dtype(weights)), bias_vector, activation, gated=gated
        )
    weight = weights.matrix(names, in_features)
    return make_linear(weights, weight, bias_vector, activation=activation, gated=gated)


def linear(weights: Weights, name: str, in_features: int, out_features: int, *, bias: bool) -> Linear:
    return fused_linear(weights, {name: out_features}, in_features, bias=bias)
