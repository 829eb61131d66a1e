"""Matchers and the factory: masks, ends of sequence, forks, rollback, rebuilding, failure of one sequence only."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from quire.config import ConfigError
from quire.engine.grammar import compiled
from quire.engine.grammar.compiled import BASE_BYTES, CompiledGrammar
from quire.engine.grammar.factory import GrammarFactory
from quire.engine.grammar.matcher import GrammarMatcher
from quire.engine.grammar.vocabulary import Bitmask, GrammarVocabulary, token_ids
from quire.engine.tokenizer import Tokenizer
from quire.grammar import Grammar, GrammarError
from quire.tales import MODEL_DIR

TOKENIZER_SIZE = 4096
VOCAB_SIZE = TOKENIZER_SIZE + 77
EOS = (0, 3, 5)
LISTS = Grammar("json_schema", '{"type": "array", "items": {"type": "integer"}, "maxItems": 5}')
AMBIGUOUS = Grammar("grammar", 'start: s\ns: s s | "a" | s s s')
MANY_STATES = Grammar("regex", "[ab]*a[ab]{18}")


@pytest.fixture(scope="module")
def factory() -> GrammarFactory:
    return GrammarFactory(MODEL_DIR, VOCAB_SIZE, EOS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(MODEL_DIR)


def mask(matcher: GrammarMatcher, vocab_size: int = VOCAB_SIZE) -> list[int]:
    row = np.full(-(-vocab_size // 32), -1, np.int32)
    matcher.fill_bitmask(row)
    return [int(token_id) for token_id in token_ids(row)]


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def accepts(factory: GrammarFactory, tokenizer: Tokenizer, grammar: Grammar, text: str) -> bool:
    matcher = factory.create(grammar)
    return all(matcher.accept(token_id) for token_id in ids_of(tokenizer, text)) and matcher.is_accepting


def walk(matcher: GrammarMatcher, seed: int, num_tokens: int) -> list[int]:
    choose = random.Random(seed)
    for _ in range(num_tokens):
        allowed = mask(matcher)
        assert matcher.accept(choose.choice(allowed))
    return matcher.token_ids


KINDS = [
    (Grammar("json_object"), ["{}", '{"a": [1, null]}', '{\n  "a": 1\n}'], ["[]", "", "{", '{"a":   1}', "{} "]),
    (Grammar("regex", r"\d{2,3}"), ["12", "123"], ["1", "1234", "a"]),
    (Grammar("regex", r"^(cat|dog)s?$"), ["cat", "dogs"], ["cats!", "bird", " cat"]),
    (Grammar("regex", "a\n/b"), ["a\n/b"], ["a/b"]),
    (Grammar("regex", "日本|😀+"), ["日本", "😀😀"], ["日"]),
    (Grammar("regex", ""), [""], ["a"]),
    (Grammar("choice", '["a", "ab", "abc"]'), ["a", "ab", "abc"], ["", "b", "abcd", "ac"]),
    (Grammar("choice", '["", "x"]'), ["", "x"], ["xx"]),
    (
        Grammar("choice", '["yes \\"x\\"", "no\\\\", "Ω 😀", "\\u007f\\n"]'),
        ['yes "x"', "no\\", "Ω 😀", "\x7f\n"],
        ["yes", "no"],
    ),
    (Grammar("grammar", 'start: "a" INT\nINT: /[0-9]+/'), ["a1", "a12"], ["a", "1"]),
    (Grammar("grammar", 'root ::= "a" [0-9]+ ("x" | "y")?'), ["a1", "a12y"], ["a", "a1z"]),
    (Grammar("grammar", 'start: e\ne: e "+" t | t\nt: "(" e ")" | /[0-9]/'), ["1+(2+3)"], ["1+", "(1"]),
]


@pytest.mark.parametrize(("grammar", "good", "bad"), KINDS)
def test_kinds(
    factory: GrammarFactory, tokenizer: Tokenizer, grammar: Grammar, good: list[str], bad: list[str]
) -> None:
    for text in good:
        assert accepts(factory, tokenizer, grammar, text), text
    for text in bad:
        assert not accepts(factory, tokenizer, grammar, text), text


@pytest.mark.parametrize(
    "pattern", [r"[a-f]{3}-\d{2}", r"(?:ab|cd)+\.", r"-?(0|[1-9]\d*)(\.\d+)?", r"(a+)+b", r"\p{Lu}\p{Ll}*"]
)
def test_regex_walks_match(factory: GrammarFactory, tokenizer: Tokenizer, pattern: str) -> None:
    python_pattern = pattern.replace(r"\p{Lu}", "[^\\W\\d_]").replace(r"\p{Ll}", "[^\\W\\d_]")
    for seed in range(5):
        choose = random.Random(seed)
        matcher = factory.create(Grammar("regex", pattern))
        while not matcher.is_stopped:
            allowed = mask(matcher)
            ends = [token_id for token_id in allowed if token_id in EOS]
            assert matcher.accept(choose.choice(ends if ends else allowed))
        text = tokenizer.decode([token_id for token_id in matcher.token_ids if token_id not in EOS])
        assert re.fullmatch(python_pattern, text), text


def test_every_end_of_sequence_exactly_where_the_grammar_accepts(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    matcher = factory.create(Grammar("regex", "ab?"))
    assert not set(EOS) & set(mask(matcher))
    assert not any(matcher.accept(token_id) for token_id in EOS)
    assert matcher.accept(*ids_of(tokenizer, "a"))
    assert matcher.is_accepting
    assert not matcher.is_stopped
    assert set(EOS) < set(mask(matcher))
    for token_id in EOS:
        other = matcher.fork()
        assert other.accept(token_id)
        assert other.is_stopped
        assert mask(other) == list(EOS)
        assert not other.accept(*ids_of(tokenizer, "b"))
        assert other.accept(EOS[0])
    assert matcher.accept(*ids_of(tokenizer, "b"))
    assert matcher.is_stopped
    assert mask(matcher) == list(EOS)


def test_an_end_of_sequence_that_the_grammar_names_is_none_of_its_text(factory: GrammarFactory) -> None:
    matcher = factory.create(Grammar("grammar", "start: <[0-200]>"))
    assert not set(EOS) & set(mask(matcher))


def test_padding_is_never_allowed(factory: GrammarFactory) -> None:
    matcher = factory.create(Grammar("grammar", f"start: <[4000-{VOCAB_SIZE - 1}]>"))
    assert mask(matcher) == list(range(4000, TOKENIZER_SIZE))
    assert not matcher.accept(TOKENIZER_SIZE)
    assert not matcher.accept(VOCAB_SIZE)
    assert not matcher.accept(-1)


@pytest.mark.parametrize("vocab_size", [4000, 4095, 4096, 4097, 4128])
def test_vocabularies_of_any_size(tokenizer: Tokenizer, vocab_size: int) -> None:
    matcher = GrammarFactory(MODEL_DIR, vocab_size, [0]).create(Grammar("regex", "(?s:.)*"))
    allowed = mask(matcher, vocab_size)
    assert max(allowed) < min(vocab_size, TOKENIZER_SIZE)
    assert 0 in allowed
    assert len(allowed) > 3000


def test_without_an_end_of_sequence(tokenizer: Tokenizer) -> None:
    matcher = GrammarFactory(MODEL_DIR, TOKENIZER_SIZE, []).create(Grammar("regex", "a"))
    assert mask(matcher, TOKENIZER_SIZE) == ids_of(tokenizer, "a")
    assert matcher.accept(*ids_of(tokenizer, "a"))
    assert mask(matcher, TOKENIZER_SIZE) == []
    assert matcher.is_stopped
    assert not matcher.is_dead


def test_rows_must_fit(factory: GrammarFactory) -> None:
    matcher = factory.create(LISTS)
    wrong: list[Bitmask] = [np.zeros(1, np.int32), np.zeros(VOCAB_SIZE, np.int32)]
    for row in wrong:
        with pytest.raises(ValueError, match="bitmask_row"):
            matcher.fill_bitmask(row)


def test_a_fork_goes_its_own_way(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    matcher = factory.create(LISTS)
    walk(matcher, seed=1, num_tokens=4)
    before = mask(matcher)
    fork = matcher.fork()
    assert mask(fork) == before
    walk(fork, seed=2, num_tokens=3)
    assert mask(matcher) == before
    assert matcher.token_ids == fork.token_ids[:4]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("grammar", [LISTS, Grammar("json_object"), AMBIGUOUS], ids=["lists", "json", "ambiguous"])
def test_rollback_rebuild_and_preemption_are_the_same_state(
    factory: GrammarFactory, grammar: Grammar, seed: int
) -> None:
    matcher = factory.create(grammar)
    masks = [mask(matcher)]
    for step in range(12):
        matcher.accept(random.Random(seed * 100 + step).choice(masks[-1]))
        masks.append(mask(matcher))
    output = matcher.token_ids
    resumed = factory.create(grammar)
    assert resumed.rebuild(output)
    assert mask(resumed) == masks[-1]
    assert resumed.is_stopped == matcher.is_stopped
    for length in (11, 7, 3, 0):
        matcher.rollback(len(matcher.token_ids) - length)
        assert matcher.token_ids == output[:length]
        assert mask(matcher) == masks[length]
    with pytest.raises(ValueError, match="rollback"):
        matcher.rollback(1)


def test_rollback_over_an_end_of_sequence(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    matcher = factory.create(Grammar("choice", '["ab"]'))
    ids = ids_of(tokenizer, "a") + ids_of(tokenizer, "b")
    assert all(matcher.accept(token_id) for token_id in [*ids, 3, 0])
    matcher.rollback(1)
    assert mask(matcher) == list(EOS)
    matcher.rollback(2)
    assert not matcher.is_accepting
    assert mask(matcher) == ids[1:]


def test_drafts(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    matcher = factory.create(Grammar("regex", "ab+"))
    a, b = ids_of(tokenizer, "a")[0], ids_of(tokenizer, "b")[0]
    before = mask(matcher)
    assert matcher.try_tokens([]) == 0
    assert matcher.try_tokens([b]) == 0
    assert matcher.try_tokens([a, b, b, a]) == 3
    assert matcher.try_tokens([a, 0]) == 1
    assert matcher.try_tokens([a, b, 3, 0, b]) == 4
    assert matcher.try_tokens([a, TOKENIZER_SIZE + 1]) == 1
    assert mask(matcher) == before
    assert matcher.token_ids == []


def test_output_that_left_the_grammar(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    matcher = factory.create(Grammar("regex", "ab"))
    assert not matcher.rebuild(ids_of(tokenizer, "b"))
    assert matcher.is_dead
    assert mask(matcher) == []
    assert matcher.rebuild(ids_of(tokenizer, "a"))
    assert not matcher.is_dead


def test_a_grammar_without_a_way_on_is_dead_and_says_so(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    matcher = factory.create(Grammar("grammar", 'start: "a" <[0-0]> "b"'))
    healthy = factory.create(LISTS)
    assert matcher.accept(*ids_of(tokenizer, "a"))
    assert mask(matcher) == []
    assert matcher.failure is not None
    assert matcher.failure.code == "invalid_grammar"
    assert not matcher.is_stopped
    assert not matcher.is_accepting
    assert not matcher.accept(0)
    assert matcher.try_tokens([0]) == 0
    assert matcher.fork().is_dead
    assert mask(healthy)
    matcher.rollback(1)
    assert mask(matcher) == ids_of(tokenizer, "a")


def test_a_parser_that_becomes_too_complex_ends_its_own_sequence_only(
    factory: GrammarFactory, tokenizer: Tokenizer
) -> None:
    guilty, sibling = factory.create(AMBIGUOUS), factory.create(AMBIGUOUS)
    (a,) = ids_of(tokenizer, "a")
    assert sibling.accept(a)
    num_tokens = 0
    while not guilty.is_dead:
        mask(guilty)
        num_tokens += guilty.accept(a)
    assert guilty.failure is not None
    assert guilty.failure.code == "grammar_too_complex"
    assert a in mask(sibling)
    assert guilty.token_ids == [a] * num_tokens
    guilty.rollback(num_tokens - 1)
    assert mask(guilty) == mask(sibling)


def test_a_lexer_that_siblings_share_fails_for_none_but_its_user(tokenizer: Tokenizer) -> None:
    factory = GrammarFactory(MODEL_DIR, VOCAB_SIZE, EOS)
    sibling, other, guilty = (factory.create(MANY_STATES) for _ in range(3))
    output = walk(sibling, seed=0, num_tokens=3)
    before = mask(sibling)
    choose = random.Random(1)
    for _ in range(20_000):
        if guilty.is_dead:
            break
        guilty.accept(choose.choice([token_id for token_id in mask(guilty) if token_id not in EOS] or [0]))
    assert guilty.failure is not None
    assert guilty.failure.code == "grammar_too_complex"
    assert mask(sibling) == before
    assert sibling.token_ids == output
    assert other.rebuild(output)
    assert mask(other) == before
    assert factory.create(MANY_STATES).rebuild(output)


def test_compiled_grammars_are_kept_within_bytes(tokenizer: Tokenizer) -> None:
    factory = GrammarFactory(MODEL_DIR, VOCAB_SIZE, EOS, cache_bytes=5 * BASE_BYTES)
    matchers = [factory.create(Grammar("regex", f"a{{{count}}}")) for count in range(1, 20)]
    assert factory.num_bytes <= 5 * BASE_BYTES
    for count, matcher in enumerate(matchers, start=1):
        assert matcher.rebuild(ids_of(tokenizer, "a") * count)
        assert matcher.is_stopped


def test_a_lexer_that_grows_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_WARM_SECONDS", 0.0)  # however fast this machine is
    vocabulary = GrammarVocabulary(MODEL_DIR, VOCAB_SIZE, EOS)
    grammar = CompiledGrammar(vocabulary, Grammar("regex", ".*a.{15}"))
    before = grammar.num_bytes
    walk(GrammarMatcher(grammar), seed=0, num_tokens=10)
    assert grammar.num_bytes > before


def test_time_that_adds_no_lexer_state_is_not_charged() -> None:
    grammar = CompiledGrammar(GrammarVocabulary(MODEL_DIR, VOCAB_SIZE, EOS), Grammar("regex", "a+"))
    before = grammar.num_bytes
    grammar.charge(20e-6)
    assert grammar.num_bytes == before
    grammar.charge(1e-3)
    assert grammar.num_bytes == before + 75_000


INVALID = [
    (Grammar("regex", "(?=a)b"), "invalid_grammar"),
    (Grammar("regex", "a("), "invalid_grammar"),
    (Grammar("regex", "[zebra"), "invalid_grammar"),
    (Grammar("grammar", "zebra"), "invalid_grammar"),
    (Grammar("grammar", "start: zebra"), "invalid_grammar"),
    (Grammar("grammar", "root ::= " + "(" * 4000 + '"a"'), "grammar_too_complex"),
    (Grammar("grammar", "start: x\nx[max_tokens=4]: /zebra/"), "invalid_grammar"),
    (Grammar("grammar", "start: x\nx[temperature=0.5]: /zebra/"), "invalid_grammar"),
    (Grammar("grammar", 'start: x "b"\nx[stop="a"]: /.*/'), "invalid_grammar"),
    (Grammar("json_schema", '{"type": "zebra"}'), "invalid_grammar"),
    (Grammar("json_schema", '{"type": "string", "format": "zebra"}'), "invalid_grammar"),
    (Grammar("json_schema", '{"type": "string", "pattern": "[zebra"}'), "invalid_grammar"),
    (Grammar("json_schema", '{"type": "string", "minLength": 4, "maxLength": 3}'), "invalid_grammar"),
    (Grammar("json_schema", '{"$ref": "#/$defs/zebra"}'), "invalid_grammar"),
    (Grammar("json_schema", '{"uniqueItems": true}'), "invalid_grammar"),
    (Grammar("json_schema", '{"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}'), "invalid_grammar"),
    (Grammar("json_schema", '{"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}'), "invalid_grammar"),
]


@pytest.mark.parametrize(("grammar", "code"), INVALID)
def test_refused_without_an_echo(factory: GrammarFactory, grammar: Grammar, code: str) -> None:
    with pytest.raises(GrammarError) as caught:
        factory.create(grammar)
    assert caught.value.code == code
    assert "zebra" not in str(caught.value)


def test_unsupported_keywords_are_named(factory: GrammarFactory) -> None:
    with pytest.raises(GrammarError, match="uniqueItems"):
        factory.create(Grammar("json_schema", '{"uniqueItems": true}'))


def test_names_of_options_in_text_are_no_options(factory: GrammarFactory, tokenizer: Tokenizer) -> None:
    grammar = Grammar("grammar", 'start: "stop=" x // max_tokens=3\nx: /temperature=\\//')
    assert accepts(factory, tokenizer, grammar, "stop=temperature=/")


@pytest.mark.parametrize("name", ["byte_level_dir", "byte_fallback_dir", "unigram_dir"])
def test_tokenizers_of_other_kinds(request: pytest.FixtureRequest, name: str) -> None:
    directory: Path = request.getfixturevalue(name)
    tokenizer = Tokenizer(directory)
    vocab_size = tokenizer.vocab_size + 5
    eos = tokenizer.eos_token_id
    assert eos is not None
    factory = GrammarFactory(directory, vocab_size, [eos])
    grammar = Grammar("choice", json.dumps(["The quick brown fox", "a king", "the lazy dog"]))
    texts = set()
    for seed in range(20):
        choose = random.Random(seed)
        matcher = factory.create(grammar)
        while not matcher.is_stopped:
            matcher.accept(choose.choice(mask(matcher, vocab_size)))
        texts.add(tokenizer.decode(matcher.token_ids))
    assert texts == set(json.loads(grammar.text))


def test_a_tokenizer_that_cannot_be_used_says_so(word_piece_dir: Path) -> None:
    with pytest.raises(ConfigError, match="Structured output is not available"):
        GrammarVocabulary(word_piece_dir, 300, [0])
    with pytest.raises(GrammarError) as caught:
        GrammarFactory(word_piece_dir, 300, [0]).create(LISTS)
    assert caught.value.code == "structured_output_unavailable"
