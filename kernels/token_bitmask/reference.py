"""Forbidding tokens by a bitmask in plain torch."""

from __future__ import annotations

import torch


def token_bitmask(logits: torch.Tensor, bitmask: torch.Tensor, rows: torch.Tensor) -> None:
    vocab_size = logits.shape[1]
    bits = (bitmask[:, :, None] >> torch.arange(32, dtype=torch.int32, device=bitmask.device)) & 1
    allowed = torch.zeros((len(rows), vocab_size), dtype=torch.bool, device=logits.device)
    num_known = min(vocab_size, 32 * bitmask.shape[1])
    allowed[:, :num_known] = bits.flatten(1)[:, :num_known] == 1
    for row, line in zip(rows.tolist(), allowed, strict=True):
        logits[row].masked_fill_(~line, -torch.inf)
