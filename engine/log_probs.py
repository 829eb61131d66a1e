"""Log-probabilities of the raw distribution: of chosen tokens, and of the best at each position."""

from __future__ import annotations

import torch

from quire.scheduler.output import MIN_LOG_PROB, TokenLogProbs


class LogProbRows:
    """Log-probabilities of M rows of logits, taken before anything changes them.

    Args:
        logits: [M, V] float32.
        num_top: for each row, how many of the best tokens are wanted.
    """

    def __init__(self, logits: torch.Tensor, num_top: list[int]) -> None:
        self._log_probs = logits.log_softmax(dim=-1)
        self._num_top = num_top
        self._top = best_tokens(self._log_probs, max(num_top, default=0))

    def of(self, row: int, token_ids: list[int]) -> list[TokenLogProbs]:
        """Of several tokens that may be chosen in one row."""
        count = self._num_top[row]
        top_token_ids, top_log_probs = self._top[0][row][:count], self._top[1][row][:count]
        values: list[float] = self._log_probs[row, token_ids].clamp(min=MIN_LOG_PROB).tolist()
        return [
            TokenLogProbs(token_id, value, top_token_ids, top_log_probs)
            for token_id, value in zip(token_ids, values, strict=True)
        ]


def best_tokens(values: torch.Tensor, count: int) -> tuple[list[list[int]], list[list[float]]]:
    """The `count` largest of each row of [M, V] and where they are; of equal ones the lower index first.

    `topk` alone leaves open which of equal values it takes, so that the last place could depend on the neighbours.
    """
    count = min(count, values.shape[-1])
    if count == 0 or len(values) == 0:
        return [[] for _ in values], [[] for _ in values]
    last = values.topk(count, dim=-1).values[:, -1:]
    rows, columns = (values >= last).nonzero(as_tuple=True)
    found: list[list[tuple[float, int]]] = [[] for _ in values]
    for row, column, value in zip(rows.tolist(), columns.tolist(), values[rows, columns].tolist(), strict=True):
        found[row].append((-max(value, MIN_LOG_PROB), column))
    best = [sorted(each)[:count] for each in found]
    return [[column for _, column in each] for each in best], [[-value for value, _ in each] for each in best]
