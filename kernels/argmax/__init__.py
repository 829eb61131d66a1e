"""The most probable token of each row, and whether the row can be trusted."""

from __future__ import annotations

import torch

from quire.kernels.backend import Backend, choose_body
from quire.kernels.checks import check_logits


def argmax(logits: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor:
    """Index of the largest logit of each row, the first of those that tie; -1 where it is infinite or any is NaN.

    Args:
        logits: [R, V] float32, V > 0 and at most 2^18 on a GPU, the last dimension contiguous. Minus infinity is a
            masked token.
        backend: "auto" goes by logits' device.

    Returns:
        [R] int64 on logits' device.

    Raises:
        ValueError: a shape, dtype or stride is not as above.
    """
    body = choose_body(backend, logits.device)
    check_logits(logits, body)
    if body == "triton":
        from quire.kernels.argmax.triton import argmax as run
    elif body == "cpu":
        from quire.kernels.argmax.cpu import argmax as run
    else:
        from quire.kernels.argmax.reference import argmax as run
    return run(logits)
