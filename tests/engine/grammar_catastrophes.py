"""Grammars made to hang, to overflow or to fill the memory of a compiler, as data."""

from __future__ import annotations

import itertools
import json
from typing import Any

from quire.grammar import GrammarKind

INTEGER = {"type": "integer"}


def terminals() -> str:
    """Twelve levels of five: 5 ** 10 letters, from a few lines."""
    levels = "CDEFGHIJKL"
    lines = [f"{above}: " + " ".join([below] * 5) for above, below in itertools.pairwise(levels)]
    return "\n".join(["start: A", "A: B B B", "B: C C C C", *lines, 'L: "x"'])


def complements() -> str:
    return "start: A\nA: " + " & ".join(f"~/(?s:.)*{letter}[a-z]{{20,40}}(?s:.)*/" for letter in "abcdefghij")


def patterns() -> Any:
    return {"allOf": [{"type": "string", "pattern": f"[a-z]*{letter}[a-z]*"} for letter in "abcdefghijklmnopqrst"]}


def multiples() -> Any:
    return {"allOf": [{"type": "integer", "multipleOf": divisor} for divisor in (7, 11, 13, 17, 19, 23)]}


def tuples() -> Any:
    schema: Any = INTEGER
    for _ in range(3):
        schema = {"type": "array", "items": schema, "minItems": 10**9, "maxItems": 10**9}
    return schema


def references() -> Any:
    """Arrays of arrays of arrays, in very many ways."""
    names = [f"#/$defs/{index}" for index in range(20)]
    cases = [
        [{"type": "array", "items": {"$ref": names[(index * 7 + step) % 20]}} for step in range(1, 12)]
        for index in range(20)
    ]
    return {"$ref": names[0], "$defs": {str(index): {"anyOf": each} for index, each in enumerate(cases)}}


def intersections() -> Any:
    """Each of 40 schemas refers to the next one twice: 2 ** 40 ways down."""
    schemas = {str(index): {"allOf": [{"$ref": f"#/$defs/{index + 1}"}] * 2} for index in range(40)}
    return {"$ref": "#/$defs/0", "$defs": {**schemas, "40": {"type": "object"}}}


def unions() -> Any:
    """6 ** 12 combinations."""
    return {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": INTEGER}} for j in range(6)]} for i in range(12)]}


REGEXES: dict[str, str] = {
    "nested_repeat": "(a+)+b",
    "nested_repeats": "((a*)*)*b",
    "counted": "(x{1,1000}){1,1000}",
    "counted_deep": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}",
    "counted_beyond": "x{1000000000}",
    "far_back": ".*a.{1000}",
    "any": "(.{1,99}a){1,99}",
    "unicode": r"(\w{1,99}\W{1,99}){1,99}",
    "parentheses_of_a_regex": "(" * 512 + ")" * 512,
}
LARK: dict[str, str] = {
    "parentheses": "start: " + "(" * 4000 + '"a"' + ")" * 4000,
    "parentheses_of_gbnf": "root ::= " + "(" * 4000 + '"a"' + ")" * 4000,
    "brackets": "start: " + "[" * 8000,
    "ambiguous": 'start: s\ns: s s | "a" | s s s',
    "ambiguous_nothing": 'start: a a a a a\na: b b b b b\nb: c c c c c\nc: d d d d d\nd: | "x"?',
    "endless": 'start: "a" start',
    "itself": "start: start",
    "billion": 'start: ("a"{1,1000000} "b"){1,1000000}',
    "right_recursive": "start: s\ns: /[a-z ]/ s | /[a-z ]/",
    "terminals": terminals(),
    "complements": complements(),
}
SCHEMAS: dict[str, Any] = {
    "pattern": {"type": "string", "pattern": "(x{1,1000}){1,1000}"},
    "patterns": patterns(),
    "multiples": multiples(),
    "many_items": {"type": "array", "items": INTEGER, "maxItems": 10**9},
    "needed_items": {"type": "array", "items": INTEGER, "minItems": 10**9},
    "tuples": tuples(),
    "long_string": {"type": "string", "minLength": 10**9},
    "negative": {"type": "array", "maxItems": -1},
    "large_number": {"type": "integer", "minimum": int("9" * 300)},
    "properties": {"properties": {f"p{index}": {"type": "string"} for index in range(1000)}},
    "itself_by_reference": {"$ref": "#"},
    "itself_by_all": {"allOf": [{"$ref": "#"}, {"$ref": "#"}]},
    "itself_by_any": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
    "references": references(),
    "intersections": intersections(),
    "unions": unions(),
    "enum": {"enum": ["x" * 50 + str(index) for index in range(1000)]},
}
CATASTROPHES: dict[GrammarKind, dict[str, str]] = {
    "regex": REGEXES,
    "grammar": LARK,
    "json_schema": {name: json.dumps(schema) for name, schema in SCHEMAS.items()},
    "choice": {"choices": json.dumps(["x" * 55 + str(index) for index in range(1000)])},
}
