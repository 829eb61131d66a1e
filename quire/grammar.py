"""What the text of a request must look like. The constructor checks every bound that needs no compiler. A leaf."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "grammar"]

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 16
"""Nested schemas; what maps names to schemas ("properties", "$defs") is not a level of its own."""
MAX_SCHEMA_NODES = 1024
"""Schemas within a schema, itself included."""
MAX_ENUM_VALUES = 1000
"""In all enums of a schema together."""
MAX_REGEX_BYTES = 1024
MAX_GRAMMAR_BYTES = 8 * 1024
MAX_CHOICES = 1000
MAX_CHOICE_BYTES = 64 * 1024
MAX_JSON_DEPTH = 64

_MAX_BYTES: dict[str, int] = {
    "json_object": 0,
    "json_schema": MAX_SCHEMA_BYTES,
    "regex": MAX_REGEX_BYTES,
    "choice": MAX_CHOICE_BYTES,
    "grammar": MAX_GRAMMAR_BYTES,
}
_NAMES = {"json_schema": "schema", "regex": "regular expression", "choice": "list of choices", "grammar": "grammar"}
_MAPS_OF_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_DATA = frozenset({"const", "enum", "default", "examples"})
_COMPILER_OPTIONS = "x-guidance"
_MAX_NUMBER_DIGITS = 400


class GrammarError(ValueError):
    """A grammar that cannot be used. `code` is that of the API; the message never echoes the grammar."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Grammar:
    """One constraint on the whole output of a request.

    `text` by kind: "json_object": empty; "json_schema": JSON of the schema, an object; "regex": Rust syntax without
    look-around, matched against the whole output; "choice": JSON list of strings; "grammar": Lark or GBNF.

    Raises:
        GrammarError: `invalid_grammar` or `grammar_too_large`.
    """

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise GrammarError("invalid_grammar", "The kind of grammar is not known.")
        if not isinstance(self.text, str):
            raise GrammarError("invalid_grammar", "The text of a grammar must be a string.")
        if self.kind == "json_object":
            if self.text:
                raise GrammarError("invalid_grammar", "A grammar for any JSON object takes no text.")
            return
        _check_size(self.text, self.kind)
        if self.kind == "json_schema":
            _check_schema(_parse(self.text, "schema"))
        elif self.kind == "choice":
            _check_choices(_parse(self.text, "list of choices"))
        elif self.kind == "grammar" and not self.text.strip():
            raise GrammarError("invalid_grammar", "The grammar is empty.")

    @property
    def digest(self) -> bytes:
        """Equal for equal grammars only."""
        return hashlib.sha256(f"{self.kind}\0{self.text}".encode()).digest()


def _check_size(text: str, kind: str) -> None:
    limit = _MAX_BYTES[kind]
    try:
        size = len(text) if len(text) > limit else len(text.encode())
    except UnicodeEncodeError:
        raise GrammarError(
            "invalid_grammar", f"The {_NAMES[kind]} holds a lone surrogate: it is not Unicode."
        ) from None
    if size > limit:
        raise GrammarError("grammar_too_large", f"The {_NAMES[kind]} must not have more than {limit} bytes.")


def _parse(text: str, name: str) -> Any:
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_finite,
        )
    except RecursionError:
        raise GrammarError("grammar_too_large", f"The {name} is nested too deeply.") from None
    except GrammarError:
        raise
    except ValueError:
        raise GrammarError("invalid_grammar", f"The {name} is not JSON.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise GrammarError("invalid_grammar", "An object of the schema names a key twice.")
    return result


def _refuse_constant(_: str) -> float:
    raise GrammarError("invalid_grammar", "NaN and Infinity are not JSON.")


def _integer(digits: str) -> int:
    if len(digits) > _MAX_NUMBER_DIGITS:
        raise GrammarError("grammar_too_large", f"A number must not have more than {_MAX_NUMBER_DIGITS} digits.")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")) or len(digits) > _MAX_NUMBER_DIGITS:
        raise GrammarError("grammar_too_large", "A number is too large.")
    return value


def _check_schema(schema: Any) -> None:
    if not isinstance(schema, dict):
        raise GrammarError("invalid_grammar", "The schema must be a JSON object.")
    if _COMPILER_OPTIONS in schema:
        raise GrammarError("invalid_grammar", f"{_COMPILER_OPTIONS} is not supported.")
    num_nodes = num_enum_values = 0
    # (value, level of the schema it belongs to, level of JSON, whether its keys are names, whether it is data)
    stack: list[tuple[Any, int, int, bool, bool]] = [(schema, 0, 1, False, False)]
    while stack:
        value, depth, json_depth, is_map, is_data = stack.pop()
        if json_depth > MAX_JSON_DEPTH:
            raise GrammarError("grammar_too_large", f"JSON must not be nested deeper than {MAX_JSON_DEPTH} levels.")
        if isinstance(value, str):
            _check_unicode(value)
        elif isinstance(value, list):
            stack += [(each, depth, json_depth + 1, False, is_data) for each in value]
        elif isinstance(value, dict):
            if not is_map:
                depth, num_nodes = depth + 1, num_nodes + 1
            if depth > MAX_SCHEMA_DEPTH:
                raise GrammarError("grammar_too_large", f"Schemas must not be nested deeper than {MAX_SCHEMA_DEPTH}.")
            if num_nodes > MAX_SCHEMA_NODES:
                raise GrammarError("grammar_too_large", f"A schema must not hold more than {MAX_SCHEMA_NODES} schemas.")
            for key, each in value.items():
                _check_unicode(key)
                if is_map or is_data:
                    stack.append((each, depth, json_depth + 1, False, is_data))
                    continue
                if key == "enum" and isinstance(each, list):
                    num_enum_values += len(each)
                elif key == "$ref":
                    _check_reference(each)
                stack.append((each, depth, json_depth + 1, key in _MAPS_OF_SCHEMAS, key in _DATA))
    if num_enum_values > MAX_ENUM_VALUES:
        raise GrammarError(
            "grammar_too_large", f"The enums of a schema must not have more than {MAX_ENUM_VALUES} values."
        )


def _check_reference(reference: Any) -> None:
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise GrammarError("invalid_grammar", "$ref must point into the schema itself, as #/$defs/name does.")


def _check_choices(choices: Any) -> None:
    if not isinstance(choices, list) or not choices or not all(isinstance(each, str) for each in choices):
        raise GrammarError("invalid_grammar", "choice must be a list of one string or more.")
    if len(choices) > MAX_CHOICES:
        raise GrammarError("grammar_too_large", f"choice takes at most {MAX_CHOICES} strings.")
    for each in choices:
        _check_unicode(each)


def _check_unicode(text: str) -> None:
    """JSON can spell a lone surrogate by an escape that is itself plain ASCII."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise GrammarError("invalid_grammar", "A string of the grammar holds a lone surrogate: it is not Unicode.")
