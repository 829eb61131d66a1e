"""Sinks: what they may take in place of the reader, and that they account for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from quire.engine.text_delta import TextDelta
from quire.server.responses import ChunkTemplate, Completion, CompletionChoice
from quire.server.sinks import AnswerSink, EventSink
from quire.server.tally import Tally


class Recorder(SimpleNamespace):
    """Stands for metrics and for a connection's parts."""

    def __init__(self) -> None:
        super().__init__(gaps=[], num_tokens=0, parts=[], is_free=True)
        self.inter_token_latency = SimpleNamespace(observe=self.gaps.append)
        self.generation_tokens = SimpleNamespace(inc=self.count)

    def count(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens

    def write(self, data: bytes, now: float) -> None:
        self.parts.append((data, now))


@pytest.fixture
def recorder() -> Any:
    return Recorder()


@pytest.fixture
def tally(recorder: Any) -> Tally:
    job = SimpleNamespace(token_ids=[1], prompt_index=0)
    tally = Tally([job], 1, recorder)  # type: ignore[list-item]
    tally.choices[0].num_tokens, tally.choices[0].last_token_at = 2, tally.begin + 1.0
    return tally


def accounted(tally: Tally, recorder: Any, begin: float) -> None:
    """Two tokens came, 0.25 s and 0.5 s after the one before."""
    choice = tally.choices[0]
    assert recorder.gaps == pytest.approx([0.25, 0.5])
    assert recorder.num_tokens == 2
    assert (choice.num_tokens, choice.last_token_at) == (4, begin + 1.75)
    assert tally.last_progress == begin + 1.75, "nobody is to take this for silence"


def test_event_sink_waits_for_the_template_and_a_free_connection(tally: Tally, recorder: Any) -> None:
    sink = EventSink(lambda deltas: True, recorder, tally, recorder)
    begin = tally.begin
    assert not sink.take_text("a", 5, 3, begin + 1.25), "its events are not known yet"
    tally.choices[0].template = template = ChunkTemplate(
        Completion(id="i", created=7, model="m", choices=[CompletionChoice(0, "")])
    )
    assert not sink.take_text("a", 5, 3, begin + 1.25)
    assert sink.take([TextDelta(0, "", [5])])
    recorder.is_free = False
    assert not sink.take_text("a", 5, 3, begin + 1.25)
    assert (recorder.parts, recorder.gaps) == ([], [])
    recorder.is_free = True
    assert sink.take_text("a", 5, 3, begin + 1.25)
    assert sink.take_text('"', 6, 4, begin + 1.75)
    assert recorder.parts == [(template.fill("a"), begin + 1.25), (template.fill('"'), begin + 1.75)]
    accounted(tally, recorder, begin)


def test_event_sink_without_parts_takes_no_text(tally: Tally, recorder: Any) -> None:
    tally.choices[0].template = ChunkTemplate(
        Completion(id="i", created=7, model="m", choices=[CompletionChoice(0, "")])
    )
    sink = EventSink(lambda deltas: False, None, tally, recorder)
    assert not sink.take([TextDelta(0, "", [5])])
    assert not sink.take_text("a", 5, 3, tally.begin + 1.25)


def test_answer_sink_keeps_text_once_deltas_were_taken(tally: Tally, recorder: Any) -> None:
    takes = [False, True]
    sink = AnswerSink(lambda deltas: takes.pop(0), tally, recorder)
    begin = tally.begin
    for taken in (False, True):
        assert not sink.take_text("a", 5, 3, begin + 1.25)
        assert sink.take([TextDelta(0, "", [5])]) == taken
    assert sink.take_text("a", 5, 3, begin + 1.25)
    assert sink.take_text("b", 6, 4, begin + 1.75)
    assert (tally.choices[0].texts, tally.choices[0].token_ids) == (["a", "b"], [5, 6])
    accounted(tally, recorder, begin)
