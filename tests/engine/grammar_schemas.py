"""A hundred JSON schemas of increasing difficulty, as data."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def an_object(properties: Schema, *, required: list[str] | None = None, **more: Any) -> Schema:
    """Closed, and all of it required unless told otherwise."""
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False, **more}


def a_list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, "maxItems": 3, **more}


INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
SHORT: Schema = {"type": "string", "maxLength": 8}

TYPES: dict[str, Schema] = {
    "string": STRING,
    "integer": INTEGER,
    "number": NUMBER,
    "boolean": BOOLEAN,
    "null": NULL,
    "any_array": {"type": "array", "maxItems": 2, "items": {"type": ["string", "null"]}},
    "any_object": {"type": "object", "additionalProperties": INTEGER},
    "two_types": {"type": ["integer", "string"]},
    "nullable_string": {"type": ["string", "null"]},
    "five_types": {"type": ["integer", "string", "boolean", "null", "number"]},
    "described": {"title": "A", "description": "A name.", "type": "string", "examples": ["x"], "default": "y"},
    "draft_named": {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "boolean"},
}
VALUES: dict[str, Schema] = {
    "enum_strings": {"enum": ["red", "green", "blue"]},
    "enum_prefixes": {"enum": ["a", "ab", "abc", "abcd"]},
    "enum_mixed": {"enum": ["one", 1, None, True, [1, 2], {"a": "b"}]},
    "enum_typed": {"type": "string", "enum": ["yes", "no"]},
    "enum_many": {"enum": [f"value {index}" for index in range(1000)]},
    "enum_unicode": {"enum": ["Köln", "東京", "👋🏽", "naïve façade", "Ω"]},
    "enum_quotes": {"enum": ['say "hi"', "back\\slash", "line\nbreak", "tab\t", "/"]},
    "const_string": {"const": "fixed"},
    "const_number": {"const": 42},
    "const_object": {"const": {"a": [1, {"b": None}]}},
    "const_empty": {"const": ""},
    "const_unicode": {"const": "ключ → 値"},
}
NUMBERS: dict[str, Schema] = {
    "minimum": {"type": "integer", "minimum": 0},
    "maximum": {"type": "integer", "maximum": -5},
    "range": {"type": "integer", "minimum": 1, "maximum": 100},
    "range_negative": {"type": "integer", "minimum": -17, "maximum": 5},
    "range_of_one": {"type": "integer", "minimum": 7, "maximum": 7},
    "exclusive": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10},
    "range_large": {"type": "integer", "minimum": 999, "maximum": 1000001},
    "number_range": {"type": "number", "minimum": 0, "maximum": 1},
    "number_range_decimal": {"type": "number", "minimum": -1.5, "maximum": 2.25},
    "number_exclusive": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 2.5},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000},
    "multiple_of_seven": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 10000},
}
STRINGS: dict[str, Schema] = {
    "min_length": {"type": "string", "minLength": 3},
    "max_length": {"type": "string", "maxLength": 5},
    "length_range": {"type": "string", "minLength": 2, "maxLength": 4},
    "length_of_one": {"type": "string", "minLength": 1, "maxLength": 1},
    "length_long": {"type": "string", "minLength": 50, "maxLength": 60},
    "empty_string": {"type": "string", "maxLength": 0},
    "pattern": {"type": "string", "pattern": "^[a-z]+$"},
    "pattern_phone": {"type": "string", "pattern": "^\\([0-9]{3}\\) [0-9]{3}-[0-9]{4}$"},
    "pattern_inside": {"type": "string", "pattern": "[aeiou][^aeiou]"},
    "pattern_choice": {"type": "string", "pattern": "^(cat|dog|bird)s?$"},
    "pattern_date": {"type": "string", "pattern": "^[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]$"},
    "pattern_unicode": {"type": "string", "pattern": "^[äöü]{2,4}$"},
    "pattern_with_length": {"type": "string", "pattern": "^[a-c]*$", "minLength": 2, "maxLength": 6},
    "format_date": {"type": "string", "format": "date"},
    "format_date_time": {"type": "string", "format": "date-time"},
    "format_time": {"type": "string", "format": "time"},
    "format_duration": {"type": "string", "format": "duration"},
    "format_email": {"type": "string", "format": "email"},
    "format_ipv4": {"type": "string", "format": "ipv4"},
    "format_ipv6": {"type": "string", "format": "ipv6"},
    "format_uuid": {"type": "string", "format": "uuid"},
    "format_hostname": {"type": "string", "format": "hostname"},
}
ARRAYS: dict[str, Schema] = {
    "array_of_integers": a_list(INTEGER),
    "array_min": a_list(BOOLEAN, minItems=2),
    "array_exact": {"type": "array", "items": NULL, "minItems": 4, "maxItems": 4},
    "array_empty": {"type": "array", "items": STRING, "maxItems": 0},
    "array_of_arrays": a_list(a_list(a_list(INTEGER))),
    "array_of_enums": a_list({"enum": ["a", "b"]}, minItems=1),
    "tuple": {"type": "array", "prefixItems": [INTEGER, SHORT, BOOLEAN], "items": False, "minItems": 3},
    "tuple_open": {"type": "array", "prefixItems": [INTEGER, SHORT], "items": NULL, "minItems": 2, "maxItems": 5},
    "tuple_partial": {"type": "array", "prefixItems": [BOOLEAN, BOOLEAN, BOOLEAN], "items": False},
    "array_of_tuples": a_list({"type": "array", "prefixItems": [NUMBER, NUMBER], "items": False, "minItems": 2}),
}
OBJECTS: dict[str, Schema] = {
    "one_property": an_object({"name": STRING}),
    "all_optional": an_object({"a": INTEGER, "b": BOOLEAN, "c": NULL}, required=[]),
    "some_optional": an_object({"a": INTEGER, "b": SHORT, "c": NULL}, required=["b"]),
    "required_undeclared": {"type": "object", "required": ["x"], "additionalProperties": BOOLEAN},
    "open_object": {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": SHORT},
    "empty_object": an_object({}),
    "strange_names": an_object({"with space": NULL, 'qu"ote': NULL, "é": NULL, "": NULL, "a\\b": NULL}),
    "nested": an_object({"a": an_object({"b": an_object({"c": an_object({"d": INTEGER})})})}),
    "nested_deep": an_object({"v": INTEGER}),
    "with_lists": an_object({"tags": a_list(SHORT), "scores": a_list(NUMBER, minItems=1)}),
    "hundred_properties": an_object({f"field_{index}": BOOLEAN for index in range(100)}),
    "fifty_optional": an_object({f"field_{index}": NULL for index in range(50)}, required=[]),
    "pattern_properties": {
        "type": "object",
        "patternProperties": {"^x-[a-z]{1,5}$": INTEGER},
        "additionalProperties": False,
    },
    "property_named_as_keyword": an_object({"properties": INTEGER, "enum": SHORT, "$ref": NULL, "type": BOOLEAN}),
}
for _ in range(12):
    OBJECTS["nested_deep"] = an_object({"v": OBJECTS["nested_deep"]})

COMBINED: dict[str, Schema] = {
    "any_of": {"anyOf": [INTEGER, BOOLEAN, {"type": "string", "maxLength": 3}]},
    "any_of_objects": {
        "anyOf": [
            an_object({"kind": {"const": "circle"}, "radius": NUMBER}),
            an_object({"kind": {"const": "square"}, "side": NUMBER}),
        ]
    },
    "one_of_disjoint": {"oneOf": [INTEGER, BOOLEAN, NULL]},
    "all_of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    "all_of_objects": {
        "allOf": [
            {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
            {"properties": {"b": BOOLEAN}, "required": ["b"]},
        ],
        "properties": {"a": True, "b": True},
        "additionalProperties": NULL,
    },
    "any_of_with_sibling": {"type": "integer", "anyOf": [{"maximum": 3}, {"minimum": 90, "maximum": 99}]},
    "reference": {
        "$defs": {"name": SHORT},
        **an_object({"a": {"$ref": "#/$defs/name"}, "b": {"$ref": "#/$defs/name"}}),
    },
    "definitions": {"definitions": {"n": INTEGER}, "$ref": "#/definitions/n"},
    "reference_chain": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/c"}, "c": NULL},
        "$ref": "#/$defs/a",
    },
    "linked_list": {
        "$defs": {"node": an_object({"v": BOOLEAN, "next": {"anyOf": [NULL, {"$ref": "#/$defs/node"}]}})},
        "$ref": "#/$defs/node",
    },
    "tree": {
        "$defs": {"node": an_object({"v": BOOLEAN, "children": a_list({"$ref": "#/$defs/node"}, maxItems=2)})},
        "$ref": "#/$defs/node",
    },
    "recursive_root": an_object({"v": NULL, "child": {"$ref": "#"}}, required=["v"]),
    "mutual_recursion": {
        "$defs": {
            "even": {"anyOf": [NULL, an_object({"odd": {"$ref": "#/$defs/odd"}})]},
            "odd": an_object({"even": {"$ref": "#/$defs/even"}}),
        },
        "$ref": "#/$defs/even",
    },
    "expression": {
        "$defs": {
            "expression": {
                "anyOf": [
                    {"type": "integer", "minimum": 0, "maximum": 9},
                    an_object({"op": {"enum": ["+", "*"]}, "args": a_list({"$ref": "#/$defs/expression"}, maxItems=2)}),
                ]
            }
        },
        "$ref": "#/$defs/expression",
    },
    "tool_call": an_object(
        {
            "name": {"enum": ["get_weather", "get_time"]},
            "arguments": an_object(
                {"city": SHORT, "unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "maximum": 7}}
            ),
        }
    ),
    "invoice": an_object(
        {
            "id": {"type": "string", "format": "uuid"},
            "date": {"type": "string", "format": "date"},
            "customer": an_object({"name": SHORT, "email": {"type": "string", "format": "email"}}, required=["name"]),
            "lines": a_list(
                an_object(
                    {
                        "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
                        "count": {"type": "integer", "minimum": 1},
                    }
                ),
                minItems=1,
            ),
            "paid": BOOLEAN,
            "note": {"anyOf": [SHORT, NULL]},
        }
    ),
    "geometry": an_object(
        {
            "type": {"const": "Feature"},
            "geometry": {
                "anyOf": [
                    an_object({"type": {"const": "Point"}, "coordinates": {"$ref": "#/$defs/position"}}),
                    an_object(
                        {
                            "type": {"const": "LineString"},
                            "coordinates": a_list({"$ref": "#/$defs/position"}, minItems=2),
                        }
                    ),
                ]
            },
        },
        **{"$defs": {"position": {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2}}},
    ),
    "unicode_everywhere": an_object(
        {"名前": {"enum": ["山田", "佐藤"]}, "città": {"type": "string", "pattern": "^(Forlì|Köln)$"}}
    ),
}

SCHEMAS: dict[str, Schema] = {**TYPES, **VALUES, **NUMBERS, **STRINGS, **ARRAYS, **OBJECTS, **COMBINED}
