"""Text to token ids and back, from a checkpoint's tokenizer.json, without transformers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from quire.config import ConfigError
from quire.sampling_params import InvalidParameterError, SamplingParams

INLINE_CHARS = 256
"""Texts up to this length are encoded on the event loop: below 100 us, less than a thread's round trip."""
INLINE_TOKENS = 256
_MAX_TOKEN_ID = 2**32 - 1
_NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class _TokenizerFile(msgspec.Struct):
    """The one part of tokenizer.json that the `tokenizers` library does not show."""

    decoder: dict[str, Any] | None = None


class Tokenizer:
    """One tokenizer object. Not shared between threads: `parse_special` sets a flag of the underlying object.

    Special tokens are added to a prompt as the `post_processor` of tokenizer.json says, which is what transformers does
    for the same file (`add_bos_token` in tokenizer_config.json has no effect there either). Truncation and padding that
    the file asks for are switched off: a prompt is never shortened in silence.

    Args:
        directory: holds tokenizer.json and, for the names of special tokens, tokenizer_config.json or
            special_tokens_map.json.

    Raises:
        ConfigError: tokenizer.json is missing, or a file cannot be read.
    """

    def __init__(self, directory: Path | str) -> None:
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"{directory} has no tokenizer.json. Quire reads only this format; write it with "
                "transformers: AutoTokenizer.from_pretrained(directory).save_pretrained(directory)."
            )
        try:
            data = path.read_bytes()
            backend = Backend.from_buffer(data)
            self.decoder: dict[str, Any] | None = msgspec.json.decode(data, type=_TokenizerFile).decoder
        except Exception as error:  # the library raises bare Exception for a file that it cannot use
            raise ConfigError(f"{path} cannot be read as a tokenizer: {_first_line(error)}") from error
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        names = _special_token_names(directory)
        self._mark_special(list(names.values()))
        self._special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.bos_token, self.eos_token = names.get("bos_token"), names.get("eos_token")
        self.pad_token = names.get("pad_token")

    @property
    def vocab_size(self) -> int:
        """Added tokens included; a model's vocabulary may be larger, by padding."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids whose text `skip_special_tokens` leaves out."""
        return self._special_ids

    @property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self.piece_to_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self.piece_to_id(self.eos_token)

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        Args:
            add_special_tokens: let the post-processor add its tokens (usually the one that begins a text).
            parse_special: a special token spelled out in the text becomes that token, as in transformers and vLLM. Text
                that must not reach the model as control tokens (what a chat user wrote) is encoded with False.

        Raises:
            InvalidParameterError: the text holds a lone surrogate, which no tokenizer can encode.
        """
        if self._backend.encode_special_tokens == parse_special:
            self._backend.encode_special_tokens = not parse_special
        try:
            # `encode` holds the interpreter lock for as long as it works; the batch call lets go of it.
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise InvalidParameterError("prompt", "The text holds a lone surrogate: it is not Unicode.") from error
        return list(encoding.ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`, as the `tokenizers` library gives it; ids outside of the vocabulary have no text.

        Raises:
            InvalidParameterError: an id is negative or has more than 32 bits.
        """
        if not token_ids:
            return ""
        if min(token_ids) < 0 or max(token_ids) > _MAX_TOKEN_ID:
            raise InvalidParameterError("tokens", "Token ids must be from 0 to the size of the vocabulary.")
        (text,) = self._backend.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)
        return str(text)

    def id_to_piece(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token (with its stand-ins for spaces and bytes); None if there is none."""
        if not 0 <= token_id <= _MAX_TOKEN_ID:
            return None
        piece: str | None = self._backend.id_to_token(token_id)
        return piece

    def piece_to_id(self, piece: str) -> int | None:
        token_id: int | None = self._backend.token_to_id(piece)
        return token_id

    def to_json(self) -> str:
        """tokenizer.json as it is used here: no truncation, no padding, special tokens marked."""
        return str(self._backend.to_str())

    def _mark_special(self, tokens: list[str]) -> None:
        """What the configuration names as special is special, even where tokenizer.json does not say so."""
        known = {token.content for token in self._backend.get_added_tokens_decoder().values() if token.special}
        self._backend.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token in tokens
                if token not in known and self.piece_to_id(token) is not None
            ]
        )


def with_bad_word_ids(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """`params` with `bad_word_token_ids` filled in: each of `bad_words` as it is and with a space before it.

    vLLM leaves the second out where it takes another number of tokens, and so lets " word" through where "word" takes
    two; here it counts whenever it differs. Words that hold a bad one as part of a longer token are not bad.

    Raises:
        InvalidParameterError: a word takes too many tokens, or none.
    """
    if not params.bad_words:
        return params
    token_ids: dict[tuple[int, ...], None] = {}
    for word in params.bad_words:
        bare = word.lstrip(" ") or word
        for text in (bare, " " + bare):
            token_ids[tuple(tokenizer.encode(text, add_special_tokens=False))] = None
    return replace(params, bad_word_token_ids=tuple(token_ids))


class TokenizerPool:
    """Tokenizes off the event loop; one tokenizer object per thread, made when the thread gets its first text.

    A cancelled caller leaves nothing behind: work not yet begun is dropped, work in progress ends unheard.

    Args:
        directory: as for `Tokenizer`, which is loaded here once, so bad files are found at once.
        num_threads: size of the pool.

    Raises:
        ConfigError: as `Tokenizer`.
    """

    def __init__(self, directory: Path | str, num_threads: int = 2) -> None:
        self._directory = Path(directory)
        self.tokenizer = Tokenizer(directory)
        """The event loop's own object, for short texts and for detokenizing."""
        self._local = threading.local()
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="quire-tokenizer")

    async def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """As `Tokenizer.encode`."""
        if len(text) <= INLINE_CHARS:
            return self.tokenizer.encode(text, add_special_tokens, parse_special)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, lambda: self._of_this_thread().encode(text, add_special_tokens, parse_special)
        )

    async def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """As `Tokenizer.decode`."""
        if len(token_ids) <= INLINE_TOKENS:
            return self.tokenizer.decode(token_ids, skip_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._executor, lambda: self._of_this_thread().decode(token_ids, skip_special_tokens)
        )

    async def with_bad_word_ids(self, params: SamplingParams) -> SamplingParams:
        """As the function `with_bad_word_ids`."""
        if sum(map(len, params.bad_words)) <= INLINE_CHARS:
            return with_bad_word_ids(params, self.tokenizer)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: with_bad_word_ids(params, self._of_this_thread()))

    def close(self) -> None:
        """Drop what is queued; threads end with the text they are at. May be called twice."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _of_this_thread(self) -> Tokenizer:
        tokenizer: Tokenizer | None = getattr(self._local, "tokenizer", None)
        if tokenizer is None:
            tokenizer = self._local.tokenizer = Tokenizer(self._directory)
        return tokenizer


def _special_token_names(directory: Path) -> dict[str, str]:
    """Role ("bos_token") to token, from the first file that names it."""
    names: dict[str, str] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / file
        if not path.is_file():
            continue
        try:
            content = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
            raise ConfigError(f"{path} is not a JSON object: {_first_line(error)}") from error
        for role in _NAMED_SPECIAL_TOKENS:
            value = content.get(role)
            token = value.get("content") if isinstance(value, dict) else value
            if isinstance(token, str):
                names.setdefault(role, token)
    return names


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
