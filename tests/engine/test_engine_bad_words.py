"""Bad words as tokens: with and without a space before them, each once, within bounds."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from quire.engine.tokenizer import Tokenizer, TokenizerPool, with_bad_word_ids
from quire.sampling_params import MAX_BAD_WORD_TOKENS, InvalidParameterError, SamplingParams


@pytest.fixture(scope="module", params=["byte_level_dir", "byte_fallback_dir"])
def directory(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def ids(tokenizer: Tokenizer, *words: str) -> tuple[tuple[int, ...], ...]:
    return with_bad_word_ids(SamplingParams(bad_words=words), tokenizer).bad_word_token_ids


def encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def test_each_word_with_and_without_a_space(directory: Path) -> None:
    tokenizer = Tokenizer(directory)
    for word in ("king", "lazy dog", "日本", "zq"):
        found = ids(tokenizer, word)
        assert found == (encode(tokenizer, word), encode(tokenizer, " " + word))
        assert {tokenizer.decode(token_ids).strip() for token_ids in found} == {word}
        assert tokenizer.bos_token_id not in [token_id for token_ids in found for token_id in token_ids]
        assert ids(tokenizer, " " + word, word, "  " + word) == found, "none comes twice"
    assert ids(tokenizer, "king", "dog") == ids(tokenizer, "king") + ids(tokenizer, "dog")
    assert ids(tokenizer, "\nking")[0] == encode(tokenizer, "\nking"), "only spaces are optional"


def test_spaces_alone_are_a_word_too(directory: Path) -> None:
    tokenizer = Tokenizer(directory)
    assert encode(tokenizer, " ") in ids(tokenizer, " ")


def test_no_words_change_nothing(directory: Path) -> None:
    params = SamplingParams(temperature=0.5)
    assert with_bad_word_ids(params, Tokenizer(directory)) is params


def test_words_of_many_tokens_are_refused_by_name(byte_level_dir: Path) -> None:
    tokenizer = Tokenizer(byte_level_dir)
    word = "\x01" * (MAX_BAD_WORD_TOKENS - 1)
    assert [len(token_ids) for token_ids in ids(tokenizer, word)] == [MAX_BAD_WORD_TOKENS - 1, MAX_BAD_WORD_TOKENS]
    with pytest.raises(InvalidParameterError) as error:
        ids(tokenizer, word + "\x01")
    assert error.value.param == "bad_words"


def test_pool_says_the_same_on_and_off_the_event_loop(byte_level_dir: Path) -> None:
    words = [f"word {index} of many" for index in range(100)]

    async def main() -> None:
        pool = TokenizerPool(byte_level_dir)
        try:
            for count in (1, 100):
                params = SamplingParams(bad_words=tuple(words[:count]))
                assert await pool.with_bad_word_ids(params) == with_bad_word_ids(params, pool.tokenizer)
        finally:
            pool.close()

    asyncio.run(main())
