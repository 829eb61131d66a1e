"""From the many names under which clients ask for structured output to the one grammar of a request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any, Final, NamedTuple

from quire.engine.grammar.compiler import GrammarCompiler, GrammarRefused
from quire.grammar import MAX_CHOICE_BYTES, MAX_SCHEMA_BYTES, Grammar, GrammarError, GrammarKind
from quire.server.body import OffLoop
from quire.server.errors import ApiError
from quire.server.schemas import CompletionRequest, ResponseFormat, StructuredOutputs

_LARGE: Final = 2**32
"""Bytes: what a parsed object takes is not known before it is written."""
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_FIELDS: Final[tuple[tuple[str, GrammarKind], ...]] = (
    ("guided_json", "json_schema"),
    ("guided_regex", "regex"),
    ("guided_choice", "choice"),
    ("guided_grammar", "grammar"),
    ("json_schema", "json_schema"),
    ("regex", "regex"),
    ("ebnf", "grammar"),
    ("grammar", "grammar"),
)
"""Constraints that are fields of the request itself: vLLM's old names, then SGLang's and llama.cpp's."""
_UNSUPPORTED_OPTIONS: Final = (
    "structural_tag",
    "whitespace_pattern",
    "disable_any_whitespace",
    "disable_additional_properties",
)


class Constraint(NamedTuple):
    """What the text must look like, and the field that says so."""

    grammar: Grammar
    param: str


class _Given(NamedTuple):
    param: str
    kind: GrammarKind
    value: Any


async def constraint_of(request: CompletionRequest, off_loop: OffLoop) -> Constraint | None:
    """The constraint of a request, if it has one. A schema of 64 KiB takes tens of milliseconds to check.

    Raises:
        ApiError: it is malformed, larger than its bounds, not supported, or there is more than one.
    """
    given = list(_all_given(request))
    if len(given) > 1:
        reason = f"{given[1].param} and {given[0].param} are two constraints on the text; only one can be followed."
        raise ApiError("invalid_value", param=given[1].param, reason=reason)
    return await off_loop(partial(_constraint, *given[0]), _LARGE) if given else None


async def check_constraint(compiler: GrammarCompiler, constraint: Constraint) -> None:
    """Return if the engine can follow the constraint; what takes long happens in another process.

    Raises:
        ApiError: it cannot.
    """
    try:
        await compiler.check(constraint.grammar)
    except GrammarRefused as error:
        raise ApiError(error.code, param=constraint.param, reason=str(error)) from None


def _all_given(request: CompletionRequest) -> Iterator[_Given]:
    if request.response_format is not None:
        yield from _of_response_format(request.response_format)
    if request.structured_outputs is not None:
        yield from _of_structured_outputs(request.structured_outputs)
    for name, kind in _FIELDS:
        if (value := getattr(request, name)) is not None:
            yield _Given(name, kind, value)


def _of_response_format(form: ResponseFormat) -> Iterator[_Given]:
    """OpenAI's; llama.cpp lets a json_object have a schema."""
    name = "response_format"
    if form.type not in ("text", "json_object", "json_schema"):
        if form.type in ("structural_tag", "grammar", "regex"):
            raise ApiError("unsupported_parameter", param=f"{name}.type", name=f"{name}.type")
        raise _invalid(f"{name}.type", f'{name}.type must be "text", "json_object" or "json_schema".')
    if form.json_schema is not None and form.type != "json_schema":
        raise _invalid(f"{name}.json_schema", f'{name}.json_schema goes with the type "json_schema" only.')
    if form.schema_object is not None and form.type != "json_object":
        raise _invalid(f"{name}.schema", f'{name}.schema goes with the type "json_object" only.')
    if form.type == "json_object":
        if form.schema_object is None:
            yield _Given(f"{name}.type", "json_object", "")
        else:
            yield _Given(f"{name}.schema", "json_schema", form.schema_object)
    elif form.type == "json_schema":
        path = f"{name}.json_schema"
        if form.json_schema is None:
            raise ApiError("missing_required_parameter", param=path, name=path)
        path = f"{path}.schema"
        if form.json_schema.schema_object is None:
            raise ApiError("missing_required_parameter", param=path, name=path)
        yield _Given(path, "json_schema", form.json_schema.schema_object)


def _of_structured_outputs(outputs: StructuredOutputs) -> Iterator[_Given]:
    """vLLM's: exactly one of its constraints."""
    name = "structured_outputs"
    for option in _UNSUPPORTED_OPTIONS:
        if getattr(outputs, option) not in (None, False):
            raise ApiError("unsupported_parameter", param=f"{name}.{option}", name=f"{name}.{option}")
    values: tuple[tuple[str, GrammarKind, Any], ...] = (
        ("json", "json_schema", outputs.json_schema),
        ("regex", "regex", outputs.regex),
        ("choice", "choice", outputs.choice),
        ("grammar", "grammar", outputs.grammar),
        ("json_object", "json_object", "" if outputs.json_object else None),
    )
    given = [_Given(f"{name}.{key}", kind, value) for key, kind, value in values if value is not None]
    if not given:
        raise _invalid(name, f"{name} must have one of json, regex, choice, grammar and json_object.")
    yield from given


def _constraint(param: str, kind: GrammarKind, value: Any) -> Constraint:
    text = value if isinstance(value, str) else _bounded_json(value)
    try:
        return Constraint(Grammar(kind, text), param)
    except GrammarError as error:
        raise ApiError(error.code, param=param, reason=str(error)) from None


def _bounded_json(value: Any) -> str:
    """JSON of a parsed value, its keys in the order in which they came: that of the output's properties. Ends where
    it is longer than any grammar may be, which the constructor of Grammar refuses before it looks at the rest."""
    parts: list[str] = []
    num_characters = 0
    for part in _ENCODER.iterencode(value):
        parts.append(part)
        num_characters += len(part)
        if num_characters > max(MAX_SCHEMA_BYTES, MAX_CHOICE_BYTES):
            break
    return "".join(parts)


def _invalid(param: str, reason: str) -> ApiError:
    return ApiError("invalid_value", param=param, reason=reason)
