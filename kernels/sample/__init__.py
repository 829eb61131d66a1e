"""Drawing one token a row from logits: temperature, top-k, top-p, min-p, without a sort."""

from __future__ import annotations

import torch

from quire.kernels.backend import Backend, choose_body
from quire.kernels.checks import check_logits, require


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """One token id a row, as a function of that row alone.

    Logits are divided by the temperature (in float32). Then, in this order, a token stays if its scaled logit is

    - at least the top_k-th largest of its row: ties with it all stay;
    - at least the smallest of the fewest tokens, taken in descending order, whose mass among those that top-k kept
      reaches top_p: ties with it all stay;
    - at least the largest plus log(min_p): no less than min_p times the probability of the best token.

    The chosen token is the first, in vocabulary order, at which the cumulative mass of what is left exceeds `uniform`
    times the total. Masses are computed and added in float64; the bodies agree unless a mass lies within rounding of
    top_p or of `uniform`. A row without a finite largest logit (all minus infinity, or plus infinity) gets some id in
    the vocabulary; NaN counts as minus infinity on a CPU and a GPU.

    Args:
        logits: [R, V] float32, V at most 2^18 on a GPU; the last dimension is contiguous, rows may have any stride.
            Masked tokens are minus infinity. Not modified.
        temperature: [R] float32, > 0; 0 takes the first of the largest logits and ignores the other options.
        top_k: [R] int32 or int64; 0 is off.
        top_p: [R] float32 in (0, 1]; 1 is off.
        min_p: [R] float32 in [0, 1]; 0 is off.
        uniform: [R] float64 in (0, 1), with at most 40 bits, so that uniform * total < total. All options are
            contiguous and on the device of the logits.
        backend: "auto" goes by the device of the logits. The reference also takes float64 logits.

    Returns:
        Token ids [R], int64.

    Raises:
        ValueError: a shape, dtype, stride or device is not as above.

    Sources: Fan et al., arXiv 1805.04833 (top-k); Holtzman et al., arXiv 1904.09751 (top-p); Nguyen et al., arXiv
    2407.01082 (min-p). Thresholds by narrowing down instead of sorting: Ye et al., "Sorting-Free GPU Kernels for LLM
    Sampling" (FlashInfer, 2025).
    """
    body = choose_body(backend, logits.device)
    check_logits(logits, body)
    options = ((temperature, torch.float32), (top_p, torch.float32), (min_p, torch.float32), (uniform, torch.float64))
    for option, dtype in options:
        require(
            option.shape == logits.shape[:1]
            and option.dtype == dtype
            and option.device == logits.device
            and option.is_contiguous(),
            "temperature, top_p and min_p must be contiguous float32 [R], uniform float64 [R], on the logits' device",
            option,
            logits,
        )
    require(
        top_k.shape == logits.shape[:1]
        and top_k.dtype in (torch.int32, torch.int64)
        and top_k.device == logits.device
        and top_k.is_contiguous(),
        "top_k must be contiguous int32 or int64 [R] on the logits' device",
        top_k,
        logits,
    )
    if body == "triton":
        from quire.kernels.sample.triton import sample as run
    elif body == "cpu":
        from quire.kernels.sample.cpu import sample as run
    else:
        from quire.kernels.sample.reference import sample as run
    return run(logits, temperature, top_k, top_p, min_p, uniform)
