"""Forbidding tokens by a bitmask, as grammars hand it out."""

from __future__ import annotations

import torch

from quire.kernels.backend import Backend, choose_body
from quire.kernels.checks import check_logits, require


def apply_token_bitmask(
    logits: torch.Tensor, bitmask: torch.Tensor, rows: torch.Tensor, *, backend: Backend = "auto"
) -> None:
    """Row `rows[i]` of the logits becomes minus infinity where `bitmask[i]` has no bit; in place.

    Token v is allowed if bit v % 32, from the least significant, of word v // 32 is set. Tokens past the bitmask's
    words are forbidden; bits past the vocabulary are ignored. A row that is named twice keeps what both allow.

    Args:
        logits: [R, V] float32; the last dimension is contiguous, rows may have any stride. Rows that are not named and
            allowed tokens are not written.
        bitmask: [M, W] int32, contiguous; W is ceil(V / 32) for the whole vocabulary (at most 2^18 on a GPU).
        rows: [M] int32 or int64, contiguous, each in [0, R).
        backend: "auto" goes by the device of the logits. The reference also takes float64 logits.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.

    Source: Dong et al., "XGrammar: Flexible and Efficient Structured Generation Engine for Large Language Models", 2024
    (arXiv 2411.15100); llguidance has the same layout.
    """
    body = choose_body(backend, logits.device)
    check_logits(logits, body)
    require(
        bitmask.dim() == 2 and bitmask.dtype == torch.int32 and bitmask.is_contiguous(),
        "bitmask must be contiguous int32 [M, W]",
        bitmask,
    )
    require(
        rows.shape == bitmask.shape[:1] and rows.dtype in (torch.int32, torch.int64) and rows.is_contiguous(),
        "rows must be contiguous int32 or int64 [M]",
        rows,
        bitmask,
    )
    require(logits.device == bitmask.device == rows.device, "all tensors must be on one device", logits, bitmask, rows)
    if body == "triton":
        from quire.kernels.token_bitmask.triton import token_bitmask as run
    elif body == "cpu":
        from quire.kernels.token_bitmask.cpu import token_bitmask as run
    else:
        from quire.kernels.token_bitmask.reference import token_bitmask as run
    run(logits, bitmask, rows)
