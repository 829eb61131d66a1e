"""What a look into the prefix cache brings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class CachedPrefix(NamedTuple):
    """What a sequence can start from."""

    block_ids: list[int]
    num_tokens: int
    """Tokens that need not be computed."""
    copies_last: bool = False
    """The last block is not shared but copied, because its last token is to be computed again."""
    next_key: bytes | None = None
    """Of the first block that is not cached, if a hit could cover it."""

    @property
    def num_shared_blocks(self) -> int:
        return len(self.block_ids) - self.copies_last


NOTHING_CACHED = CachedPrefix([], 0)


@dataclass(slots=True)
class FoundPrefix:
    """A prefix and what it holds for: the cache's version and the depth of log-probabilities that was asked for."""

    prefix: CachedPrefix
    version: int
    scoring_depth: int | None
