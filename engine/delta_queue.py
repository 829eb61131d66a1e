"""What one open request has received and its reader has not yet taken: bounded, merged while the reader is slow."""

from __future__ import annotations

import asyncio
from typing import Protocol

from quire.engine.text_delta import TextDelta, merge

MAX_PENDING_BYTES = 1024 * 1024
"""Text, token ids and log-probabilities that wait for a reader at most, beside what a single step brought."""
_TOKEN_BYTES = 8
_LOG_PROB_BYTES = 32
_MERGE_LENGTH = 64


class Sink(Protocol):
    """Takes what a step brought in place of a reader that waits. False: it has not, the reader is to have it."""

    reader_waits: bool
    """Set by the queue: the reader has taken all that came before and waits. Nothing is offered otherwise."""

    def take(self, deltas: list[TextDelta]) -> bool: ...

    def take_text(self, text: str, token_id: int, num_output_tokens: int, now: float) -> bool:
        """The same for a token of the request's only choice that brought text, perhaps none yet, and nothing else.

        Args:
            num_output_tokens: of the choice, this token included.
            now: seconds of time.monotonic().
        """


class ReaderTooSlowError(Exception):
    """The reader of a request left more than MAX_PENDING_BYTES untaken, so the request was aborted."""


class DeltaQueue:
    """One writer, one reader, one event loop.

    The reader gets one list for each step; steps that passed since it last looked come as one list with one delta for
    each choice, so a slow reader costs neither memory nor chunks.

    Args:
        sink: takes a step in place of the reader, while that has taken all before and waits: to wake a task costs
            more than most steps are worth. What it raises, the reader gets.
    """

    __slots__ = (
        "_changed",
        "_closed",
        "_error",
        "_merge_at",
        "_num_bytes",
        "_num_steps",
        "_pending",
        "sink",
    )

    def __init__(self, sink: Sink | None = None) -> None:
        self.sink = sink
        if sink is not None:
            sink.reader_waits = False
        self._pending: list[TextDelta] = []
        self._num_bytes = 0
        self._num_steps = 0
        self._merge_at = _MERGE_LENGTH
        self._closed = False
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    def put(self, deltas: list[TextDelta]) -> bool:
        """Add one step's deltas; False: the bound is passed, and the request is to be given up.

        One step may bring any amount, as the end of a beam search does, if nothing was left untaken before it.
        """
        if self.sink is not None and self.sink.reader_waits:
            try:
                if self.sink.take(deltas):
                    return True
            except Exception as error:
                self.fail(error)
                return True
        was_empty = self._num_bytes == 0
        self._pending += deltas
        self._num_steps += 1
        self._num_bytes += sum(map(_num_bytes, deltas))
        if len(self._pending) >= self._merge_at:
            self._pending = merge(self._pending)
            self._merge_at = max(_MERGE_LENGTH, 2 * len(self._pending))
        self._wake_reader()
        return was_empty or self._num_bytes <= MAX_PENDING_BYTES

    def close(self) -> None:
        """No more will come; what is pending can still be taken."""
        self._closed = True
        self._wake_reader()

    def fail(self, error: Exception) -> None:
        """The reader gets `error`, at once and instead of what is pending."""
        self._pending = []
        self._error = error
        self._wake_reader()

    def _wake_reader(self) -> None:
        if self.sink is not None:
            self.sink.reader_waits = False
        self._changed.set()

    async def get(self) -> list[TextDelta] | None:
        """The deltas that have come, waiting for some; None after the last.

        Raises:
            Exception: the one given to `fail`.
        """
        if self.sink is not None:
            self.sink.reader_waits = not self._changed.is_set()
        try:
            await self._changed.wait()
        finally:
            if self.sink is not None:
                self.sink.reader_waits = False
        if self._error is not None:
            raise self._error
        deltas = self._pending if self._num_steps == 1 else merge(self._pending)
        self._pending, self._num_bytes, self._num_steps = [], 0, 0
        if self._closed and not deltas:
            return None
        if not self._closed:
            self._changed.clear()
        return deltas


def _num_bytes(delta: TextDelta) -> int:
    """About what a delta takes. The prompt's log-probabilities come once and were bounded before: they do not count."""
    num_bytes = len(delta.text.encode("utf-8")) + _TOKEN_BYTES * len(delta.token_ids)
    if delta.log_probs:
        num_bytes += _LOG_PROB_BYTES * len(delta.log_probs) * (1 + len(delta.log_probs[0].top_token_ids))
    return num_bytes
