"""Writing keys and values into pages as a Triton kernel: one token per program, K and V together."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

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


def kv_write(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    num_tokens, num_kv_heads, head_dim = key.shape
    if num_tokens == 0:
        return
    num_elements = num_kv_heads * head_dim
    block = min(MAX_ELEMENTS_PER_PROGRAM, triton.next_power_of_2(num_elements))
    kv_write_kernel[(num_tokens, triton.cdiv(num_elements, block))](
        key,
        value,
        k_cache,
        v_cache,
        slot_mapping,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=k_cache.shape[2],
        BLOCK=block,
        num_warps=4,
    )
