"""Random walks through a hundred schemas: whatever ends is valid, by an independent validator."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from quire.engine.grammar.factory import GrammarFactory
from quire.engine.grammar.matcher import GrammarMatcher
from quire.engine.grammar.vocabulary import token_ids
from quire.engine.tokenizer import Tokenizer
from quire.grammar import Grammar
from quire.tales import MODEL_DIR
from tests.engine.grammar_schemas import SCHEMAS

MAX_TOKENS = 3000
NUM_WALKS = 4
CLOSERS = '"}]@'
FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER


@pytest.fixture(scope="module", params=["byte_level_bpe", "byte_fallback"])
def sampler(request: pytest.FixtureRequest) -> RandomSampler:
    directory = MODEL_DIR if request.param == "byte_level_bpe" else request.getfixturevalue("byte_fallback_dir")
    return RandomSampler(directory)


class RandomSampler:
    """A model that finds all allowed tokens equally likely, but likes single characters and to come to an end."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer(directory)
        eos = self.tokenizer.eos_token_id
        self.eos = 0 if eos is None else eos
        self.vocab_size = self.tokenizer.vocab_size + 50
        self.factory = GrammarFactory(directory, self.vocab_size, [self.eos])
        self.factory.warm_up()
        closers = (self.tokenizer.encode(each, add_special_tokens=False)[-1] for each in CLOSERS)
        self.closers = np.array([*closers, self.eos])
        is_character = (len(self.tokenizer.decode([token_id])) == 1 for token_id in range(self.vocab_size))
        self.characters = np.flatnonzero(np.fromiter(is_character, np.bool_))

    def run(self, matcher: GrammarMatcher, seed: int) -> str | None:
        choose = random.Random(seed)
        row = np.empty(-(-self.vocab_size // 32), np.int32)
        output: list[int] = []
        for step in range(MAX_TOKENS):
            matcher.fill_bitmask(row)
            assert matcher.failure is None, (matcher.failure, self.tokenizer.decode(output))
            allowed = token_ids(row)
            assert len(allowed)
            assert int(allowed[-1]) < self.tokenizer.vocab_size, "padding is never allowed"
            assert (self.eos in allowed) == matcher.is_accepting
            ending = np.intersect1d(allowed, self.closers)
            if len(ending) and choose.random() < 0.1 + step / 200:
                allowed = ending
            elif choose.random() < 0.5:
                characters = np.intersect1d(allowed, self.characters)
                allowed = characters if len(characters) else allowed
            token_id = int(choose.choice(allowed))
            assert matcher.accept(token_id)
            if token_id == self.eos:
                return self.tokenizer.decode(output)
            output.append(token_id)
        return None


def test_there_are_a_hundred() -> None:
    assert len(SCHEMAS) == 100


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_ends_is_valid(name: str, sampler: RandomSampler) -> None:
    schema = SCHEMAS[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
    grammar = Grammar("json_schema", json.dumps(schema))
    num_ended = 0
    for seed in range(NUM_WALKS):
        text = sampler.run(sampler.factory.create(grammar), seed)
        if text is not None:
            num_ended += 1
            value = json.loads(text, object_pairs_hook=_unique_if_closed(schema))
            assert validator.is_valid(value), (text, [error.message for error in validator.iter_errors(value)])
    assert num_ended == NUM_WALKS


def test_any_json_object(sampler: RandomSampler) -> None:
    for seed in range(10):
        text = sampler.run(sampler.factory.create(Grammar("json_object")), seed)
        assert text is not None
        assert isinstance(json.loads(text), dict)


def test_the_check_catches_a_planted_fault(sampler: RandomSampler) -> None:
    grammar = Grammar("json_schema", '{"type": "integer", "minimum": 0, "maximum": 20}')
    validator = jsonschema.Draft202012Validator({"type": "integer", "minimum": 0, "maximum": 9})
    texts = [sampler.run(sampler.factory.create(grammar), seed) for seed in range(20)]
    assert not all(validator.is_valid(json.loads(text)) for text in texts if text is not None)


def _unique_if_closed(schema: dict[str, object]) -> object:
    """Declared names come once; names that a schema leaves open may come again, which llguidance does not prevent."""
    if schema.get("additionalProperties") is not False:
        return None

    def hook(pairs: list[tuple[str, object]]) -> dict[str, object]:
        assert len(dict(pairs)) == len(pairs) or "patternProperties" in schema
        return dict(pairs)

    return hook
