"""Requests for structured output as clients send them, good and bad, as data."""

from __future__ import annotations

import json
from typing import Any

Fields = dict[str, Any]

SCHEMA: Fields = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))
LARK = 'start: "a" | "b"'
GBNF = 'root ::= "a" | "b"'


def openai(schema: Any, **more: Any) -> Fields:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, **more}}}


def vllm(**fields: Any) -> Fields:
    return {"structured_outputs": fields}


def schema_of(num_bytes: int) -> Fields:
    return {"const": "x" * (num_bytes - len('{"const":""}'))}


def nested(depth: int) -> Any:
    schema: Any = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


GOOD: dict[str, tuple[Fields, str, str]] = {
    "response_format json_object": ({"response_format": {"type": "json_object"}}, "json_object", ""),
    "response_format json_object with a schema": (
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        "json_schema",
        TEXT,
    ),
    "response_format json_schema": (openai(SCHEMA), "json_schema", TEXT),
    "response_format strict": (openai(SCHEMA, strict=True), "json_schema", TEXT),
    "response_format not strict": (openai(SCHEMA, strict=False), "json_schema", TEXT),
    "response_format with nulls": (openai(SCHEMA, strict=None, name=None), "json_schema", TEXT),
    "structured_outputs json": (vllm(json=SCHEMA), "json_schema", TEXT),
    "structured_outputs json text": (vllm(json=TEXT), "json_schema", TEXT),
    "structured_outputs regex": (vllm(regex="[a-z]+"), "regex", "[a-z]+"),
    "structured_outputs choice": (vllm(choice=["b", "ä"]), "choice", '["b","ä"]'),
    "structured_outputs grammar": (vllm(grammar=LARK), "grammar", LARK),
    "structured_outputs json_object": (vllm(json_object=True), "json_object", ""),
    "structured_outputs with neutral options": (
        vllm(
            regex="a",
            json=None,
            json_object=False,
            whitespace_pattern=None,
            disable_any_whitespace=False,
            disable_additional_properties=False,
            structural_tag=None,
        ),
        "regex",
        "a",
    ),
    "guided_json": ({"guided_json": SCHEMA}, "json_schema", TEXT),
    "guided_json text": ({"guided_json": TEXT}, "json_schema", TEXT),
    "guided_regex": ({"guided_regex": "a|b"}, "regex", "a|b"),
    "guided_choice": ({"guided_choice": ["yes", "no"]}, "choice", '["yes","no"]'),
    "guided_grammar": ({"guided_grammar": GBNF}, "grammar", GBNF),
    "json_schema": ({"json_schema": SCHEMA}, "json_schema", TEXT),
    "json_schema text": ({"json_schema": TEXT}, "json_schema", TEXT),
    "json_schema of anything": ({"json_schema": {}}, "json_schema", "{}"),
    "regex": ({"regex": "a+"}, "regex", "a+"),
    "ebnf": ({"ebnf": GBNF}, "grammar", GBNF),
    "grammar": ({"grammar": GBNF}, "grammar", GBNF),
    "one constraint and neutral fields": (
        {"regex": "a", "response_format": {"type": "text"}, "guided_json": None, "structured_outputs": None},
        "regex",
        "a",
    ),
    "numbers as they were": (
        {"guided_json": {"enum": [1.0, 1, -0.5, 12345678901234567890]}},
        "json_schema",
        '{"enum":[1.0,1,-0.5,12345678901234567890]}',
    ),
}

AT_THE_LIMIT: dict[str, Fields] = {
    "schema of 64 KiB": {"guided_json": schema_of(2**16)},
    "schema of 16 levels": {"guided_json": nested(16)},
    "1024 schemas": {"guided_json": {"anyOf": [{}] * 1023}},
    "1000 enum values": {"guided_json": {"enum": list(range(1000))}},
    "regex of 1 KiB": {"guided_regex": "x" * 1024},
    "grammar of 8 KiB": {"guided_grammar": "#" * (2**13 - len(LARK) - 1) + "\n" + LARK},
    "1000 choices": {"guided_choice": [str(index) for index in range(1000)]},
}

CODES = ("invalid_type", "invalid_value", "invalid_grammar", "grammar_too_large", "unsupported_parameter")
TYPE, VALUE, GRAMMAR, LARGE, UNSUPPORTED = CODES
MISSING = "missing_required_parameter"
FORMAT, OUTPUTS = "response_format", "structured_outputs"
OPENAI = f"{FORMAT}.json_schema"

BAD: dict[str, tuple[Fields, str, str]] = {
    "response_format text": ({FORMAT: "json_object"}, TYPE, FORMAT),
    "response_format list": ({FORMAT: [{"type": "json_object"}]}, TYPE, FORMAT),
    "response_format empty": ({FORMAT: {}}, MISSING, f"{FORMAT}.type"),
    "response_format type number": ({FORMAT: {"type": 1}}, TYPE, f"{FORMAT}.type"),
    "response_format type unknown": ({FORMAT: {"type": "yaml"}}, VALUE, f"{FORMAT}.type"),
    "response_format structural_tag": (
        {FORMAT: {"type": "structural_tag", "structures": []}},
        UNSUPPORTED,
        f"{FORMAT}.type",
    ),
    "response_format without its schema": ({FORMAT: {"type": "json_schema"}}, MISSING, OPENAI),
    "response_format with an empty json_schema": (
        {FORMAT: {"type": "json_schema", "json_schema": {"name": "a"}}},
        MISSING,
        f"{OPENAI}.schema",
    ),
    "response_format with a list": (openai([1]), TYPE, f"{OPENAI}.schema"),
    "response_format with a text": (openai(TEXT), TYPE, f"{OPENAI}.schema"),
    "response_format with true": (openai(True), TYPE, f"{OPENAI}.schema"),
    "response_format strict number": (openai({}, strict=1), TYPE, f"{OPENAI}.strict"),
    "response_format name number": (openai({}, name=1), TYPE, f"{OPENAI}.name"),
    "response_format text with a schema": ({FORMAT: {"type": "text", "json_schema": {"schema": {}}}}, VALUE, OPENAI),
    "response_format schema beside": ({FORMAT: {"type": "json_schema", "schema": {}}}, VALUE, f"{FORMAT}.schema"),
    "structured_outputs text": ({OUTPUTS: "{}"}, TYPE, OUTPUTS),
    "structured_outputs empty": ({OUTPUTS: {}}, VALUE, OUTPUTS),
    "structured_outputs nothing": (vllm(json_object=False, regex=None), VALUE, OUTPUTS),
    "structured_outputs two": (vllm(json={}, regex="a"), VALUE, f"{OUTPUTS}.regex"),
    "structured_outputs two of them json": (vllm(json={}, json_object=True), VALUE, f"{OUTPUTS}.json_object"),
    "structured_outputs json number": (vllm(json=1), TYPE, f"{OUTPUTS}.json"),
    "structured_outputs json list": (vllm(json=[{}]), TYPE, f"{OUTPUTS}.json"),
    "structured_outputs regex list": (vllm(regex=["a"]), TYPE, f"{OUTPUTS}.regex"),
    "structured_outputs choice text": (vllm(choice="a"), TYPE, f"{OUTPUTS}.choice"),
    "structured_outputs choice mixed": (vllm(choice=["a", 1]), TYPE, f"{OUTPUTS}.choice"),
    "structured_outputs choice empty": (vllm(choice=[]), GRAMMAR, f"{OUTPUTS}.choice"),
    "structured_outputs grammar object": (vllm(grammar={}), TYPE, f"{OUTPUTS}.grammar"),
    "structured_outputs json_object number": (vllm(json_object=1), TYPE, f"{OUTPUTS}.json_object"),
    "structural_tag": (vllm(structural_tag="{}"), UNSUPPORTED, f"{OUTPUTS}.structural_tag"),
    "structural_tag beside": (vllm(structural_tag={}, regex="a"), UNSUPPORTED, f"{OUTPUTS}.structural_tag"),
    "whitespace_pattern": (vllm(json={}, whitespace_pattern=" "), UNSUPPORTED, f"{OUTPUTS}.whitespace_pattern"),
    "no whitespace_pattern": (vllm(json={}, whitespace_pattern=""), UNSUPPORTED, f"{OUTPUTS}.whitespace_pattern"),
    "disable_any_whitespace": (
        vllm(json={}, disable_any_whitespace=True),
        UNSUPPORTED,
        f"{OUTPUTS}.disable_any_whitespace",
    ),
    "disable_additional_properties": (
        vllm(json={}, disable_additional_properties=True),
        UNSUPPORTED,
        f"{OUTPUTS}.disable_additional_properties",
    ),
    "guided_json number": ({"guided_json": 1}, TYPE, "guided_json"),
    "guided_json list": ({"guided_json": []}, TYPE, "guided_json"),
    "guided_json empty": ({"guided_json": ""}, GRAMMAR, "guided_json"),
    "guided_json broken": ({"guided_json": '{"type": "integer"'}, GRAMMAR, "guided_json"),
    "guided_json text of a list": ({"guided_json": "[]"}, GRAMMAR, "guided_json"),
    "guided_json key twice": ({"guided_json": '{"type": "null", "type": "null"}'}, GRAMMAR, "guided_json"),
    "guided_json NaN": ({"guided_json": '{"const": NaN}'}, GRAMMAR, "guided_json"),
    "guided_json surrogate": ({"guided_json": '{"const": "\\ud800"}'}, GRAMMAR, "guided_json"),
    "guided_json of another file": ({"guided_json": {"$ref": "http://x/y.json"}}, GRAMMAR, "guided_json"),
    "guided_json with options": ({"guided_json": {"x-guidance": {}}}, GRAMMAR, "guided_json"),
    "guided_json of 64 KiB + 1": ({"guided_json": schema_of(2**16 + 1)}, LARGE, "guided_json"),
    "guided_json text of 64 KiB + 1": ({"guided_json": json.dumps(schema_of(2**16))}, LARGE, "guided_json"),
    "guided_json of 3 MB": ({"guided_json": schema_of(3_000_000)}, LARGE, "guided_json"),
    "guided_json of 200000 numbers": ({"guided_json": {"enum": [1] * 200_000}}, LARGE, "guided_json"),
    "guided_json of 17 levels": ({"guided_json": nested(17)}, LARGE, "guided_json"),
    "guided_json text of 10000 levels": ({"guided_json": '{"items":' * 5000}, LARGE, "guided_json"),
    "1025 schemas": ({"guided_json": {"anyOf": [{}] * 1024}}, LARGE, "guided_json"),
    "1001 enum values": ({"guided_json": {"enum": list(range(1001))}}, LARGE, "guided_json"),
    "number of 401 digits": ({"guided_json": {"const": 10**400}}, LARGE, "guided_json"),
    "guided_regex list": ({"guided_regex": ["a"]}, TYPE, "guided_regex"),
    "guided_regex of 1 KiB + 1": ({"guided_regex": "x" * 1025}, LARGE, "guided_regex"),
    "guided_regex of 1 KiB + 1 in 513 letters": ({"guided_regex": "é" * 513}, LARGE, "guided_regex"),
    "guided_choice text": ({"guided_choice": "a"}, TYPE, "guided_choice"),
    "guided_choice numbers": ({"guided_choice": [1, 2]}, TYPE, "guided_choice"),
    "guided_choice empty": ({"guided_choice": []}, GRAMMAR, "guided_choice"),
    "1001 choices": ({"guided_choice": ["a"] * 1001}, LARGE, "guided_choice"),
    "choices of 64 KiB": ({"guided_choice": ["x" * 2**15] * 2}, LARGE, "guided_choice"),
    "guided_grammar empty": ({"guided_grammar": " "}, GRAMMAR, "guided_grammar"),
    "guided_grammar of 8 KiB + 1": ({"guided_grammar": "x" * 8193}, LARGE, "guided_grammar"),
    "json_schema number": ({"json_schema": 1.5}, TYPE, "json_schema"),
    "json_schema broken": ({"json_schema": "{"}, GRAMMAR, "json_schema"),
    "regex number": ({"regex": 1}, TYPE, "regex"),
    "grammar object": ({"grammar": {"type": "json", "value": {}}}, TYPE, "grammar"),
    "ebnf list": ({"ebnf": []}, TYPE, "ebnf"),
    "two fields": ({"guided_regex": "a", "guided_json": {}}, VALUE, "guided_regex"),
    "two fields of two kinds": ({"regex": "a", **openai({})}, VALUE, "regex"),
    "the same twice": ({"regex": "a", "guided_regex": "a"}, VALUE, "regex"),
    "three": ({"regex": "a", FORMAT: {"type": "json_object"}, **vllm(regex="a")}, VALUE, f"{OUTPUTS}.regex"),
}

NOT_COMPILED: dict[str, tuple[Fields, str, str]] = {
    "regex broken": ({"guided_regex": "(a"}, GRAMMAR, "guided_regex"),
    "regex looking around": (vllm(regex="(?=a)b"), GRAMMAR, f"{OUTPUTS}.regex"),
    "schema of nothing": (openai({"type": "integer", "minimum": 2, "maximum": 1}), GRAMMAR, f"{OPENAI}.schema"),
    "schema with an unknown keyword": ({"json_schema": {"not": {"type": "null"}}}, GRAMMAR, "json_schema"),
    "schema with a pointer to nowhere": (vllm(json={"$ref": "#/$defs/x"}), GRAMMAR, f"{OUTPUTS}.json"),
    "schema of a wrong type": ({"guided_json": {"type": "integre"}}, GRAMMAR, "guided_json"),
    "grammar without a start": ({"guided_grammar": "a: b"}, GRAMMAR, "guided_grammar"),
    "grammar broken": ({"ebnf": "root ::= ("}, GRAMMAR, "ebnf"),
    "grammar with an unknown rule": ({"grammar": "root ::= x"}, GRAMMAR, "grammar"),
}
"""What only the compiler can tell."""
