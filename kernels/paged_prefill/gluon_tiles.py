"""What a group of warps computes: 64 rows of a query tile against all tiles of keys and values, as they arrive."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from quire.kernels.paged_prefill.gluon_ring import box_shift, leave, tile_in, turn_of_keys, turn_of_values, wait_for

ROWS = gl.constexpr(64)  # of a group of warps: what one wgmma multiplies


@gluon.jit
def _weigh(
    scores: gl.tensor,
    highest: gl.tensor,
    total: gl.tensor,
    row_position: gl.tensor,
    tile: gl.tensor,
    kv_end: gl.tensor,
    scale_log2: gl.tensor,
    MASKED: gl.constexpr,
    BOX_ROWS: gl.constexpr,
    layout: gl.constexpr,
) -> gl.tuple:
    """Of each row the highest score and the sum of weights so far, the decay of what was before, the new weights.

    Each row sees position 0, in tile 0, so highest is finite from there on.
    """
    if MASKED:
        block_n: gl.constexpr = scores.shape[1]
        column = gl.arange(0, block_n, gl.SliceLayout(0, layout))
        first = tile * block_n + column // BOX_ROWS * BOX_ROWS
        position = first + column % BOX_ROWS - box_shift(first, kv_end, BOX_ROWS)
        # What stands before a box's own first position is seen in another tile or box, or is zeros.
        visible = (position >= first)[None, :] & (position[None, :] <= row_position[:, None])
        scores = gl.where(visible, scores, float("-inf"))
    new_highest = gl.maximum(highest, gl.max(scores, 1) * scale_log2)
    weights = gl.exp2(scores * scale_log2 - new_highest[:, None])
    decay = gl.exp2(highest - new_highest)
    return new_highest, total * decay + gl.sum(weights, 1), decay, weights


@gluon.jit
def _attend_tile(
    state: gl.tuple,
    rows: gl.shared_memory_descriptor,
    buffers: gl.tuple,
    row_position: gl.tensor,
    tile: gl.tensor,
    num_tiles: gl.tensor,
    kv_end: gl.tensor,
    scale_log2: gl.tensor,
    MASKED: gl.constexpr,
    BOX_ROWS: gl.constexpr,
    scores_layout: gl.constexpr,
    acc_layout: gl.constexpr,
) -> gl.tuple:
    """Scores and weights of a tile, whose keys are there, while the weights of the tile before are multiplied with its
    values. Then the next tile's keys are there or, behind the last tile, the last one's values."""
    highest, total, factors, acc = state
    block_n: gl.constexpr = buffers[0].shape[1]
    k_turn = turn_of_keys(tile)
    v_turn = turn_of_values(tile - 1, num_tiles)
    zeros = gl.zeros([ROWS, block_n], gl.float32, scores_layout)
    scores = warpgroup_mma(rows, tile_in(buffers, k_turn).permute((1, 0)), zeros, use_acc=False, is_async=True)
    wait_for(buffers, v_turn)
    acc = warpgroup_mma(factors, tile_in(buffers, v_turn), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    leave(buffers, k_turn)
    highest, total, decay, weights = _weigh(
        scores, highest, total, row_position, tile, kv_end, scale_log2, MASKED, BOX_ROWS, scores_layout
    )
    # Also a branch: without one ptxas has the next line wait before the weights are computed, not after.
    wait_for(buffers, v_turn + 1)
    acc, factors = warpgroup_mma_wait(0, deps=(acc, factors))
    leave(buffers, v_turn)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc_layout))[:, None]
    return highest, total, gl.convert_layout(weights.to(factors.dtype), factors.type.layout), acc


@gluon.jit
def attend(
    rows: gl.shared_memory_descriptor,
    buffers: gl.tuple,
    first_position: gl.tensor,
    kv_end: gl.tensor,
    scale_log2: gl.tensor,
    FIRST_ROW: gl.constexpr,
    HEADS_PER_PROGRAM: gl.constexpr,
    BOX_ROWS: gl.constexpr,
) -> gl.tensor:
    """Attention of a group's rows, [ROWS, head_dim] in float32. Only tiles that some row does not see all of, and the
    first, are masked."""
    dtype: gl.constexpr = rows.dtype
    block_n: gl.constexpr = buffers[0].shape[1]
    head_dim: gl.constexpr = buffers[0].shape[2]
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_dim, 16])
    factors_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row = FIRST_ROW + gl.arange(0, ROWS, gl.SliceLayout(1, scores_layout))
    row_position = first_position + row // HEADS_PER_PROGRAM
    num_tiles = gl.cdiv(kv_end, block_n)
    num_full = (first_position + 1) // block_n  # tiles that even the first row sees all of

    zeros = gl.zeros([ROWS, block_n], gl.float32, scores_layout)
    wait_for(buffers, 0)
    scores = warpgroup_mma(rows, tile_in(buffers, 0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    leave(buffers, 0)
    highest = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, scores_layout))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, scores_layout))
    acc = gl.zeros([ROWS, head_dim], gl.float32, acc_layout)
    highest, total, _, weights = _weigh(
        scores, highest, total, row_position, 0, kv_end, scale_log2, True, BOX_ROWS, scores_layout
    )
    factors = gl.convert_layout(weights.to(dtype), factors_layout)
    wait_for(buffers, 1)
    for tile in range(1, num_full):
        highest, total, factors, acc = _attend_tile(
            (highest, total, factors, acc), rows, buffers, row_position, tile, num_tiles, kv_end, scale_log2,
            False, BOX_ROWS, scores_layout, acc_layout,
        )  # fmt: skip
    for tile in range(gl.maximum(num_full, 1), num_tiles):
        highest, total, factors, acc = _attend_tile(
            (highest, total, factors, acc), rows, buffers, row_position, tile, num_tiles, kv_end, scale_log2,
            True, BOX_ROWS, scores_layout, acc_layout,
        )  # fmt: skip
    values = tile_in(buffers, turn_of_values(num_tiles - 1, num_tiles))
    acc = warpgroup_mma(factors, values, acc, is_async=True)
    acc, factors = warpgroup_mma_wait(0, deps=(acc, factors))
    return acc / gl.convert_layout(total, gl.SliceLayout(1, acc_layout))[:, None]
