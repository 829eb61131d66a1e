"""Figures of runs, answers as they come over HTTP, and what is written of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from measuring.engines import filled
from measuring.http_client import read_answer
from measuring.report import bars, number, write_json
from measuring.step_profile import Timers
from measuring.summary import Record, from_json, medians, percentile, speedup, summarize


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentiles_are_numpys(count: int, share: float) -> None:
    values = np.random.default_rng(count).normal(size=count)
    assert percentile(values.tolist(), share) == pytest.approx(np.quantile(values, share))


def test_the_figures_of_a_run_by_hand() -> None:
    good = Record(10, 3, sent=1.0, ended=2.5, pieces=[1.5, 2.0, 2.25], num_output_tokens=3)
    short = Record(10, 3, sent=1.0, ended=3.0, pieces=[2.0], num_output_tokens=1)
    failed = Record(10, 3, sent=1.0, ended=9.0, error="HTTP 503: ")
    figures = summarize([good, short, failed], wall=2.0)
    assert (figures.requests, figures.failed, figures.short) == (3, 1, 1)
    assert (figures.output_tokens_per_s, figures.total_tokens_per_s, figures.requests_per_s) == (2.0, 12.0, 1.0)
    assert figures.ttft_p50_ms == pytest.approx(750)
    assert figures.itl_p50_ms == pytest.approx(375)
    assert figures.tpot_p50_ms == pytest.approx(375)
    assert figures.e2e_p50_ms == pytest.approx(1750)
    assert figures.errors == ["HTTP 503: "]


def test_a_run_in_which_all_failed_has_no_latencies() -> None:
    figures = summarize([Record(10, 3, error="empty answer")], wall=1.0)
    assert figures.ttft_p50_ms is None
    assert medians([figures])["ttft_p50_ms"] is None
    assert speedup("ttft_p50_ms", None, 1.0) is None


def test_a_speedup_above_one_is_better_for_rates_and_latencies() -> None:
    assert speedup("output_tokens_per_s", 200.0, 100.0) == 2.0
    assert speedup("tpot_p50_ms", 5.0, 10.0) == 2.0


def test_figures_of_another_program_must_hold_what_is_compared() -> None:
    assert from_json({"output_tokens_per_s": 5.0, "wall_s": 1.0}).ttft_p50_ms is None
    with pytest.raises(SystemExit, match="wall_s"):
        from_json({"output_tokens_per_s": 5.0})


EVENTS = [
    {"choices": [{"text": "a"}]},
    {"choices": [{"text": ""}]},
    {"choices": [{"text": "bc"}]},
    {"choices": [], "usage": {"completion_tokens": 3}},
]
BODY = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in EVENTS) + b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\n"


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize(
    "answer",
    [
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY, 13),
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(BODY, 1000),
        HEAD + b"Connection: close\r\n\r\n" + BODY,
    ],
)
def test_pieces_and_tokens_of_an_answer_however_it_is_cut(answer: bytes, step: int) -> None:
    record = Record(1, 3)
    read_answer(record, [(float(at), answer[at : at + step]) for at in range(0, len(answer), step)])
    assert record.error is None
    assert record.num_output_tokens == 3
    assert len(record.pieces) == 2


def test_a_piece_came_when_the_last_byte_of_its_line_did() -> None:
    answer = HEAD + b"Connection: close\r\n\r\n" + BODY
    record = Record(1, 3)
    read_answer(record, [(float(at), answer[at : at + 1]) for at in range(len(answer))])
    assert record.pieces == [answer.index(b"\n", answer.index(text)) for text in (b'"a"', b'"bc"')]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 503 Busy\r\n\r\nlater", "HTTP 503: later"),
        (b"", "HTTP connection closed: "),
        (HEAD + b'\r\ndata: {"error": {"message": "no"}}\n\n', "no"),
        (HEAD + b"\r\ndata: [DONE]\n\n", "empty answer"),
    ],
)
def test_what_went_wrong_is_said(answer: bytes, error: str) -> None:
    record = Record(1, 3)
    read_answer(record, [(0.0, answer)])
    assert record.error is not None
    assert error in record.error


def test_commands_are_filled_in_word_by_word() -> None:
    assert filled("serve '{model}' --port={port}", model="a b", port=1) == ["serve", "a b", "--port=1"]
    with pytest.raises(SystemExit, match=r"known are \{port\}"):
        filled("serve {modle}", port=1)


def test_timers_count_what_is_inside_another_once() -> None:
    timers = Timers()
    with timers.time("outer"):
        with timers.time("inner"):
            pass
        timers.add("elsewhere", 100.0)
    taken = timers.take()
    assert taken["elsewhere"] == 100.0
    assert taken["outer"] < -99.0
    assert math.isclose(sum(taken.values()), taken["inner"] + taken["outer"] + 100.0)
    assert timers.take() == {}


def test_what_is_written_names_machine_and_command(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "figures.json", {"rows": [1]}, num_threads=2)
    written = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert written["rows"] == [1]
    assert {"processor", "cores", "torch", "revision", "command", "time", "num_threads"} <= written["machine"].keys()


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "0"), (0.01234, "0.0123"), (12.34, "12.3"), (12345.0, "12,300")]
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_bars_are_drawn_for_each_name_and_floor() -> None:
    svg = bars("a < b", {"W1": {"quire": 10.0, "other": 5.0}}, {"W1": 20.0})
    assert svg.count("<rect") == 3  # with the ground
    assert "a &lt; b" in svg
    assert "stroke-dasharray" in svg
