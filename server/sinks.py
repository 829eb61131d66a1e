"""What takes a step's text while the reader of a request waits: into the whole answer, or onto the connection.

A token of a request with one choice goes through `take_text`, all others through `take`. Between two steps the caches
forget what belongs to one stream, so `take_text` touches few objects: these sinks keep what it needs at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from quire.server.metrics import Metrics
from quire.server.responses import encode_text
from quire.server.tally import Tally

if TYPE_CHECKING:
    from quire.engine.text_delta import TextDelta
    from quire.server.protocol import PartWriter

TakeDeltas = Callable[[list["TextDelta"]], bool]


class AnswerSink:
    """Of an answer that is sent as a whole."""

    __slots__ = ("_choice", "_has_begun", "_metrics", "_take", "reader_waits")

    def __init__(self, take: TakeDeltas, tally: Tally, metrics: Metrics) -> None:
        self._take = take
        self._choice = tally.choices[0]
        self._metrics = metrics
        self._has_begun = False
        self.reader_waits = False

    def take(self, deltas: list[TextDelta]) -> bool:
        taken = self._take(deltas)
        self._has_begun = self._has_begun or taken
        return taken

    def take_text(self, text: str, token_id: int, num_output_tokens: int, now: float) -> bool:
        if not self._has_begun:
            return False
        choice = self._choice
        choice.add_token(num_output_tokens, now, self._metrics)
        choice.texts.append(text)
        choice.token_ids.append(token_id)
        return True


class EventSink:
    """Of a stream.

    Args:
        take: writes the events of any deltas, and gives the choice its template if a token's text is all that changes.
        parts: of the stream's connection, where it has them.
    """

    __slots__ = ("_after", "_before", "_choice", "_metrics", "_parts", "_take", "reader_waits")

    def __init__(self, take: TakeDeltas, parts: PartWriter | None, tally: Tally, metrics: Metrics) -> None:
        self._take = take
        self._parts = parts
        self._choice = tally.choices[0]
        self._metrics = metrics
        self._before = self._after = b""
        self.reader_waits = False

    def take(self, deltas: list[TextDelta]) -> bool:
        if not self._before and (template := self._choice.template) is not None:
            self._before, self._after = template.before, template.after
        return self._take(deltas)

    def take_text(self, text: str, token_id: int, num_output_tokens: int, now: float) -> bool:
        parts, before = self._parts, self._before
        if not before or parts is None or not parts.is_free:
            return False
        self._choice.add_token(num_output_tokens, now, self._metrics)
        parts.write(before + encode_text(text) + self._after, now)
        return True
