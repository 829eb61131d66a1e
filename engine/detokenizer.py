"""Tokens to text as they come, never showing half a character nor what may become a stop string."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from quire.engine.tokenizer import Tokenizer

CONTEXT_TOKENS = 6
"""Tokens of the prompt that the window of `WindowDetokenizer` begins with."""
MAX_WINDOW_TOKENS = 32
"""A window whose text is still incomplete at this length holds bytes that are no text at all."""

_REPLACEMENT = "\ufffd"
_SPACE_MARK = "▁"  # what SentencePiece writes for a space
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class IncrementalDetokenizer(Protocol):
    """The text of one choice, token by token.

    The concatenation of all that `push` and `finish` return is the text of the output in the context of its prompt:
    decode(prompt + output) without decode(prompt). With a prompt that ends in a whole character that is decode(output),
    but for the space which SentencePiece strips from the beginning of a text and not from its middle.
    """

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""

    def finish(self) -> str:
        """What is left: U+FFFD for bytes that never became a character."""


class DetokenizerFactory:
    """Makes one detokenizer for each choice; holds the tables that they share. One thread only.

    The "decoder" entry of tokenizer.json tells which kind. Byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece with
    byte fallback (Llama 2, Mistral, Gemma) map each token to bytes, so a table and an incremental UTF-8 decoder are
    exact and O(1). Anything else goes through a sliding window over the library's own decoder.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        steps = _decoder_steps(tokenizer.decoder)
        self._strips_space = bool(steps) and steps[-1] == _STRIP
        to_bytes: _PieceToBytes | None = None
        if steps == [_BYTE_LEVEL]:
            to_bytes = _ByteAlphabet()
        elif steps in (_SENTENCEPIECE, [*_SENTENCEPIECE, _STRIP]):
            to_bytes = _sentencepiece_bytes
        self._tables: dict[bool, _TokenTexts] | None = None
        if to_bytes is not None:
            self._tables = {skip: _TokenTexts(tokenizer, to_bytes, skip) for skip in (False, True)}

    def create(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """A detokenizer for one output that follows this prompt."""
        return self.create_many(prompt_token_ids, skip_special_tokens, 1)[0]

    def create_many(
        self, prompt_token_ids: Sequence[int], skip_special_tokens: bool, count: int
    ) -> list[IncrementalDetokenizer]:
        """One for each of `count` outputs of the same prompt, which is looked at once."""
        if self._tables is None:
            hidden = self._tokenizer.special_ids if skip_special_tokens else frozenset()
            context = _last_visible(prompt_token_ids, hidden)
            return [WindowDetokenizer(self._tokenizer, context, hidden) for _ in range(count)]
        table = self._tables[skip_special_tokens]
        begins_text = self._strips_space and not any(table[token_id] for token_id in reversed(prompt_token_ids))
        return [ByteDetokenizer(table, strip_space=begins_text) for _ in range(count)]

    def token_text(self, token_id: int) -> str | bytes:
        """Of one token by itself, special or not; its bytes where those are no text."""
        if self._tables is None:
            return self._tokenizer.decode([token_id], skip_special_tokens=False)
        return self._tables[False][token_id]


class ByteDetokenizer:
    """For tokens that stand for bytes. Invalid bytes become U+FFFD as in Python and in the WHATWG's UTF-8 decoder.

    The library's byte-fallback decoder replaces a whole run of byte tokens when any of it is invalid, characters that
    were complete included; a stream cannot take those back, so here they stay.
    """

    __slots__ = ("_rest", "_strip_space", "_table")

    def __init__(self, table: _TokenTexts, *, strip_space: bool) -> None:
        self._table = table
        self._strip_space = strip_space
        self._rest = b""

    def push(self, token_id: int) -> str:
        text = self._table[token_id]
        if self._rest or isinstance(text, bytes):
            text = self._decode(text)
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        rest, self._rest = self._rest, b""
        return rest.decode("utf-8", "replace")

    def _decode(self, text: str | bytes) -> str:
        """Invariant: `_rest` is empty or the beginning, up to three bytes, of a character."""
        data = self._rest + (text.encode("utf-8") if isinstance(text, str) else text)
        decoded, num_used = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[num_used:]
        return decoded


class WindowDetokenizer:
    """For any decoder: the text of a token is what it adds to the text of the few tokens before it.

    The window holds the tokens shown last, as context, and those not shown yet. It moves on when its text has grown and
    does not end in a half character, so that each token is decoded a bounded number of times.

    Args:
        context: the last tokens of the prompt, without hidden ones.
        hidden: ids without text.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], hidden: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._window = list(context)
        self._num_context = len(self._window)
        self._context_text = tokenizer.decode(self._window, skip_special_tokens=False)

    def push(self, token_id: int) -> str:
        if token_id in self._hidden:
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        incomplete = text.endswith(_REPLACEMENT) or len(text) <= len(self._context_text)
        if incomplete and len(self._window) < MAX_WINDOW_TOKENS:
            return ""
        return self._move_on(text)

    def finish(self) -> str:
        return self._move_on(self._tokenizer.decode(self._window, skip_special_tokens=False))

    def _move_on(self, text: str) -> str:
        new = text[len(self._context_text) :]
        self._window = self._window[self._num_context :]
        self._num_context = len(self._window)
        self._context_text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        return new


class StopStrings:
    """The stop strings of one request, compiled; shared by its choices."""

    def __init__(self, stop: Iterable[str], *, include_in_output: bool = False) -> None:
        self.automata = [(text, _failure_table(text)) for text in stop]
        self.first_characters = frozenset(text[0] for text, _ in self.automata)
        self.include_in_output = include_in_output


class StopMatcher:
    """Finds the first stop string of one choice; shows text only once it can no longer be the beginning of one.

    Characters count one by one, so the result does not depend on how the text was cut into tokens: of several stop
    strings the one that is complete first wins, and of those complete at the same character the longest.
    """

    __slots__ = ("_held", "_num_matched", "_stop", "matched")

    def __init__(self, stop: StopStrings) -> None:
        self._stop = stop
        self._num_matched = [0] * len(stop.automata)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found; nothing is to be pushed after it."""

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """What may be shown now.

        Args:
            may_stop: False while fewer than `min_tokens` tokens are out: a stop string that ends here is plain text.
        """
        if not self._held and self._stop.first_characters.isdisjoint(text):
            return text
        text, start = self._held + text, len(self._held)
        for position in range(start, len(text)):
            length = self._step(text[position])
            if length and may_stop:
                end = position + 1
                self.matched = text[end - length : end]
                self._held = ""
                return text[:end] if self._stop.include_in_output else text[: end - length]
        shown = len(text) - max(self._num_matched)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """What was held back, now that no more text follows."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> int:
        """Advance each stop string's automaton (Knuth, Morris and Pratt 1977); the longest that is complete, or 0."""
        longest = 0
        for index, (stop, failure) in enumerate(self._stop.automata):
            matched = self._num_matched[index]
            while matched and stop[matched] != character:
                matched = failure[matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                longest = max(longest, matched)
                matched = failure[matched - 1]
            self._num_matched[index] = matched
        return longest


class _PieceToBytes(Protocol):
    def __call__(self, piece: str) -> bytes: ...


class _TokenTexts(dict[int, "str | bytes"]):
    """Token id to its text, or to its bytes where those are no text by themselves. Filled as tokens occur."""

    def __init__(self, tokenizer: Tokenizer, to_bytes: _PieceToBytes, skip_special_tokens: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._to_bytes = to_bytes
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()

    def __missing__(self, token_id: int) -> str | bytes:
        piece = None if token_id in self._hidden else self._tokenizer.id_to_piece(token_id)
        data = b"" if piece is None else self._to_bytes(piece)
        try:
            text: str | bytes = data.decode("utf-8")
        except UnicodeDecodeError:
            text = data
        self[token_id] = text
        return text


class _ByteAlphabet:
    """GPT-2's printable stand-ins for bytes, turned back. A piece with any other character is its own text."""

    def __init__(self) -> None:
        self._bytes = {character: byte for byte, character in _byte_characters()}

    def __call__(self, piece: str) -> bytes:
        try:
            return bytes([self._bytes[character] for character in piece])
        except KeyError:
            return piece.encode("utf-8")


def _byte_characters() -> Iterator[tuple[int, str]]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    next_free = 0x100
    for byte in range(0x100):
        if byte in printable:
            yield byte, chr(byte)
        else:
            yield byte, chr(next_free)
            next_free += 1


def _sentencepiece_bytes(piece: str) -> bytes:
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace(_SPACE_MARK, " ").encode("utf-8")


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The decoder of tokenizer.json as a flat list, without the fields that have no say in decoding."""
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for inner in decoder.get("decoders", []) for step in _decoder_steps(inner)]
    return [_BYTE_LEVEL] if decoder.get("type") == "ByteLevel" else [decoder]


def _last_visible(token_ids: Sequence[int], hidden: frozenset[int]) -> list[int]:
    """The last CONTEXT_TOKENS that have text, in their order."""
    visible = (token_id for token_id in reversed(token_ids) if token_id not in hidden)
    return list(itertools.islice(visible, CONTEXT_TOKENS))[::-1]


def _failure_table(text: str) -> list[int]:
    """For each prefix of `text`, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = table[length - 1]
        if text[index] == text[length]:
            length += 1
        table[index] = length
    return table


_BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel"}
_SENTENCEPIECE: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP: dict[str, Any] = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
