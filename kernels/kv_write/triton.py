"""Writing keys and values into pages as a Triton kernel: one token per program, K and V together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.quantization import LARGEST_CODE, SMALLEST_RANGE

MAX_ELEMENTS_PER_PROGRAM = 2048


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def kv_write_kernel(
    key: tl.tensor,
    value: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    slot_mapping: tl.tensor,
    key_stride_token: tl.tensor,
    key_stride_head: tl.tensor,
    value_stride_token: tl.tensor,
    value_stride_head: tl.tensor,
    cache_stride_block: tl.tensor,
    cache_stride_head: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = element < NUM_KV_HEADS * HEAD_DIM
    head = (element // HEAD_DIM).to(tl.int64)
    dim = element % HEAD_DIM
    slot = tl.load(slot_mapping + token).to(tl.int64)
    target = (slot // BLOCK_SIZE) * cache_stride_block + head * cache_stride_head
    target += (slot % BLOCK_SIZE) * HEAD_DIM + dim
    keys = tl.load(key + token * key_stride_token + head * key_stride_head + dim, mask=mask)
    values = tl.load(value + token * value_stride_token + head * value_stride_head + dim, mask=mask)
    tl.store(k_cache + target, keys.to(k_cache.dtype.element_ty), mask=mask)
    tl.store(v_cache + target, values.to(v_cache.dtype.element_ty), mask=mask)


@triton.jit
def _store_codes(
    x: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    mask: tl.tensor,
    SMALLEST_RANGE: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
) -> None:
    """Codes of a masked vector x, and its scale, at the addresses `codes` and `scale`, as `quantize` defines them."""
    # Magnitudes are compared by their bits: in that order NaN is above all numbers.
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.where(mask, bits, 0), 0).to(tl.float32, bitcast=True)
    largest = tl.where(largest < SMALLEST_RANGE, SMALLEST_RANGE, largest)
    bits = (largest * (1 / LARGEST_CODE)).to(tl.int32, bitcast=True)
    rounded = ((tl.minimum(bits, 0x7FC00000) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    quotients = x * tl.div_rn(1.0, rounded)
    if codes.dtype.element_ty == tl.int8:
        shifted = quotients + 12582912.0  # 1.5 * 2**23: leaves the nearest integer in the low bits
        tl.store(codes, shifted.to(tl.int32, bitcast=True).to(tl.int8), mask=mask)
    else:
        tl.store(codes, quotients.to(codes.dtype.element_ty), mask=mask)
    tl.store(scale, rounded.to(scale.dtype.element_ty))


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def kv_quantize_kernel(
    key: tl.tensor,
    value: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    k_scales: tl.tensor,
    v_scales: tl.tensor,
    slot_mapping: tl.tensor,
    key_stride_token: tl.tensor,
    key_stride_head: tl.tensor,
    value_stride_token: tl.tensor,
    value_stride_head: tl.tensor,
    cache_stride_block: tl.tensor,
    cache_stride_head: tl.tensor,
    scales_stride_block: tl.tensor,
    scales_stride_head: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SMALLEST_RANGE: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One KV head of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, BLOCK)  # [BLOCK]
    mask = dim < HEAD_DIM
    slot = tl.load(slot_mapping + token).to(tl.int64)
    block_id, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    codes = block_id * cache_stride_block + head * cache_stride_head + offset * HEAD_DIM + dim
    scale = block_id * scales_stride_block + head * scales_stride_head + offset
    keys = tl.load(key + token * key_stride_token + head * key_stride_head + dim, mask=mask, other=0.0)
    values = tl.load(value + token * value_stride_token + head * value_stride_head + dim, mask=mask, other=0.0)
    _store_codes(keys.to(tl.float32), k_cache + codes, k_scales + scale, mask, SMALLEST_RANGE, LARGEST_CODE)
    _store_codes(values.to(tl.float32), v_cache + codes, v_scales + scale, mask, SMALLEST_RANGE, LARGEST_CODE)


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> None:
    num_tokens, num_kv_heads, head_dim = key.shape
    if num_tokens == 0:
        return
    strides = (*key.stride()[:2], *value.stride()[:2], *k_cache.stride()[:2])
    if k_scales is not None:
        kv_quantize_kernel[(num_tokens, num_kv_heads)](
            *(key, value, k_cache, v_cache, k_scales, v_scales, slot_mapping, *strides, *k_scales.stride()[:2]),
            HEAD_DIM=head_dim,
            BLOCK_SIZE=k_cache.shape[2],
            SMALLEST_RANGE=SMALLEST_RANGE,
            LARGEST_CODE=LARGEST_CODE[k_cache.dtype],
            BLOCK=triton.next_power_of_2(head_dim),
            num_warps=1,
        )
        return
    num_elements = num_kv_heads * head_dim
    block = min(MAX_ELEMENTS_PER_PROGRAM, triton.next_power_of_2(num_elements))
    kv_write_kernel[(num_tokens, triton.cdiv(num_elements, block))](
        *(key, value, k_cache, v_cache, slot_mapping, *strides),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=k_cache.shape[2],
        BLOCK=block,
        num_warps=4,
    )
