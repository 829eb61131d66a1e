"""From step outputs to text: the same however the tokens are grouped into steps, counted right, ended once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.output_processor import OutputProcessor
from quire.engine.text_delta import TextDelta
from quire.engine.tokenizer import Tokenizer
from quire.sampling_params import SamplingParams
from quire.scheduler.output import FinishReason, StepOutput

WORDS = ["the ", "king ", "Öl", "日本", "語", "👨‍👩‍👧", "👍🏽", "e\u0301", "\n", " END", "E", "a"]


@pytest.fixture(scope="module", params=["byte_level_dir", "byte_fallback_dir"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def byte_level(byte_level_dir: Path) -> Tokenizer:
    return Tokenizer(byte_level_dir)


def run(
    tokenizer: Tokenizer,
    token_ids: list[int],
    params: SamplingParams,
    group: int = 1,
    finish_reason: FinishReason = FinishReason.LENGTH,
    stop_reason: int | None = None,
) -> tuple[list[TextDelta], list[tuple[str, int]]]:
    """The deltas of one choice whose tokens come in groups of `group`, and what is to be aborted in the engine."""
    processor = OutputProcessor(tokenizer)
    processor.add("r", tokenizer.encode("prompt"), params)
    deltas: list[TextDelta] = []
    aborts: list[tuple[str, int]] = []
    for start in range(0, len(token_ids), group):
        output = StepOutput("r", 0, token_ids[start : start + group], num_cached_tokens=5)
        if start + group >= len(token_ids):
            output.finish_reason, output.stop_reason = finish_reason, stop_reason
        step = processor.process([output])
        deltas += step.deltas.get("r", [])
        aborts += step.aborts
        assert step.finished == (["r"] if deltas[-1].finish_reason and len(processor) == 0 and step.deltas else [])
    assert len(processor) == 0
    assert [delta.finish_reason is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    return deltas, aborts


def text_of(deltas: list[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def tokens_of(deltas: list[TextDelta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, parse_special=False)


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=15),
    stop=st.lists(st.sampled_from([*WORDS, "gE", "本語", "\u200d", "語👍"]), max_size=3),
    include=st.booleans(),
    min_tokens=st.integers(0, 6),
    group=st.integers(2, 9),
)
def test_stream_equals_all_at_once(
    tokenizer: Tokenizer, words: list[str], stop: list[str], include: bool, min_tokens: int, group: int
) -> None:
    token_ids = encode(tokenizer, "".join(words))
    params = SamplingParams(
        stop=tuple(stop), include_stop_str_in_output=include, min_tokens=min_tokens, max_tokens=None
    )
    stream, stream_aborts = run(tokenizer, token_ids, params)
    for other, aborts in (run(tokenizer, token_ids, params, group), run(tokenizer, token_ids, params, len(token_ids))):
        assert text_of(other) == text_of(stream)
        assert tokens_of(other) == tokens_of(stream)
        assert other[-1].finish_reason == stream[-1].finish_reason
        assert other[-1].stop_reason == stream[-1].stop_reason
        assert other[-1].num_output_tokens == stream[-1].num_output_tokens
        assert len(aborts) <= len(stream_aborts)
    counts = [delta.num_output_tokens for delta in stream]
    assert counts == list(range(1, len(stream) + 1))
    assert counts[-1] == len(tokens_of(stream))
    assert "\ufffd" not in text_of(stream)
    if stream[-1].finish_reason == "length":
        assert text_of(stream) == text_of(run(tokenizer, token_ids, SamplingParams())[0])
        assert stream_aborts == []


def test_stop_string_ends_the_choice_and_tokens_past_it_do_not_exist(byte_level: Tokenizer) -> None:
    token_ids = encode(byte_level, "one two END three four")
    end = next(i for i in range(len(token_ids)) if "END" in byte_level.decode(token_ids[: i + 1])) + 1
    params = SamplingParams(stop=("nope", "END"))
    for group in (1, 2, 3, len(token_ids)):
        deltas, aborts = run(byte_level, token_ids, params, group)
        assert text_of(deltas) == "one two "
        assert tokens_of(deltas) == token_ids[:end]
        assert deltas[-1].num_output_tokens == end
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "END")
        assert aborts == ([] if group == len(token_ids) else [("r", 0)])
    included, _ = run(byte_level, token_ids, SamplingParams(stop=("END",), include_stop_str_in_output=True))
    assert text_of(included) == "one two END"


def test_stop_string_on_the_last_token_beats_its_length(byte_level: Tokenizer) -> None:
    token_ids = encode(byte_level, "one END")
    deltas, aborts = run(byte_level, token_ids, SamplingParams(stop=("END",)))
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "END")
    assert aborts == []


def test_what_was_held_back_comes_with_the_end(byte_level: Tokenizer) -> None:
    deltas, _ = run(byte_level, encode(byte_level, "one EN"), SamplingParams(stop=("END",)))
    assert text_of(deltas) == "one EN"
    half = encode(byte_level, "日")[:1]
    deltas, _ = run(byte_level, encode(byte_level, "one") + half, SamplingParams(stop=("END",)))
    assert text_of(deltas) == "one\ufffd"
    deltas, _ = run(byte_level, encode(byte_level, "one") + half, SamplingParams(stop=("\ufffd",)))
    assert (text_of(deltas), deltas[-1].finish_reason) == ("one", "stop")


def test_token_that_ended_the_choice_counts_but_has_no_text(byte_level: Tokenizer) -> None:
    ender, shown = encode(byte_level, "king")[0], encode(byte_level, "the ")
    eos = byte_level.eos_token_id
    assert eos is not None
    for last, reason in ((ender, ender), (eos, None)):
        for skip in (True, False):
            params = SamplingParams(skip_special_tokens=skip)
            deltas, _ = run(byte_level, [*shown, last], params, 2, FinishReason.STOP, reason)
            assert text_of(deltas) == "the "
            assert tokens_of(deltas) == [*shown, last]
            assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", reason)
            assert deltas[-1].num_output_tokens == len(shown) + 1
    for skip, expected in ((True, "the "), (False, "the <|im_end|>")):
        params = SamplingParams(skip_special_tokens=skip, include_stop_str_in_output=True)
        assert text_of(run(byte_level, [*shown, eos], params, 1, FinishReason.STOP)[0]) == expected
    params = SamplingParams(include_stop_str_in_output=True)
    with_text = text_of(run(byte_level, [*shown, ender], params, 1, FinishReason.STOP, ender)[0])
    assert with_text == "the " + byte_level.decode([ender])


def test_special_tokens_within_the_text(byte_level: Tokenizer) -> None:
    special = byte_level.piece_to_id("<|im_start|>")
    assert special is not None
    ids = [*encode(byte_level, "a"), special, *encode(byte_level, "b")]
    assert text_of(run(byte_level, ids, SamplingParams())[0]) == "ab"
    assert text_of(run(byte_level, ids, SamplingParams(skip_special_tokens=False))[0]) == "a<|im_start|>b"


def test_no_stop_string_before_min_tokens(byte_level: Tokenizer) -> None:
    token_ids = [encode(byte_level, letter)[0] for letter in "ababab"]
    for min_tokens, expected in ((0, "a"), (1, "a"), (2, "aba"), (3, "aba"), (5, "ababa"), (6, "ababab")):
        params = SamplingParams(stop=("b",), min_tokens=min_tokens)
        for group in (1, 2, 6):
            assert text_of(run(byte_level, token_ids, params, group)[0]) == expected
    across = SamplingParams(stop=("ab",), min_tokens=3)
    assert text_of(run(byte_level, token_ids, across)[0]) == "ab", "it may begin before, but not end before"


def test_choices_end_one_by_one_and_strangers_are_dropped(byte_level: Tokenizer) -> None:
    processor = OutputProcessor(byte_level)
    processor.add("r", [5], SamplingParams(n=3, stop=("E",)))
    a, stop = encode(byte_level, "a"), encode(byte_level, "E")
    step = processor.process([StepOutput("r", 0, a), StepOutput("r", 1, stop), StepOutput("other", 0, a)])
    assert [(d.choice_index, d.text, d.finish_reason) for d in step.deltas["r"]] == [(0, "a", None), (1, "", "stop")]
    assert (step.aborts, step.finished, list(step.deltas)) == ([("r", 1)], [], ["r"])
    step = processor.process([StepOutput("r", 1, a), StepOutput("r", 2, [], FinishReason.ERROR), StepOutput("r", 7, a)])
    assert [(d.choice_index, d.finish_reason) for d in step.deltas["r"]] == [(2, "error")]
    step = processor.process([StepOutput("r", 0, a, FinishReason.LENGTH, num_cached_tokens=16)])
    assert step.finished == ["r"]
    assert step.deltas["r"][0].num_cached_tokens == 16
    assert step.deltas["r"][0].num_output_tokens == 2
    assert processor.process([StepOutput("r", 0, a)]).deltas == {}
    processor.add("s", [5], SamplingParams())
    processor.remove("s")
    processor.remove("s")
    assert processor.process([StepOutput("s", 0, a)]).deltas == {}
    assert len(processor) == 0
