"""A first look at raw JSON that costs no more than a pass over the bytes, before anything is built from it.

It bounds what the parser may be given (depth, keys, containers, strings, items) and refuses what the parser would let
through: keys that appear twice, and NaN and Infinity in fields that nobody reads. Syntax is left to the parser.

The work is done by calls that run at memory speed (`find`, `translate`, `count`), since each of them holds the
interpreter, and with it the event loop, from its beginning to its end.
"""

from __future__ import annotations

import json
import re
from typing import Final

from quire.server.errors import ApiError
from quire.server.settings import Limits

_STRUCTURE: Final = b"[]{}NI"
"""Brackets, and the first letters of NaN and Infinity: nothing else outside of a string matters here."""
_NOT_STRUCTURE: Final = bytes(byte for byte in range(256) if byte not in _STRUCTURE)
_OPEN_LIST, _CLOSE_LIST, _OPEN_OBJECT, _CLOSE_OBJECT = b"[]{}"
_BACKSLASH: Final = ord("\\")
# Possessive: no input makes it backtrack.
_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_COLON: Final = re.compile(rb"[ \t\n\r]*+:")


def scan_json(body: bytes, limits: Limits) -> None:
    """Raise ApiError if `body` is more complex than `limits` allow, or repeats a key, or holds NaN or Infinity."""
    scan = _Scan(limits)
    position = 0
    while True:
        quote = body.find(b'"', position)
        if not scan.take_gap(body[position : quote if quote >= 0 else len(body)]) or quote < 0:
            return
        position = _end_of_string(body, quote)
        if position < 0:
            return
        scan.take_string(body, quote, position)


def _end_of_string(body: bytes, quote: int) -> int:
    """Index after the string that begins at `quote`; -1 if it has no end."""
    end = body.find(b'"', quote + 1)
    if end < 0:
        return -1
    if body[end - 1] != _BACKSLASH:
        return end + 1
    match = _STRING.match(body, quote)
    return -1 if match is None else match.end()


class _Scan:
    """What was seen so far."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._keys: list[set[bytes] | None] = []
        """Of each open container: the keys of an object, None for an array."""
        self._num_keys = self._num_containers = self._num_strings = self._num_items = 0

    def take_gap(self, gap: bytes) -> bool:
        """What lies between two strings; False if it cannot be JSON, which the parser will say."""
        limits = self._limits
        self._num_items += gap.count(b",")
        _check(self._num_items, limits.max_json_items, "items")
        for byte in gap.translate(None, _NOT_STRUCTURE):
            if byte in (_OPEN_OBJECT, _OPEN_LIST):
                self._num_containers += 1
                self._keys.append(set() if byte == _OPEN_OBJECT else None)
                _check(len(self._keys), limits.max_json_depth, "levels")
                _check(self._num_containers, limits.max_json_containers, "arrays and objects")
            elif byte in (_CLOSE_OBJECT, _CLOSE_LIST):
                if not self._keys:
                    return False
                self._keys.pop()
            else:
                raise ApiError("non_finite_number")
        return True

    def take_string(self, body: bytes, start: int, end: int) -> None:
        self._num_strings += 1
        _check(self._num_strings, self._limits.max_json_strings, "strings")
        if _COLON.match(body, end) is None:
            return
        self._num_keys += 1
        _check(self._num_keys, self._limits.max_json_keys, "keys")
        if self._keys and (keys := self._keys[-1]) is not None:
            key = _without_escapes(body[start:end])
            if key in keys:
                raise ApiError("duplicate_key")
            keys.add(key)


def _check(value: int, limit: int, what: str) -> None:
    if value > limit:
        raise ApiError("json_too_complex", limit=limit, what=what)


def _without_escapes(key: bytes) -> bytes:
    """The key as it reads; bytes that are no JSON string are left to the parser to refuse."""
    if b"\\" not in key:
        return key
    try:
        return b'"%s"' % json.loads(key).encode("utf-8", "surrogatepass")
    except ValueError:
        return key
