"""fp8 linear layers as Triton kernels: one rounds the inputs, row by row, the other multiplies tile by tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from quire.kernels.fp8_linear.weight import SMALLEST_SCALE
from quire.kernels.targets import Target, current_target

ROWS_PER_GROUP = 8
"""Tiles of rows that share the weight's tiles while these are in the L2 cache."""


@triton.jit
def quantize_tokens_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    x_stride: tl.tensor,
    DEPTH: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    values = tl.load(x + row * x_stride + place, mask=place < DEPTH, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0) / LARGEST, SMALLEST_SCALE)
    rounded = tl.div_rn(values, scale + tl.zeros([BLOCK], tl.float32)).to(codes.dtype.element_ty)
    tl.store(codes + row * DEPTH + place, rounded, mask=place < DEPTH)
    tl.store(scales + row, scale)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["scales"])
def scaled_product_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    weight_codes: tl.tensor,
    weight_scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    num_tokens: tl.tensor,
    NUM_FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS_PER_GROUP: tl.constexpr,
    PROMOTE_EVERY: tl.constexpr,
) -> None:
    num_columns: tl.constexpr = (NUM_FEATURES + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    group = tile // (ROWS_PER_GROUP * num_columns)
    first = group * ROWS_PER_GROUP
    num_rows = tl.minimum(tl.cdiv(num_tokens, BLOCK_M) - first, ROWS_PER_GROUP)
    place = tile % (ROWS_PER_GROUP * num_columns)
    token = ((first + place % num_rows) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # [BLOCK_M]
    feature = ((place // num_rows) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # [BLOCK_N]
    depth = tl.arange(0, BLOCK_K)
    is_token, is_feature = token < num_tokens, feature < NUM_FEATURES
    a_at = codes + (token * DEPTH)[:, None] + depth[None, :]
    b_at = weight_codes + (feature * DEPTH)[None, :] + depth[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        a_mask, b_mask = is_token[:, None], is_feature[None, :]
        if DEPTH % BLOCK_K != 0:
            is_inside = depth < DEPTH - start
            a_mask, b_mask = a_mask & is_inside[None, :], b_mask & is_inside[:, None]
        a = tl.load(a_at, mask=a_mask, other=0.0)
        b = tl.load(b_at, mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=PROMOTE_EVERY)
        a_at += BLOCK_K
        b_at += BLOCK_K
    acc *= tl.load(scales + token, mask=is_token, other=0.0)[:, None]
    acc *= tl.load(weight_scales + feature, mask=is_feature, other=0.0)[None, :]
    if bias is not None:
        acc += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    out_at = out + (token * NUM_FEATURES)[:, None] + feature[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=is_token[:, None] & is_feature[None, :])


@dataclass(frozen=True, slots=True)
class LaunchParameters:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def launch_parameters(num_tokens: int, num_features: int, target: Target) -> LaunchParameters:
    """Few rows wait for the weights: tiles so narrow that every multiprocessor has one, and deep ones. Many rows wait
    for the matrix units: tiles as large as the registers take with a second sum beside the first.
    """
    num_programs = triton.cdiv(num_tokens, 128) * triton.cdiv(num_features, 128)
    if num_tokens <= 64:
        # Datacenter GPUs of NVIDIA's multiply fp8 itself in tiles of 64 rows or more, and convert it for smaller ones.
        block_m = 64 if target.arch in (90, 100, 103) else max(16, triton.next_power_of_2(num_tokens))
        block_n = 64 if num_features >= 128 * target.num_multiprocessors else 32
        block_k = 256
    else:
        block_m = block_n = 128 if num_programs >= target.num_multiprocessors else 64
        block_k = 128
    most_stages = 2 if target.vendor == "hip" else 4
    num_stages = min(most_stages, (target.shared_memory - 1024) // ((block_m + block_n) * block_k))
    return LaunchParameters(block_m, block_n, block_k, 8 if block_m == 128 else 4, max(2, num_stages))


def quantize_tokens(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, depth = x.shape
    codes = torch.empty((num_tokens, depth), dtype=dtype, device=x.device)
    scales = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return codes, scales
    block = triton.next_power_of_2(depth)
    quantize_tokens_kernel[(num_tokens,)](
        x,
        codes,
        scales,
        x.stride(0),
        DEPTH=depth,
        LARGEST=torch.finfo(dtype).max,
        SMALLEST_SCALE=SMALLEST_SCALE,
        BLOCK=block,
        num_warps=16 if block >= 16_384 else 8 if block >= 4096 else 4,
    )
    return codes, scales


def scaled_product(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight_codes: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    num_tokens, (num_features, depth) = codes.shape[0], weight_codes.shape
    out = torch.empty((num_tokens, num_features), dtype=out_dtype, device=codes.device)
    if out.numel() == 0:
        return out
    launch = launch_parameters(num_tokens, num_features, current_target(codes.device))
    grid = (triton.cdiv(num_tokens, launch.block_m) * triton.cdiv(num_features, launch.block_n),)
    scaled_product_kernel[grid](
        codes,
        scales,
        weight_codes,
        weight_scales,
        bias,
        out,
        num_tokens,
        NUM_FEATURES=num_features,
        DEPTH=depth,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        ROWS_PER_GROUP=ROWS_PER_GROUP,
        PROMOTE_EVERY=128,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out
