"""Which prefixes are being computed, so that who needs one of them waits for it instead of computing it once more."""

from __future__ import annotations

from collections.abc import Iterable

from quire.scheduler.block_manager import CachedPrefix
from quire.scheduler.sequence import Sequence


class PrefixesInFlight:
    """Keys of the blocks that running sequences have still to fill from tokens that are known: those of their prompts.

    A block is findable once the step that filled it has retired. A waiting sequence whose next missing block is in
    flight is held back until then: for a few steps, while those it waits for run on in any case. If they are preempted
    or aborted nothing is in flight any more, and it computes the block itself.
    """

    __slots__ = ("_block_size", "_depths")

    def __init__(self, running: Iterable[Sequence], block_size: int) -> None:
        self._block_size = block_size
        self._depths: dict[bytes, int] = {}
        """By key: the depth to which log-probabilities will be stored with the block; -1: not at all."""
        for sequence in running:
            if len(sequence.token_ids) - sequence.num_computed_tokens > 1 or sequence.scoring_depth is not None:
                self.add(sequence)

    def add(self, sequence: Sequence) -> None:
        """A sequence that runs from now on."""
        depth = -1 if sequence.scoring_depth is None else sequence.scoring_depth
        for key in sequence.block_keys[1 + sequence.num_computed_tokens // self._block_size :]:
            self._depths[key] = max(depth, self._depths.get(key, -1))

    def has_next(self, sequence: Sequence, prefix: CachedPrefix) -> bool:
        """Whether the first block that `sequence` misses behind its cached prefix is in flight."""
        index = 1 + len(prefix.block_ids)
        if index >= len(sequence.block_keys):
            return False
        depth = self._depths.get(sequence.block_keys[index])
        return depth is not None and depth >= (-1 if sequence.scoring_depth is None else sequence.scoring_depth)
