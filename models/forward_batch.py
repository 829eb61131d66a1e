"""The inputs of one forward pass, as the model sees them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quire.kernels.cascade_decode import PrefixGroups


@dataclass(slots=True)
class ForwardBatch:
    """T tokens of S sequences; all tensors on the model's device, set by `engine.inputs.build_inputs`.

    The first `num_decodes` sequences have one token each, so tokens [0, num_decodes) are theirs; the others follow.
    """

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, position in its sequence
    slot_mapping: torch.Tensor  # [T] int64, block_id * block_size + offset: where this token's K and V go
    block_tables: torch.Tensor  # [S, max_num_blocks] int32
    seq_lens: torch.Tensor  # [S] int32, tokens in the cache after this step's write
    prefill_start: torch.Tensor  # [S - num_decodes + 1] int32, cumulative query lengths of those that are not decodes
    logits_indices: torch.Tensor | None  # [R] int64, tokens whose logits are wanted; None: all, in order
    num_decodes: int
    max_query_len: int  # over the sequences that are not decodes; 0 if there is none
    max_seq_len: int
    prefix_groups: PrefixGroups | None = None  # of the decodes, on the device of the step; None: nobody shares enough
