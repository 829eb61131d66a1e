"""From a declared grammar to llguidance's parser for it, within limits that bound every single step."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import any_to_lark

from quire.engine.grammar.vocabulary import GrammarVocabulary
from quire.grammar import Grammar, GrammarError

WHITESPACE: Final = r"[ ]|\r?\n[ \t]{0,32}"
"""Between the parts of JSON, at most once: a model that loves spaces must not fill its whole output with them."""
MAX_LEXER_STATES: Final = 30_000
BYTES_PER_LEXER_STATE: Final = 800
_STEP_LEXER_FUEL: Final = 50_000
_STEP_MAX_ITEMS: Final = 10_000
_INITIAL_LEXER_FUEL: Final = 300_000
_MAX_GRAMMAR_SIZE: Final = 100_000
_MAX_ITEMS_IN_ROW: Final = 400
"""Of Lark, which can be ambiguous: the time of a row grows with the square of it."""
_MAX_ITEMS_IN_ROW_OF_JSON: Final = 1000
"""JSON is not ambiguous, and an object needs four items for each optional property."""

BASE_BYTES: Final = 64 * 1024
BYTES_PER_TEXT_BYTE: Final = 64
_LEXER_BYTES_PER_SECOND: Final = 75_000_000
"""The fastest growth that was measured, in a bounded string over a vocabulary of 128,000."""
_WARM_SECONDS: Final = 50e-6
"""A mask that takes no longer added little or nothing."""

_STRING_REGEX_COMMENT: Final = re.compile(
    r'"(?:\\.|[^"\\\n])*"i?|/(?!/)(?:\\.|[^/\\])+/[imslux]*|(?:#|//)[^\n]*', re.DOTALL
)
_UNSUPPORTED_OPTION: Final = re.compile(r"\b(max_tokens|temperature|stop|stop_capture)\b\s*=")
_TOO_COMPLEX: Final = re.compile(
    r"too (?:many|complex|large|big|deep|long)|size limit|nest limit|limit \d|max is|fuel|unable to determine",
    re.IGNORECASE,
)
_OPPOSITE_BOUNDS: Final = {
    "exclusiveMinimum": ("maximum", "exclusiveMaximum"),
    "exclusiveMaximum": ("minimum", "exclusiveMinimum"),
}
_KEYWORDS: Final = (
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames"),
    *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems", "unevaluatedProperties"),
    *("contentEncoding", "contentMediaType", "$dynamicRef", "$recursiveRef", "oneOf", "allOf", "minProperties"),
    *("maxProperties", "patternProperties"),
)


class CompiledGrammar:
    """A parser at its beginning, to copy from.

    Copies share a lexer: what one has computed serves the others. Its failure is shared too, and stays: a matcher that
    meets one goes on with the `successor`, or with a parser of its own to see whether the failure was its own.

    Raises:
        GrammarError: `invalid_grammar` or `grammar_too_complex`.
    """

    def __init__(self, vocabulary: GrammarVocabulary, grammar: Grammar) -> None:
        self.vocabulary = vocabulary
        self.grammar = grammar
        self.failed = False
        """A copy met a failure of the shared lexer."""
        self._successor: CompiledGrammar | None = None
        self._lexer_bytes = 0.0
        limits = LLParserLimits(
            max_items_in_row=_MAX_ITEMS_IN_ROW_OF_JSON if grammar.kind.startswith("json") else _MAX_ITEMS_IN_ROW,
            initial_lexer_fuel=_INITIAL_LEXER_FUEL,
            step_lexer_fuel=_STEP_LEXER_FUEL,
            step_max_items=_STEP_MAX_ITEMS,
            max_lexer_states=MAX_LEXER_STATES,
            max_grammar_size=_MAX_GRAMMAR_SIZE,
            verbose_errors=False,
        )
        self._pristine = LLMatcher(vocabulary.backend, _source(grammar), log_level=0, limits=limits)
        # Finds out whether the empty output is all there is.
        if not self._pristine.consume_tokens([]) or self._pristine.is_error():
            raise _refusal(grammar, self._pristine.get_error())

    @property
    def num_bytes(self) -> int:
        """An estimate from above: llguidance does not tell."""
        return int(BASE_BYTES + BYTES_PER_TEXT_BYTE * len(self.grammar.text) + self._lexer_bytes)

    @property
    def successor(self) -> CompiledGrammar:
        """The same grammar with a new lexer."""
        if self._successor is None:
            self._successor = CompiledGrammar(self.vocabulary, self.grammar)
        return self._successor

    def copy(self) -> LLMatcher:
        return self._pristine.deep_copy()

    def charge(self, seconds: float) -> None:
        """Account for the lexer states that a mask may have added: they cost time, by which their bytes are bounded."""
        if seconds > _WARM_SECONDS:
            grown = self._lexer_bytes + seconds * _LEXER_BYTES_PER_SECOND
            self._lexer_bytes = min(grown, MAX_LEXER_STATES * BYTES_PER_LEXER_STATE)


def is_lexer_failure(error: str) -> bool:
    """Whether an error of a matcher is one that its siblings share.

    A lexer that has no room for a new state also makes a token fail that was just found to be allowed.
    """
    return "lexer" in error.lower() or "satisfy the grammar" in error


def is_too_complex(error: str) -> bool:
    return _TOO_COMPLEX.search(error) is not None


def _source(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_object":
            return _json_source('{"type":"object"}')
        case "json_schema":
            return _json_source(grammar.text)
        case "regex":
            return str(LLMatcher.grammar_from_regex(grammar.text)) if grammar.text else 'start: ""'
        case "choice":
            # One terminal: the lexer finds the longest of literals that stand on their own, and would lose the others.
            return "start: CHOICE\nCHOICE: " + " | ".join(_lark_string(each) for each in json.loads(grammar.text))
        case "grammar":
            return _lark_source(grammar.text)


def _json_source(schema: str) -> str:
    _refuse_misread_bounds(json.loads(schema))
    try:
        return str(LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE}))
    except ValueError:
        raise GrammarError("invalid_grammar", "The schema is not valid.") from None


def _refuse_misread_bounds(schema: Any) -> None:
    """llguidance 1.9.1 lets an excluded whole number through if the other bound is less than one away from it.

    The depth of `schema` was bounded by the constructor of its Grammar.
    """
    if isinstance(schema, list):
        for each in schema:
            _refuse_misread_bounds(each)
    if not isinstance(schema, dict):
        return
    for excluding, names in _OPPOSITE_BOUNDS.items():
        excluded = schema.get(excluding)
        if not isinstance(excluded, (int, float)) or excluded != int(excluded):
            continue
        for other in (schema.get(name) for name in names):
            if isinstance(other, (int, float)) and abs(other - excluded) < 1:
                raise GrammarError(
                    "invalid_grammar", f"{excluding} less than one from the other bound is not supported."
                )
    for each in schema.values():
        _refuse_misread_bounds(each)


def _lark_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _lark_source(text: str) -> str:
    try:
        lark = any_to_lark(text)
    except RecursionError:
        raise GrammarError("grammar_too_complex", "The grammar is nested too deeply.") from None
    except Exception:  # the converter raises bare Exception
        reason = "The grammar is neither Lark (it has no rule named start) nor GBNF (with a rule named root)."
        raise GrammarError("invalid_grammar", reason) from None
    # These would need a model that can go back, or end a rule by counting, which rules out `rollback`.
    if found := _UNSUPPORTED_OPTION.search(_STRING_REGEX_COMMENT.sub(" ", lark)):
        raise GrammarError("invalid_grammar", f"The rule option {found[1]} is not supported.")
    return str(LLMatcher.grammar_from_lark(lark))


def _refusal(grammar: Grammar, error: str) -> GrammarError:
    """What may be said of llguidance's error, which quotes the grammar: nothing but names from our own lists."""
    if is_too_complex(error):
        return GrammarError("grammar_too_complex", "The grammar is too complex.")
    reason = "The grammar is not valid."
    if grammar.kind == "regex" or "invalid regex" in error:
        reason = "A regular expression is not valid. Look-around and word boundaries are not supported."
    elif grammar.kind == "json_schema":
        reason = "The schema is not valid, or uses what is not supported."
        if error.startswith("Unimplemented keys"):
            names = [name for name in _KEYWORDS if f'"{name}"' in error]
            reason = f"The schema uses keywords that are not supported: {', '.join(names)}." if names else reason
        elif "nsatisfiable" in error:
            reason = "No value satisfies the schema."
        elif "Unknown format" in error:
            reason = "The schema uses a format that is not supported."
        elif "oneOf" in error:
            reason = "The schema uses oneOf whose cases overlap. Use anyOf."
    return GrammarError("invalid_grammar", reason)
