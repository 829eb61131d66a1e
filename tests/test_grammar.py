"""Bounds of a declared grammar: at the limit, and one more."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from quire.grammar import (
    MAX_CHOICE_BYTES,
    MAX_CHOICES,
    MAX_ENUM_VALUES,
    MAX_GRAMMAR_BYTES,
    MAX_JSON_DEPTH,
    MAX_REGEX_BYTES,
    MAX_SCHEMA_BYTES,
    MAX_SCHEMA_DEPTH,
    MAX_SCHEMA_NODES,
    Grammar,
    GrammarError,
    GrammarKind,
)

SECRET = "zebra"


def schema_of_bytes(size: int) -> str:
    empty = json.dumps({"description": ""})
    return json.dumps({"description": "x" * (size - len(empty))})


def schema_of_depth(depth: int) -> str:
    schema: dict[str, Any] = {"type": "string"}
    for level in range(depth - 1):
        schema = {"properties": {"a": schema}} if level % 2 else {"anyOf": [schema]}
    return json.dumps(schema)


def schema_of_nodes(count: int) -> str:
    return json.dumps({"properties": {str(index): {} for index in range(count - 1)}})


def schema_of_enums(count: int) -> str:
    return json.dumps({"properties": {"a": {"enum": [1]}, "b": {"enum": list(range(count - 1))}}})


def schema_of_json_depth(depth: int) -> str:
    value: Any = 1
    for _ in range(depth - 2):
        value = [value]
    return json.dumps({"const": value})


LIMITS: list[tuple[GrammarKind, Callable[[int], str], int]] = [
    ("json_schema", schema_of_bytes, MAX_SCHEMA_BYTES),
    ("json_schema", schema_of_depth, MAX_SCHEMA_DEPTH),
    ("json_schema", schema_of_nodes, MAX_SCHEMA_NODES),
    ("json_schema", schema_of_enums, MAX_ENUM_VALUES),
    ("json_schema", schema_of_json_depth, MAX_JSON_DEPTH),
    ("regex", lambda size: "x" * size, MAX_REGEX_BYTES),
    ("regex", lambda size: "é" * (size // 2) + "x" * (size % 2), MAX_REGEX_BYTES),
    ("grammar", lambda size: "x" * size, MAX_GRAMMAR_BYTES),
    ("choice", lambda count: json.dumps([str(index) for index in range(count)]), MAX_CHOICES),
    ("choice", lambda size: json.dumps(["x" * (size - 4)]), MAX_CHOICE_BYTES),
]


@pytest.mark.parametrize(("kind", "make", "limit"), LIMITS)
def test_at_the_limit_and_one_more(kind: GrammarKind, make: Callable[[int], str], limit: int) -> None:
    Grammar(kind, make(limit))
    with pytest.raises(GrammarError) as caught:
        Grammar(kind, make(limit + 1))
    assert caught.value.code == "grammar_too_large"


INVALID: list[tuple[Any, Any]] = [
    ("xml", SECRET),
    ("regex", 3),
    ("json_object", SECRET),
    ("json_schema", ""),
    ("json_schema", f'{{"{SECRET}"'),
    ("json_schema", "[]"),
    ("json_schema", "true"),
    ("json_schema", f'{{"{SECRET}": 1, "{SECRET}": 2}}'),
    ("json_schema", '{"minimum": NaN}'),
    ("json_schema", '{"minimum": -Infinity}'),
    ("json_schema", '{"const": "\\ud800"}'),
    ("json_schema", '{"\\udc00": 1}'),
    ("json_schema", '{"const": "\ud800"}'),
    ("json_schema", f'{{"$ref": "http://{SECRET}/x"}}'),
    ("json_schema", f'{{"properties": {{"a": {{"$ref": "{SECRET}.json"}}}}}}'),
    ("json_schema", '{"anyOf": [{"$ref": 3}]}'),
    ("json_schema", '{"x-guidance": {"lenient": true}}'),
    ("choice", "[]"),
    ("choice", f'"{SECRET}"'),
    ("choice", f'["{SECRET}", 1]'),
    ("choice", f'{{"{SECRET}": 1}}'),
    ("choice", '["\\udfff"]'),
    ("regex", "\ud800"),
    ("grammar", "\udc00"),
    ("grammar", " \n"),
]


@pytest.mark.parametrize(("kind", "text"), INVALID)
def test_invalid(kind: Any, text: Any) -> None:
    with pytest.raises(GrammarError) as caught:
        Grammar(kind, text)
    assert caught.value.code == "invalid_grammar"
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["[" * 60_000, '{"a":' * 10_000, '{"minimum": ' + "9" * 5000 + "}", '{"minimum": 1e400}']
)
def test_what_would_stall_or_overflow_a_parser(text: str) -> None:
    with pytest.raises(GrammarError) as caught:
        Grammar("json_schema", text)
    assert caught.value.code == "grammar_too_large"


@pytest.mark.parametrize(
    "text",
    [
        '{"properties": {"$ref": {"type": "string"}, "enum": {"type": "integer"}}}',
        '{"const": {"$ref": "http://example.com"}}',
        '{"enum": [{"$ref": "other.json"}]}',
        '{"properties": {"x-guidance": {}}}',
        '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#"}}}',
    ],
)
def test_names_and_data_are_not_keywords(text: str) -> None:
    Grammar("json_schema", text)


def test_crosses_a_socket_and_is_checked_again() -> None:
    grammar = Grammar("choice", '["a", "ü"]')
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(grammar), type=Grammar) == grammar
    forged = msgspec.msgpack.encode({"kind": "regex", "text": "x" * (MAX_REGEX_BYTES + 1)})
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(forged, type=Grammar)


def test_digest() -> None:
    grammars = [Grammar("json_object"), Grammar("regex", "a"), Grammar("grammar", "a"), Grammar("regex", "b")]
    assert len({grammar.digest for grammar in grammars}) == 4
    assert Grammar("regex", "a").digest == Grammar("regex", "a").digest
