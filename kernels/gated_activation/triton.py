"""Activation and gate as a Triton kernel: a part of a row per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.linear import Activation

FEATURES_PER_PROGRAM = 1024  # 8 for each thread: 16 bytes of 16-bit numbers


@triton.jit
def _activate(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """float32 to float32. NaN stays NaN."""
    if ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(y)) / 2 is the sigmoid of 2 * y
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    return x


@triton.jit
def gated_activation_kernel(
    gate_up: tl.tensor,
    out: tl.tensor,
    stride: tl.tensor,
    NUM_FEATURES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = feature < NUM_FEATURES
    row = gate_up + token * stride + feature
    gate = tl.load(row, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(row + NUM_FEATURES, mask=mask, other=0.0).to(tl.float32)
    tl.store(
        out + token * NUM_FEATURES + feature, (_activate(gate, ACTIVATION) * up).to(out.dtype.element_ty), mask=mask
    )


def gated_activation(gate_up: torch.Tensor, activation: Activation | None) -> torch.Tensor:
    num_tokens, num_features = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, num_features), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    block = min(FEATURES_PER_PROGRAM, triton.next_power_of_2(num_features))
    gated_activation_kernel[(num_tokens, triton.cdiv(num_features, block))](
        gate_up,
        out,
        gate_up.stride(0),
        NUM_FEATURES=num_features,
        ACTIVATION=activation,
        BLOCK=block,
        num_warps=4,
    )
    return out
