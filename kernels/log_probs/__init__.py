"""Log probabilities of chosen tokens and of the most likely ones."""

from __future__ import annotations

import torch

from quire.kernels.backend import Backend, choose_body
from quire.kernels.checks import check_logits, require

MAX_NUM_TOP = 64


def log_probs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int, *, backend: Backend = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Natural logarithms of softmax(logits) at a token of each row and at the row's `num_top` largest.

    The softmax is never stored. A row's result does not depend on the rows beside it. Of equal logits the lower token
    id comes first; NaN counts as minus infinity. A row without a finite largest logit gets NaN and some ids.

    Args:
        logits: [R, V] float32, V at most 2^18 on a GPU; the last dimension is contiguous, rows may have any stride.
        token_ids: [R] int64, contiguous, each in [0, V).
        num_top: K, from 0 to min(64, V).
        backend: "auto" goes by the device of the logits. The reference also computes in float64.

    Returns:
        (log probability of token_ids [R], ids of the largest logits in descending order [R, K] int64, their log
        probabilities [R, K]); log probabilities in the dtype of the logits.

    Raises:
        ValueError: a shape, dtype, stride, device or num_top is not as above.

    Source: the logarithm of the sum after subtracting the largest, as in Milakov and Gimelshein, "Online normalizer
    calculation for softmax", 2018 (arXiv 1805.02867), section 4 for the softmax fused with top-k.
    """
    body = choose_body(backend, logits.device)
    check_logits(logits, body)
    require(
        token_ids.shape == logits.shape[:1]
        and token_ids.dtype == torch.int64
        and token_ids.device == logits.device
        and token_ids.is_contiguous(),
        "token_ids must be contiguous int64 [R] on the logits' device",
        token_ids,
        logits,
    )
    most = min(MAX_NUM_TOP, logits.shape[1])
    require(0 <= num_top <= most, f"num_top must be from 0 to {most}, not {num_top}")
    if body == "triton":
        from quire.kernels.log_probs.triton import log_probs as run
    elif body == "cpu":
        from quire.kernels.log_probs.cpu import log_probs as run
    else:
        from quire.kernels.log_probs.reference import log_probs as run
    return run(logits, token_ids, num_top)
