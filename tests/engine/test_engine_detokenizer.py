"""Incremental text: equal to decoding all at once, never half a character, never the beginning of a stop string."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers

from quire.engine.detokenizer import (
    MAX_WINDOW_TOKENS,
    ByteDetokenizer,
    DetokenizerFactory,
    IncrementalDetokenizer,
    StopMatcher,
    StopStrings,
    WindowDetokenizer,
)
from quire.engine.tokenizer import Tokenizer

PARTS = [
    *"abc xyz 019 .,;\n\t",
    "the ",
    "Übermut ",
    "e\u0301",
    "日本語",
    "中",
    "한국",
    "👨‍👩‍👧‍👦",
    "👍🏽",
    "🏳️‍🌈",
    "\u200d",
    "\ufe0f",
    "𝔘𝔫𝔦",
    "नमस्ते",
    "שלום",
    "\ufffd",
    "▁",
    "Ġ",
    "\x00",
    "<0x41>",
]
unicode_text = st.one_of(st.lists(st.sampled_from(PARTS), max_size=20).map("".join), st.text(max_size=30))
KINDS = ["byte_level_dir", "byte_fallback_dir"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def byte_level(byte_level_dir: Path) -> Tokenizer:
    return Tokenizer(byte_level_dir)


@pytest.fixture(scope="module")
def byte_fallback(byte_fallback_dir: Path) -> Tokenizer:
    return Tokenizer(byte_fallback_dir)


def run(detokenizer: IncrementalDetokenizer, token_ids: Iterable[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


def without_prefix(text: str, prefix: str) -> str:
    assert text.startswith(prefix)
    return text[len(prefix) :]


def bytes_of(tokenizer: Tokenizer, token_ids: Iterable[int]) -> bytes:
    """The reference for byte-fallback output: the bytes of each piece, in order."""
    out = b""
    for token_id in token_ids:
        piece = tokenizer.id_to_piece(token_id) or ""
        is_byte = len(piece) == 6 and piece.startswith("<0x")
        if token_id not in tokenizer.special_ids:
            out += bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("▁", " ").encode()
    return out


@settings(max_examples=150, deadline=None)
@given(text=unicode_text)
def test_text_comes_back_with_no_half_character(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    factory = DetokenizerFactory(tokenizer)
    detokenizer = factory.create([])
    assert isinstance(detokenizer, ByteDetokenizer)
    deltas = run(detokenizer, token_ids)
    if tokenizer.piece_to_id("<0x00>") is not None:
        text = text.replace("▁", " ")  # SentencePiece cannot tell its mark from a space
    assert "".join(deltas) == tokenizer.decode(token_ids) == text
    assert deltas[-1] == ""
    shown = ""
    for delta in deltas:
        shown += delta
        assert text.startswith(shown)


def test_two_hundred_unicode_prompts(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    factory = DetokenizerFactory(tokenizer)
    for _ in range(200):
        prompt = tokenizer.encode("".join(rng.choices(PARTS, k=rng.randrange(8))))
        output = "".join(rng.choices(PARTS, k=rng.randrange(40)))
        token_ids = tokenizer.encode(output, add_special_tokens=False, parse_special=False)
        streamed = "".join(run(factory.create(prompt), token_ids))
        assert streamed == without_prefix(tokenizer.decode(prompt + token_ids), tokenizer.decode(prompt))


@settings(max_examples=300, deadline=None)
@given(token_ids=st.lists(st.integers(0, 560), max_size=40), skip=st.booleans())
def test_byte_level_equals_the_library_for_any_tokens(byte_level: Tokenizer, token_ids: list[int], skip: bool) -> None:
    deltas = run(DetokenizerFactory(byte_level).create([], skip), token_ids)
    assert "".join(deltas) == byte_level.decode(token_ids, skip)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_byte_level_bytes_equal_python_for_any_bytes(byte_level: Tokenizer, data: st.DataObject) -> None:
    lead = st.sampled_from([0x41, 0x80, 0xBF, 0xC0, 0xC3, 0xE0, 0xE4, 0xED, 0xA0, 0xF0, 0x9F, 0xF4, 0x90, 0xF8, 0xFF])
    raw = bytes(data.draw(st.lists(st.one_of(lead, st.integers(0, 255)), max_size=24)))
    token_ids = [byte_level.piece_to_id(stand_in(byte)) for byte in raw]
    known = [token_id for token_id in token_ids if token_id is not None]
    assert len(known) == len(raw)
    deltas = run(DetokenizerFactory(byte_level).create([]), known)
    assert "".join(deltas) == raw.decode("utf-8", "replace") == byte_level.decode(known)


def stand_in(byte: int) -> str:
    """The character by which byte-level BPE writes a byte, asked of the library where it can be asked."""
    if byte >= 0xC0:
        return chr(byte)
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(byte))
    return "".join(piece for piece, _ in pieces)[-1]


@settings(max_examples=300, deadline=None)
@given(token_ids=st.lists(st.one_of(st.integers(0, 600), st.integers(3, 258)), max_size=40))
def test_byte_fallback_equals_the_bytes_of_its_pieces(byte_fallback: Tokenizer, token_ids: list[int]) -> None:
    raw = bytes_of(byte_fallback, token_ids)
    in_context = run(DetokenizerFactory(byte_fallback).create(byte_fallback.encode("x")), token_ids)
    assert "".join(in_context) == raw.decode("utf-8", "replace")
    alone = "".join(run(DetokenizerFactory(byte_fallback).create([1]), token_ids))
    assert alone == raw.decode("utf-8", "replace").removeprefix(" ")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return
    assert alone == byte_fallback.decode(token_ids)


def test_complete_characters_of_an_invalid_run_stay(byte_fallback: Tokenizer) -> None:
    ids = [3 + byte for byte in "é".encode() + b"\xff"]
    assert byte_fallback.decode(ids) == "\ufffd" * 3
    assert run(DetokenizerFactory(byte_fallback).create([]), ids) == ["", "é", "\ufffd", ""]


@pytest.mark.parametrize(
    ("prompt", "skip", "expected"),
    [([], True, "the"), ([1], True, "the"), ([1, 2, 2], True, "the"), ([1], False, " the"), ("x", True, " the")],
)
def test_space_is_stripped_at_the_beginning_of_a_text_only(
    byte_fallback: Tokenizer, prompt: list[int] | str, skip: bool, expected: str
) -> None:
    the = byte_fallback.piece_to_id("▁the")
    assert the is not None
    prompt_ids = byte_fallback.encode(prompt) if isinstance(prompt, str) else prompt
    assert "".join(run(DetokenizerFactory(byte_fallback).create(prompt_ids, skip), [the])) == expected
    whole = byte_fallback.decode([*prompt_ids, the], skip)
    assert without_prefix(whole, byte_fallback.decode(prompt_ids, skip)) == expected


def test_special_and_unknown_ids(byte_level: Tokenizer) -> None:
    start, tool = byte_level.piece_to_id("<|im_start|>"), byte_level.piece_to_id("<tool call>")
    assert start is not None
    assert tool is not None
    ids = [start, tool, 99_999]
    factory = DetokenizerFactory(byte_level)
    assert run(factory.create([]), ids) == ["", "<tool call>", "", ""]
    assert run(factory.create([], False), ids) == ["<|im_start|>", "<tool call>", "", ""]


@pytest.mark.parametrize("kind", ["word_piece_dir", "unigram_dir"])
def test_other_decoders_go_through_a_window(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = Tokenizer(request.getfixturevalue(kind))
    factory = DetokenizerFactory(tokenizer)
    rng = random.Random(1)
    for length in [*range(12), 40, 200]:
        prompt = [rng.randrange(3, tokenizer.vocab_size) for _ in range(rng.randrange(10))]
        output = [rng.randrange(tokenizer.vocab_size) for _ in range(length)]
        detokenizer = factory.create(prompt)
        assert isinstance(detokenizer, WindowDetokenizer)
        assert "".join(run(detokenizer, output)) == without_prefix(
            tokenizer.decode(prompt + output), tokenizer.decode(prompt)
        )


def test_window_equals_bytes_for_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    factory = DetokenizerFactory(tokenizer)
    for _ in range(50):
        prompt = tokenizer.encode("".join(rng.choices(PARTS, k=rng.randrange(5))))
        text = "".join(rng.choices(PARTS, k=30))
        token_ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        by_bytes = run(factory.create(prompt), token_ids)
        by_window = run(WindowDetokenizer(tokenizer, prompt[1:], tokenizer.special_ids), token_ids)
        assert "".join(by_window) == "".join(by_bytes)
        if "\ufffd" not in text:
            assert "\ufffd" not in "".join(by_window)


def test_window_stays_small_in_endless_noise(
    byte_level_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Backend.from_file(str(byte_level_dir / "tokenizer.json"))
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    half = tokenizer.encode("日", add_special_tokens=False)[0]
    assert tokenizer.decode([half]) == "\ufffd"
    detokenizer = DetokenizerFactory(tokenizer).create(tokenizer.encode("abc"))
    assert isinstance(detokenizer, WindowDetokenizer)
    longest = 0
    decode = Tokenizer.decode

    def measured(self: Tokenizer, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decode(self, token_ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", measured)
    assert "".join(run(detokenizer, [half] * 1000)) == "\ufffd" * 1000
    assert longest <= MAX_WINDOW_TOKENS


def cut_at_first_stop(text: str, stop: Iterable[str], include: bool) -> tuple[str, str | None]:
    """The reference: the match that is complete first; among those complete at the same character, the longest."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
    if not ends:
        return text, None
    end, _, found = min(ends)
    return text[: end if include else end - len(found)], found


def push_all(matcher: StopMatcher, parts: Iterable[str], stop: Iterable[str]) -> str:
    """What is shown of `parts`; after each, no stop string has begun in what is shown (T4), nor is more held back."""
    prefixes = {text[:length] for text in stop for length in range(1, len(text))}
    seen = shown = ""
    for part in parts:
        seen += part
        shown += matcher.push(part)
        if matcher.matched is not None:
            return shown
        begun = [start for start in range(len(seen)) if seen[start:] in prefixes]
        assert len(shown) == min(begun, default=len(seen))
    return shown + matcher.finish()


STOP_CASES = [
    (("END",), "the END of it"),
    (("END",), "E EN ENEND EN"),
    (("\n\n", "\nUser:"), "a\n\nb"),
    (("\n\n", "\nUser:"), "a\nUser: b\n\n"),
    (("aab",), "aaaab"),
    (("abab", "b"), "aabab"),
    (("日本語",), "あ日本日本語い"),
    (("👨‍👩‍👧",), "x👨‍👩👨‍👩‍👧‍👦y"),
    (("e\u0301x",), "ee\u0301e\u0301xz"),
    (("stop", "top", "opp"), "a stopp"),
    (("never",), "nev neve"),
]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(("stop", "text"), STOP_CASES)
def test_every_split_of_every_stop_string(stop: tuple[str, ...], text: str, include: bool) -> None:
    expected, found = cut_at_first_stop(text, stop, include)
    compiled = StopStrings(stop, include_in_output=include)
    num_gaps = len(text) - 1
    for num_cuts in (0, 1, 2, 3, num_gaps):
        for cuts in itertools.combinations(range(1, len(text)), num_cuts):
            parts = [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]
            matcher = StopMatcher(compiled)
            assert push_all(matcher, parts, stop) == expected
            assert matcher.matched == found


@settings(max_examples=500, deadline=None)
@given(
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4),
    parts=st.lists(st.text(alphabet="ab", max_size=6), max_size=12),
    include=st.booleans(),
)
def test_stop_strings_that_overlap_with_themselves(stop: list[str], parts: list[str], include: bool) -> None:
    matcher = StopMatcher(StopStrings(stop, include_in_output=include))
    expected, found = cut_at_first_stop("".join(parts), stop, include)
    assert push_all(matcher, parts, stop) == expected
    assert matcher.matched == found


def test_stop_string_counts_only_once_it_may() -> None:
    matcher = StopMatcher(StopStrings(["END", "Z"]))
    assert matcher.push("aENDbEN", may_stop=False) == "aENDb"
    assert matcher.push("") == ""
    assert matcher.push("D", may_stop=True) == ""
    assert matcher.matched == "END"


def test_longest_stop_strings_hold_back_no_more_than_they_must() -> None:
    stop = ("x" * 255 + "y",)
    matcher = StopMatcher(StopStrings(stop))
    shown = "".join(matcher.push("x") for _ in range(1000))
    assert len(shown) == 1000 - 255
    assert matcher.push("z") == "x" * 255 + "z"
    assert matcher.finish() == ""
