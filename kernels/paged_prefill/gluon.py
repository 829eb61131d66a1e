"""Paged causal attention for Hopper in Gluon: two warps that load tiles, and two groups of warps that compute.

Each group takes 64 rows of a query tile and multiplies with wgmma. It computes the softmax of one tile of keys while
the values of the tile before are multiplied (gluon_tiles.py); what passes between the warps is in gluon_ring.py. The
rows of a query tile and the grid are those of triton.py.
"""

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quire.kernels.paged_prefill.gluon_ring import PANEL, load_tiles
from quire.kernels.paged_prefill.gluon_tiles import ROWS, attend
from quire.kernels.paged_prefill.parameters import PrefillParameters, bits_of, num_query_tiles
from quire.kernels.paged_prefill.triton_tiles import locate

NUM_GROUPS = gl.constexpr(2)
GROUP_REGISTERS, LOADER_REGISTERS = 232, 40
"""Of a thread. Three groups of warps have them between them, the third for the two warps that load, and start with a
third each: PrefillParameters.max_registers."""


@gluon.jit
def _compute(
    query: gl.tensor,
    out: gl.tensor,
    rows: gl.shared_memory_descriptor,
    buffers: gl.tuple,
    place: gl.tuple,
    strides: gl.tuple,
    scale_log2: gl.tensor,
    FIRST_ROW: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    HEADS_PER_PROGRAM: gl.constexpr,
    BOX_ROWS: gl.constexpr,
) -> None:
    """What a group of warps does: its rows of the query into shared memory, attention, and from there into `out`."""
    start, query_len, first_token, first_position, kv_end = place
    query_stride_token, query_stride_head, out_stride_token, out_stride_head = strides
    head_dim: gl.constexpr = rows.shape[1]
    tokens_per_tile: gl.constexpr = NUM_GROUPS * ROWS // HEADS_PER_PROGRAM
    programs_per_group: gl.constexpr = (GROUP_SIZE + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = FIRST_ROW + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    dim = gl.arange(0, head_dim, gl.SliceLayout(0, layout))
    token = first_token + row // HEADS_PER_PROGRAM
    head_in_group = gl.program_id(1) % programs_per_group * HEADS_PER_PROGRAM + row % HEADS_PER_PROGRAM
    head = (gl.program_id(1) // programs_per_group * GROUP_SIZE + head_in_group).to(gl.int64)
    is_row = (row < tokens_per_tile * HEADS_PER_PROGRAM) & (token < query_len) & (head_in_group < GROUP_SIZE)
    token = (start + token).to(gl.int64)
    at = token * query_stride_token + head * query_stride_head
    rows.store(gl.load(query + at[:, None] + dim[None, :], mask=is_row[:, None], other=0.0))
    fence_async_shared()
    result = attend(rows, buffers, first_position, kv_end, scale_log2, FIRST_ROW, HEADS_PER_PROGRAM, BOX_ROWS)
    rows.store(result.to(rows.dtype))
    at = token * out_stride_token + head * out_stride_head
    gl.store(out + at[:, None] + dim[None, :], rows.load(layout), mask=is_row[:, None])


# Numbers and tables that change from step to step must not ask for another compilation.
@gluon.jit(
    do_not_specialize=["num_seqs", "table_stride"],
    do_not_specialize_on_alignment=["block_tables", "seq_lens", "query_start"],
)
def gluon_prefill_kernel(
    query: gl.tensor,
    k_desc: tma.tensor_descriptor,
    v_desc: tma.tensor_descriptor,
    block_tables: gl.tensor,
    seq_lens: gl.tensor,
    query_start: gl.tensor,
    out: gl.tensor,
    scale_log2: gl.tensor,
    num_seqs: gl.tensor,
    query_stride_token: gl.tensor,
    query_stride_head: gl.tensor,
    table_stride: gl.tensor,
    out_stride_token: gl.tensor,
    out_stride_head: gl.tensor,
    GROUP_SIZE: gl.constexpr,
    HEADS_PER_PROGRAM: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    BITS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_SLOTS: gl.constexpr,
    GROUP_REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
) -> None:
    tokens_per_tile: gl.constexpr = NUM_GROUPS * ROWS // HEADS_PER_PROGRAM
    programs_per_group: gl.constexpr = (GROUP_SIZE + HEADS_PER_PROGRAM - 1) // HEADS_PER_PROGRAM
    # The last tiles of a sequence see the most keys: they start first, so that none is left alone at the end.
    query_tile = gl.num_programs(0) - 1 - gl.program_id(0)
    sequence, start, query_len, seq_len, first_token = locate(
        query_tile, query_start, seq_lens, num_seqs, tokens_per_tile, BITS
    )
    if first_token >= query_len:
        return

    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    rows = gl.allocate_shared_memory(k_desc.dtype, [NUM_GROUPS, ROWS, HEAD_DIM], layout)
    ring = gl.allocate_shared_memory(k_desc.dtype, [NUM_SLOTS, BLOCK_N, HEAD_DIM], layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM_SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(NUM_SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=NUM_GROUPS)
    fence_async_shared()  # the TMA, too, is to find the barriers as they are now
    first_position = seq_len - query_len + first_token
    kv_end = first_position + gl.minimum(tokens_per_tile, query_len - first_token)
    table = block_tables + sequence.to(gl.int64) * table_stride
    kv_head = gl.program_id(1) // programs_per_group
    buffers = (ring, full, empty)
    place = (start, query_len, first_token, first_position, kv_end)
    strides = (query_stride_token, query_stride_head, out_stride_token, out_stride_head)
    box_rows: gl.constexpr = k_desc.block_shape[2]
    gl.warp_specialize(
        [
            (_compute, (query, out, rows.index(0), buffers, place, strides, scale_log2, 0,
                        GROUP_SIZE, HEADS_PER_PROGRAM, box_rows)),
            (_compute, (query, out, rows.index(1), buffers, place, strides, scale_log2, ROWS,
                        GROUP_SIZE, HEADS_PER_PROGRAM, box_rows)),
            (load_tiles, (buffers, k_desc, kv_end, kv_head, table, BLOCK_SIZE, True)),
            (load_tiles, (buffers, v_desc, kv_end, kv_head, table, BLOCK_SIZE, False)),
        ],
        [4, 1, 1],
        [GROUP_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip


def launch_gluon(
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    parameters: PrefillParameters,
) -> None:
    """As triton.launch, with parameters of `warp_specialized`."""
    num_tokens, num_heads, head_dim = query.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    group_size, num_seqs = num_heads // num_kv_heads, seq_lens.shape[0]
    num_programs = num_kv_heads * -(-group_size // parameters.heads_per_program)
    box = [1, 1, min(block_size, parameters.block_n), int(PANEL)]
    layout = gl.NVMMASharedLayout(128, 16, rank=4)
    k_desc, v_desc = (
        TensorDescriptor(cache, list(cache.shape), list(cache.stride()), box, layout) for cache in (k_cache, v_cache)
    )
    gluon_prefill_kernel[num_query_tiles(parameters, num_tokens, num_seqs), num_programs](
        query,
        k_desc,
        v_desc,
        block_tables,
        seq_lens,
        query_start,
        out,
        scale * math.log2(math.e),
        num_seqs,
        query.stride(0),
        query.stride(1),
        block_tables.stride(0),
        out.stride(0),
        out.stride(1),
        GROUP_SIZE=group_size,
        HEADS_PER_PROGRAM=parameters.heads_per_program,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BITS=bits_of(num_seqs),
        BLOCK_N=parameters.block_n,
        NUM_SLOTS=parameters.num_slots,
        GROUP_REGISTERS=GROUP_REGISTERS,
        LOADER_REGISTERS=LOADER_REGISTERS,
        num_warps=parameters.num_warps,
        maxnreg=parameters.max_registers,
    )
