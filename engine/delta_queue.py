"""What one open request has received and its reader has not yet taken: bounded, merged while the reader is slow."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from quire.engine.output_processor import TextDelta

MAX_PENDING_BYTES = 1024 * 1024
"""Text and token ids that wait for a reader at most."""
_TOKEN_BYTES = 8
_MERGE_LENGTH = 64


class ReaderTooSlowError(Exception):
    """The reader of a request left more than MAX_PENDING_BYTES untaken, so the request was aborted."""


class DeltaQueue:
    """One writer, one reader, one event loop.

    The reader gets one list for each step; steps that passed since it last looked come as one list with one delta for
    each choice, so a slow reader costs neither memory nor chunks.
    """

    def __init__(self) -> None:
        self._pending: list[TextDelta] = []
        self._num_bytes = 0
        self._num_steps = 0
        self._merge_at = _MERGE_LENGTH
        self._closed = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def put(self, deltas: list[TextDelta]) -> bool:
        """Add one step's deltas; False: the bound is passed, and the request is to be given up."""
        self._pending += deltas
        self._num_steps += 1
        for delta in deltas:
            self._num_bytes += len(delta.text.encode("utf-8")) + _TOKEN_BYTES * len(delta.token_ids)
        if len(self._pending) >= self._merge_at:
            self._pending = merge(self._pending)
            self._merge_at = max(_MERGE_LENGTH, 2 * len(self._pending))
        self._changed.set()
        return self._num_bytes <= MAX_PENDING_BYTES

    def close(self) -> None:
        """No more will come; what is pending can still be taken."""
        self._closed = True
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """The reader gets `error`, at once and instead of what is pending."""
        self._pending = []
        self._error = error
        self._changed.set()

    async def get(self) -> list[TextDelta] | None:
        """The deltas that have come, waiting for some; None after the last.

        Raises:
            Exception: the one given to `fail`.
        """
        await self._changed.wait()
        if self._error is not None:
            raise self._error
        deltas = self._pending if self._num_steps == 1 else merge(self._pending)
        self._pending, self._num_bytes, self._num_steps = [], 0, 0
        if self._closed and not deltas:
            return None
        if not self._closed:
            self._changed.clear()
        return deltas


def merge(deltas: Iterable[TextDelta]) -> list[TextDelta]:
    """One delta for each choice, in the order in which the choices first appear; the inputs are left as they are."""
    by_choice: dict[int, list[TextDelta]] = {}
    for delta in deltas:
        by_choice.setdefault(delta.choice_index, []).append(delta)
    return [parts[0] if len(parts) == 1 else _join(parts) for parts in by_choice.values()]


def _join(parts: list[TextDelta]) -> TextDelta:
    last = parts[-1]
    return TextDelta(
        choice_index=last.choice_index,
        text="".join(part.text for part in parts),
        token_ids=[token_id for part in parts for token_id in part.token_ids],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        num_cached_tokens=last.num_cached_tokens,
        num_output_tokens=last.num_output_tokens,
        started_at=last.started_at,
    )
