"""What each stored token was worth to the tokens before it: log-probabilities that live and die with the KV pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


def log_prob_bytes_per_block(block_size: int, max_logprobs: int) -> int:
    """Bytes of host memory that one block takes."""
    return block_size * (4 + 8 * max_logprobs)


@dataclass(frozen=True, slots=True)
class LogProbEntries:
    """What the distribution at position p - 1 says of token p, of P positions p."""

    log_prob: Float32Array  # [P]
    top_token_ids: Int32Array  # [P, K], the most probable first; of equal ones the lower id first
    top_log_probs: Float32Array  # [P, K]

    @classmethod
    def zeros(cls, num_positions: int, depth: int) -> LogProbEntries:
        return cls(
            np.zeros(num_positions, np.float32),
            np.zeros((num_positions, depth), np.int32),
            np.zeros((num_positions, depth), np.float32),
        )

    def part(self, positions: slice | Int64Array, depth: int) -> LogProbEntries:
        return LogProbEntries(
            self.log_prob[positions], self.top_token_ids[positions, :depth], self.top_log_probs[positions, :depth]
        )

    def put(self, positions: slice | Int64Array, entries: LogProbEntries) -> None:
        """Write `entries` at these positions; what lies deeper than they reach stays."""
        depth = entries.top_token_ids.shape[1]
        self.log_prob[positions] = entries.log_prob
        self.top_token_ids[positions, :depth] = entries.top_token_ids
        self.top_log_probs[positions, :depth] = entries.top_log_probs


class LogProbPages:
    """A slot for each slot of the KV pages. On the host; the system commits only what is written.

    An entry depends on the tokens up to its own position and on nothing else, as keys and values do: what a prefix hit
    finds is right. Who wrote how deep is known to the scheduler's prefix cache.
    """

    def __init__(self, num_blocks: int, block_size: int, max_logprobs: int) -> None:
        self._block_size = block_size
        self._entries = LogProbEntries.zeros(num_blocks * block_size, max_logprobs)
        shape = (num_blocks, block_size)
        self._pages = (
            self._entries.log_prob.reshape(shape),
            self._entries.top_token_ids.reshape(*shape, max_logprobs),
            self._entries.top_log_probs.reshape(*shape, max_logprobs),
        )

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy (source, target) blocks; no target is the source of another copy of the same call."""
        sources, targets = map(list, zip(*copies, strict=True))
        for pages in self._pages:
            pages[targets] = pages[sources]

    def read(self, block_ids: list[int], start: int, end: int, depth: int) -> LogProbEntries:
        """Of positions [start, end) of a sequence with these blocks."""
        return self._entries.part(self._slots(block_ids, start, end), depth)

    def write(self, block_ids: list[int], start: int, end: int, entries: LogProbEntries) -> None:
        """As `read`; entries of [start, end)."""
        self._entries.put(self._slots(block_ids, start, end), entries)

    def _slots(self, block_ids: list[int], start: int, end: int) -> Int64Array:
        first = start // self._block_size
        used = np.array(block_ids[first : -(-end // self._block_size)], np.int64)
        positions = np.arange(start, end)
        return used[positions // self._block_size - first] * self._block_size + positions % self._block_size
