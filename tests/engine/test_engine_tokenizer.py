"""Token ids equal to transformers', errors that say what to do, and tokenizing that never stops the event loop."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Awaitable
from pathlib import Path

import pytest
import tokenizers
import transformers

from quire.config import ConfigError
from quire.engine import tokenizer as tokenizer_module
from quire.engine.tokenizer import Tokenizer, TokenizerPool
from quire.sampling_params import InvalidParameterError

TEXTS = [
    "",
    " ",
    "Once upon a time",
    " leading and trailing ",
    "Grüße, naïve façade e\u0301",
    "日本語 中文 한국어",
    "👨‍👩‍👧‍👦 👍🏽 🏳️‍🌈",
    "a\tb\n\n  c\u00a0d\u200be",
    "\x00\x01\x7f",
    "<|im_start|>user <tool call> </s><s> <|endoftext|>",
]


@pytest.fixture(params=["byte_level_dir", "byte_fallback_dir"])
def directory(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("parse_special", [True, False])
def test_equal_to_transformers(directory: Path, add_special_tokens: bool, parse_special: bool) -> None:
    ours = Tokenizer(directory)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens, parse_special)
        options = {"add_special_tokens": add_special_tokens, "split_special_tokens": not parse_special}
        assert ids == theirs.encode(text, **options)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.bos_token, ours.bos_token_id) == (theirs.bos_token, theirs.bos_token_id)
    assert (ours.eos_token, ours.eos_token_id) == (theirs.eos_token, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids >= set(theirs.all_special_ids)


def test_special_tokens_in_text(byte_level_dir: Path) -> None:
    tokenizer = Tokenizer(byte_level_dir)
    text = "<|im_start|>x"
    assert tokenizer.encode(text)[:2] == [tokenizer.bos_token_id, tokenizer.piece_to_id("<|im_start|>")]
    as_text = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert not tokenizer.special_ids & set(as_text)
    assert tokenizer.decode(as_text) == text
    assert tokenizer.encode(text)[1] in tokenizer.special_ids, "the flag of one call must not outlive it"


def test_token_named_special_by_the_configuration_is_special(byte_level_dir: Path, tmp_path: Path) -> None:
    shutil.copy(byte_level_dir / "tokenizer.json", tmp_path)
    plain = Tokenizer(tmp_path)
    token_id = plain.piece_to_id("<tool call>")
    assert token_id not in plain.special_ids
    assert plain.eos_token is plain.eos_token_id is None
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<tool call>"}}))
    named = Tokenizer(tmp_path)
    assert named.eos_token_id == token_id
    assert token_id in named.special_ids
    assert named.vocab_size == plain.vocab_size
    assert named.decode([token_id or 0]) == ""


def test_truncation_and_padding_in_the_file_are_off(byte_level_dir: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(byte_level_dir / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "a b c d e f g h i j"
    assert Tokenizer(tmp_path).encode(text) == Tokenizer(byte_level_dir).encode(text)


def test_bad_files_are_configuration_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json.*save_pretrained"):
        Tokenizer(tmp_path)
    for content in ("", "{}", "[1]", '{"model": {"type": "Nothing"}}', "\x00"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ConfigError, match="cannot be read as a tokenizer") as caught:
            Tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{", '"x"', "\udcff"])
def test_bad_tokenizer_config_is_a_configuration_error(byte_level_dir: Path, tmp_path: Path, content: str) -> None:
    shutil.copy(byte_level_dir / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is not a JSON object"):
        Tokenizer(tmp_path)


def test_lone_surrogate_and_impossible_ids_are_refused(directory: Path) -> None:
    tokenizer = Tokenizer(directory)
    with pytest.raises(InvalidParameterError, match="lone surrogate"):
        tokenizer.encode("a\ud800b")
    for token_id in (-1, 2**32):
        with pytest.raises(InvalidParameterError, match="Token ids"):
            tokenizer.decode([5, token_id])
        assert tokenizer.id_to_piece(token_id) is None
    assert tokenizer.decode([2**32 - 1]) == ""
    assert tokenizer.id_to_piece(2**31) is None


async def longest_freeze(work: Awaitable[object]) -> tuple[float, float]:
    """Seconds for which the event loop stood still while `work` ran, and how long that took."""
    task = asyncio.ensure_future(work)
    begin = last = time.perf_counter()
    longest = 0.0
    while not task.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    await task
    return longest, time.perf_counter() - begin


def test_long_text_leaves_the_event_loop_free(byte_level_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(chr(97 + (i * i) % 26) + (" " if i % 7 == 0 else "") for i in range(600_000))

    def hold_the_lock(
        self: Tokenizer, text: str, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        return list(self._backend.encode(text).ids)

    async def run() -> tuple[float, float]:
        pool = TokenizerPool(byte_level_dir)
        await pool.encode("warm up " * 100)
        try:
            return await longest_freeze(pool.encode(text))
        finally:
            pool.close()

    freeze, total = asyncio.run(run())
    assert freeze < max(0.1, total / 4)
    monkeypatch.setattr(Tokenizer, "encode", hold_the_lock)
    freeze, total = asyncio.run(run())
    assert freeze > total / 2, "the planted fault, an encoder that keeps the interpreter lock, must be seen"


def test_pool_equals_one_tokenizer_under_load(directory: Path) -> None:
    tokenizer = Tokenizer(directory)
    texts = [f"{i} {text} " * 40 for i in range(15) for text in TEXTS]
    threads: set[int] = set()

    async def run() -> None:
        pool = TokenizerPool(directory)
        assert pool.tokenizer is not None
        flags = [bool(i % 2) for i in range(len(texts))]
        ids = await asyncio.gather(*(pool.encode(text, True, flag) for text, flag in zip(texts, flags, strict=True)))
        assert ids == [tokenizer.encode(text, True, flag) for text, flag in zip(texts, flags, strict=True)]
        decoded = await asyncio.gather(*(pool.decode(i) for i in ids))
        assert decoded == [tokenizer.decode(i) for i in ids]
        threads.update(thread.ident or 0 for thread in threading.enumerate() if "quire-tokenizer" in thread.name)
        pool.close()
        pool.close()

    asyncio.run(run())
    assert len(threads) == 2


def test_cancelled_and_failing_work_concerns_its_caller_alone(
    byte_level_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokenizer.encode
    release = threading.Event()

    def slow_or_failing(
        self: Tokenizer, text: str, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        if text.startswith("slow"):
            release.wait(10)
        if text.startswith("fail"):
            raise RuntimeError("a bug in the tokenizer")
        return encode(self, text, add_special_tokens, parse_special)

    monkeypatch.setattr(Tokenizer, "encode", slow_or_failing)
    padding = "x" * tokenizer_module.INLINE_CHARS

    async def run() -> None:
        pool = TokenizerPool(byte_level_dir)
        slow = [asyncio.create_task(pool.encode("slow" + padding)) for _ in range(2)]
        queued = asyncio.create_task(pool.encode("queued" + padding))
        await asyncio.sleep(0.05)
        assert await pool.encode("short") == encode(pool.tokenizer, "short")
        for task in (*slow, queued):
            task.cancel()
        assert all(
            isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*slow, queued, return_exceptions=True)
        )
        release.set()
        with pytest.raises(RuntimeError, match="a bug"):
            await pool.encode("fail" + padding)
        assert await pool.encode("fine" + padding) == encode(pool.tokenizer, "fine" + padding)
        pool.close()

    asyncio.run(run())
