"""Where a sequence is in its life."""

from __future__ import annotations

import enum


class SequenceStatus(enum.Enum):
    WAITING = enum.auto()
    """In the queue, or following a leader; holds no blocks."""
    RUNNING = enum.auto()
    FINISHED = enum.auto()
    """Ended, failed or aborted; holds nothing. A batch that was already handed out may still name it."""


WAITING = SequenceStatus.WAITING
RUNNING = SequenceStatus.RUNNING
FINISHED = SequenceStatus.FINISHED
