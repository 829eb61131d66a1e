"""From step outputs to text: the same however the tokens are grouped into steps, counted right, ended once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.engine.delta_queue import DeltaQueue
from quire.engine.detokenizer import DetokenizerFactory
from quire.engine.output_processor import OutputProcessor
from quire.engine.text_delta import TextDelta
from quire.engine.tokenizer import Tokenizer
from quire.sampling_params import SamplingParams
from quire.scheduler.output import FinishReason, StepOutput, StepOutputs, TokenLogProbs

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
        if params.logprobs is not None:
            output.log_probs = [log_probs_of(token_id) for token_id in output.token_ids]
        if start + group >= len(token_ids):
            output.finish_reason, output.stop_reason = finish_reason, stop_reason
        step = processor.process([output])
        deltas += step.deltas.get("r", [])
        aborts += step.aborts
        assert step.finished == (["r"] if deltas[-1].finish_reason and len(processor) == 0 and step.deltas else [])
    assert len(processor) == 0
    assert [delta.finish_reason is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    return deltas, aborts


def log_probs_of(token_id: int) -> TokenLogProbs:
    return TokenLogProbs(token_id, -token_id / 8, [], [])


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


@settings(max_examples=100, deadline=None)
@given(
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=15),
    stop=st.lists(st.sampled_from(["gE", "本語", "a", "king "]), max_size=2),
    include=st.booleans(),
    group=st.integers(2, 9),
)
def test_log_probabilities_and_offsets_follow_their_tokens(
    tokenizer: Tokenizer, words: list[str], stop: list[str], include: bool, group: int
) -> None:
    token_ids = encode(tokenizer, "".join(words))
    params = SamplingParams(logprobs=0, stop=tuple(stop), include_stop_str_in_output=include, max_tokens=None)
    stream, _ = run(tokenizer, token_ids, params)
    grouped, _ = run(tokenizer, token_ids, params, group)
    for deltas in (stream, grouped):
        for delta in deltas:
            assert [each.token_id for each in delta.log_probs or []] == delta.token_ids
            assert len(delta.text_offsets or []) == len(delta.token_ids)
        assert deltas[-1].cumulative_log_prob == pytest.approx(-sum(tokens_of(deltas)) / 8)
        assert all(delta.cumulative_log_prob is None for delta in deltas[:-1])
    text, offsets = text_of(stream), [offset for delta in stream for offset in delta.text_offsets or []]
    assert offsets == [offset for delta in grouped for offset in delta.text_offsets or []]
    assert offsets == sorted(offsets)
    table = DetokenizerFactory(tokenizer)
    for token_id, start, end in zip(tokens_of(stream), offsets, [*offsets[1:], len(text)], strict=True):
        piece = table.token_text(token_id)
        if isinstance(piece, str) and end <= len(text) and (start or not piece.startswith(" ")):
            shown = text[start:end]
            assert piece == shown or (stream[-1].stop_reason is not None and piece.startswith(shown))


def test_the_best_of_several_choices(byte_level: Tokenizer) -> None:
    """The mean counts, not the sum; a stop string leaves fewer tokens; a failure is the last."""
    processor = OutputProcessor(byte_level)
    letters = [encode(byte_level, letter)[0] for letter in "abc"]
    params = SamplingParams(n=2, best_of=4, stop=("c",), max_tokens=4)
    processor.add("r", [5], params)

    def output(index: int, values: list[float], reason: FinishReason | None = None) -> StepOutput:
        token_ids = letters[: len(values)]
        log_probs = [TokenLogProbs(t, value, [], []) for t, value in zip(token_ids, values, strict=True)]
        return StepOutput("r", index, token_ids, reason, log_probs=log_probs)

    long = output(1, [-1.0, -1.0, -9.0])
    long.token_ids = [letters[0], letters[1], letters[0]]
    step = processor.process([output(0, [-2.0]), long, output(2, [-1.5, -1.5, -1.5])])
    assert (step.deltas, step.aborts, step.finished) == ({}, [("r", 2)], [])
    step = processor.process([output(3, [], FinishReason.ERROR), output(1, [-1.0], FinishReason.LENGTH)])
    assert (step.deltas, step.finished) == ({}, [])
    step = processor.process([output(0, [-0.5], FinishReason.LENGTH)])
    first, second = step.deltas["r"]
    assert (first.choice_index, first.text, first.num_output_tokens, first.finish_reason) == (0, "aa", 2, "length")
    assert (second.choice_index, second.text, second.stop_reason) == (1, "ab", "c")
    assert (first.cumulative_log_prob, second.cumulative_log_prob) == (-2.5, -4.5)
    assert (first.log_probs, second.log_probs) == (None, None)
    assert (first.num_discarded_tokens, second.num_discarded_tokens) == (4, 0)
    assert step.finished == ["r"]
    assert len(processor) == 0


def test_long_choices_are_joined_while_they_are_kept(byte_level: Tokenizer) -> None:
    processor = OutputProcessor(byte_level)
    processor.add("r", [5], SamplingParams(best_of=2, logprobs=0, max_tokens=None))
    token_ids = encode(byte_level, "one two three " * 50)
    for position, token_id in enumerate(token_ids):
        reason = FinishReason.LENGTH if position == len(token_ids) - 1 else None
        outputs = [
            StepOutput("r", index, [token_id], reason, log_probs=[TokenLogProbs(token_id, index - 2.0, [], [])])
            for index in (0, 1)
        ]
        step = processor.process(outputs)
    (best,) = step.deltas["r"]
    assert (best.token_ids, best.text) == (token_ids, "one two three " * 50)
    assert best.cumulative_log_prob == -1.0 * len(token_ids)
    assert best.log_probs is not None
    assert [each.token_id for each in best.log_probs] == token_ids
    assert best.text_offsets == sorted(best.text_offsets or [])


def test_log_probabilities_of_the_prompt_come_first_and_once(byte_level: Tokenizer) -> None:
    a, of_prompt = encode(byte_level, "a"), [TokenLogProbs(6, -1.0, [], [])]
    for best_of, num_before in ((2, 1), (3, 0)):
        processor = OutputProcessor(byte_level)
        processor.add("r", [5, 6], SamplingParams(n=2, best_of=best_of, prompt_logprobs=0, max_tokens=3))
        assert processor.process([StepOutput("r", 1, a)]).deltas == {}
        step = processor.process([StepOutput("r", 0, a, prompt_log_probs=of_prompt), StepOutput("r", 1, a)])
        assert len(step.deltas) == num_before
        last = processor.process([StepOutput("r", index, a, FinishReason.LENGTH) for index in range(best_of)])
        deltas = step.deltas.get("r", []) + last.deltas["r"]
        assert [delta.prompt_log_probs for delta in deltas] == [of_prompt] + [None] * (len(deltas) - 1)
        assert "".join(delta.text for delta in deltas if delta.choice_index == 1) == "aaa"


def test_beams_are_not_ranked_again_and_end_together(byte_level: Tokenizer) -> None:
    processor = OutputProcessor(byte_level)
    processor.add("r", [5], SamplingParams(n=2, best_of=5, use_beam_search=True, stop=("END",)))
    ids = encode(byte_level, "one END two")
    step = processor.process([StepOutput("r", 0, ids)])
    assert (step.deltas["r"][0].stop_reason, step.aborts, step.finished) == ("END", [], [])
    assert step.deltas["r"][0].cumulative_log_prob is None
    end = StepOutput("r", 1, encode(byte_level, "king"), FinishReason.STOP, cumulative_log_prob=-7.5)
    step = processor.process([StepOutput("r", 0, ids, FinishReason.LENGTH), end])
    assert [(delta.choice_index, delta.cumulative_log_prob) for delta in step.deltas["r"]] == [(1, -7.5)]
    assert (step.aborts, step.finished) == ([], ["r"])
    processor.add("s", [5], SamplingParams(best_of=3, use_beam_search=True, stop=("END",)))
    step = processor.process([StepOutput("s", 0, ids)])
    assert (step.aborts, step.finished) == ([("s", None)], ["s"]), "nobody waits for the rest of the search"


@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), groups=st.lists(st.integers(0, 5), min_size=1))
def test_short_way_of_plain_text_tells_all_that_the_long_way_tells(
    tokenizer: Tokenizer, words: list[str], groups: list[int]
) -> None:
    """A stop string that never occurs takes each step through the long way."""
    token_ids = encode(tokenizer, "".join(words))
    steps = [token_ids[sum(groups[:index]) :][:size] for index, size in enumerate(groups)]
    told = []
    for stop in ((), ("\x00",)):
        processor = OutputProcessor(tokenizer)
        processor.add("r", tokenizer.encode("prompt"), SamplingParams(logprobs=0, prompt_logprobs=0, stop=stop))
        outputs = [StepOutput("r", 0, ids, num_cached_tokens=5) for ids in steps]
        outputs[0].prompt_log_probs = [log_probs_of(7)]
        scored = [log_probs_of(token_id) for token_id in token_ids]
        outputs.append(StepOutput("r", 0, token_ids, FinishReason.LENGTH, num_cached_tokens=5, log_probs=scored))
        told.append([processor.process([output]).deltas for output in outputs])
    assert told[0] == told[1]


class Reader:
    """A sink, and the reader behind it; which of them a step reaches is up to the test."""

    def __init__(self) -> None:
        self.reader_waits = False
        self.willing = True
        self.told: list[TextDelta] = []
        self.num_short = 0

    def take(self, deltas: list[TextDelta]) -> bool:
        raise AssertionError("the processor hands on text alone")

    def take_text(self, text: str, token_id: int, num_output_tokens: int, now: float) -> bool:
        assert self.reader_waits
        if not self.willing:
            return False
        self.num_short += 1
        self.told.append(TextDelta(0, text, [token_id], num_cached_tokens=5, num_output_tokens=num_output_tokens))
        return True


@given(
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=12),
    kinds=st.lists(st.sampled_from(["row", "refused", "busy", "other", "several"]), min_size=1, max_size=40),
    skip=st.booleans(),
)
def test_tokens_handed_to_a_sink_are_what_the_deltas_would_tell(
    tokenizer: Tokenizer, words: list[str], kinds: list[str], skip: bool
) -> None:
    """Rows that a sink takes, that it refuses, and that come while the reader is busy, mixed with other outputs: within
    characters too. Beside them a request with two choices, which nobody may hand on."""
    token_ids = encode(tokenizer, "".join(words) + "👍🏽")
    params, reader = SamplingParams(max_tokens=None, skip_special_tokens=skip), Reader()
    processor, plain = OutputProcessor(tokenizer), OutputProcessor(tokenizer)
    processor.add("r", tokenizer.encode("prompt"), params, DeltaQueue(reader))
    plain.add("r", tokenizer.encode("prompt"), params)
    for each in (processor, plain):
        each.add("two", [5], SamplingParams(n=2))
    told: list[TextDelta] = []
    position = num_rows = 0
    while position < len(token_ids):
        kind = kinds[position % len(kinds)]
        size = min(3, len(token_ids) - position) if kind == "several" else 1
        ids, last = token_ids[position : position + size], position + size == len(token_ids)
        position += size
        output = StepOutput("r", 0, ids, FinishReason.LENGTH if last else None, num_cached_tokens=5)
        two = [("two", choice, ids[0], 0) for choice in (1, 0)]
        reader.reader_waits, reader.willing = kind != "busy", kind != "refused"
        is_row = kind in ("row", "refused", "busy") and not last
        num_rows += is_row and kind == "row"
        rows, others = ([("r", 0, ids[0], 5)], []) if is_row else ([], [output])
        step = processor.process_step(StepOutputs([two[0], *rows, two[1], ("stranger", 0, 7, 0)], others))
        expected = plain.process(StepOutputs(two, [output]))
        told += expected.deltas["r"]
        reader.told += step.deltas.get("r", [])
        assert step.deltas["two"] == expected.deltas["two"]
        assert (step.finished, step.aborts, list(step.deltas.keys() - {"r"})) == (expected.finished, [], ["two"])
    assert reader.told == told
    assert reader.num_short == num_rows
    assert len(processor) == len(plain) == 1


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(stop=("E",)),
        SamplingParams(logprobs=0),
        SamplingParams(prompt_logprobs=0),
        SamplingParams(n=2),
        SamplingParams(best_of=2),
        SamplingParams(best_of=2, use_beam_search=True),
    ],
    ids=["stop", "logprobs", "prompt_logprobs", "n", "best_of", "beams"],
)
def test_requests_that_tell_more_than_text_have_no_short_way(byte_level: Tokenizer, params: SamplingParams) -> None:
    processor, reader = OutputProcessor(byte_level), Reader()
    processor.add("r", [5], params, DeltaQueue(reader))
    reader.reader_waits = True
    processor.process_step(StepOutputs([("r", 0, encode(byte_level, "a")[0], 0)]))
    assert reader.told == []


def test_what_a_sink_raises_concerns_its_own_reader_alone(byte_level: Tokenizer) -> None:
    class Broken(Reader):
        def take_text(self, text: str, token_id: int, num_output_tokens: int, now: float) -> bool:
            raise RuntimeError("broken")

    async def check() -> None:
        processor, sinks = OutputProcessor(byte_level), [Broken(), Reader()]
        queues = [DeltaQueue(sink) for sink in sinks]
        for name, queue in zip("rs", queues, strict=True):
            processor.add(name, [5], SamplingParams(), queue)
        readers = [asyncio.create_task(queue.get()) for queue in queues]
        await asyncio.sleep(0)
        a = encode(byte_level, "a")[0]
        step = processor.process_step(StepOutputs([("r", 0, a, 0), ("s", 0, a, 0)]))
        assert (step.deltas, [delta.text for delta in sinks[1].told]) == ({}, ["a"])
        with pytest.raises(RuntimeError, match="broken"):
            await readers[0]
        assert not sinks[0].reader_waits
        readers[1].cancel()

    asyncio.run(check())


def test_request_that_was_removed_is_not_handed_on(byte_level: Tokenizer) -> None:
    processor, reader = OutputProcessor(byte_level), Reader()
    processor.add("r", [5], SamplingParams(), DeltaQueue(reader))
    reader.reader_waits = True
    processor.remove("r")
    step = processor.process_step(StepOutputs([("r", 0, encode(byte_level, "a")[0], 0)]))
    assert (step.deltas, reader.told) == ({}, [])
