"""The bytes of every token of a model, in the form that llguidance computes masks with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from llguidance import LLTokenizer
from numpy.typing import NDArray
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from quire.config import ConfigError
from quire.engine.tokenizer import Tokenizer

Bitmask = NDArray[np.int32]
"""[ceil(vocab_size / 32)]: bit i % 32 of word i // 32 is set if token i is allowed."""


class GrammarVocabulary:
    """Made once for a process; it takes about a second and 130 MiB for a vocabulary of 128,000, holding the GIL.

    Args:
        directory: as for `Tokenizer`, whose idea of special tokens holds here too.
        vocab_size: of the model. Ids that the tokenizer lacks are padding and never allowed.
        eos_token_ids: of the model; may be empty.

    Raises:
        ConfigError: the bytes of this tokenizer's tokens cannot be told.
    """

    def __init__(self, directory: Path | str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        tokenizer = Tokenizer(directory)
        self.vocab_size = vocab_size
        self.eos_token_ids = frozenset(token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size)
        text = _with_known_decoder(tokenizer)
        num_ids = tokenizer.vocab_size
        eos = sorted(token_id for token_id in self.eos_token_ids if token_id < num_ids)
        if not eos:
            # llguidance wants an end of sequence. This one has no id of the model's, so no bit of it reaches a mask.
            text, eos, num_ids = _with_one_more_token(text), [num_ids], num_ids + 1
        self._num_ids = max(vocab_size, num_ids)
        try:
            self.backend = LLTokenizer(text, n_vocab=self._num_ids, eos_token=eos)
        except Exception as error:
            raise _unusable("llguidance cannot read it") from error
        except BaseException as error:  # a panic of the library is a BaseException of a type that it does not export
            if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
                raise
            raise _unusable("llguidance cannot read it") from error
        self.known = _bitmask(
            (token_id for token_id in range(vocab_size) if tokenizer.id_to_piece(token_id) is not None), vocab_size
        )
        """Ids that are not padding."""
        self.eos = _bitmask(self.eos_token_ids, vocab_size)

    @property
    def num_words(self) -> int:
        """Of a `Bitmask`."""
        return -(-self.vocab_size // 32)

    @property
    def num_backend_words(self) -> int:
        """Of a mask as llguidance writes it: its vocabulary may be the larger one."""
        return -(-self._num_ids // 32)

    def is_known(self, token_id: int) -> bool:
        return 0 <= token_id < self.vocab_size and bool(self.known[token_id // 32] >> (token_id % 32) & 1)


def token_ids(bitmask: Bitmask) -> NDArray[np.int64]:
    """The allowed ids, ascending."""
    return np.flatnonzero(np.unpackbits(bitmask.view(np.uint8), bitorder="little"))


def _bitmask(ids: Iterator[int] | frozenset[int], vocab_size: int) -> Bitmask:
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[np.fromiter(ids, np.int64)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _with_known_decoder(tokenizer: Tokenizer) -> str:
    """tokenizer.json with a decoder from which llguidance can tell bytes.

    It knows byte-level tokens and byte fallback. A Metaspace decoder does to a token's inner text what replacing its
    mark by a space does; what it strips from the beginning of a text is the detokenizer's matter.
    """
    text = tokenizer.to_json()
    decoders = list(_decoders(tokenizer.decoder))
    kinds = {decoder.get("type") for decoder in decoders}
    marks = [decoder.get("replacement") for decoder in decoders if decoder.get("type") == "Metaspace"]
    if "ByteLevel" in kinds or ("ByteFallback" in kinds and not marks):
        return text
    if not marks:
        raise _unusable("its decoder does not work token by token")
    content = msgspec.json.decode(text, type=dict[str, Any])
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": marks[0]}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    return msgspec.json.encode(content).decode()


def _with_one_more_token(text: str) -> str:
    backend = Backend.from_str(text)
    backend.add_special_tokens([AddedToken("<|quire: end of output|>", special=True, normalized=False)])
    return str(backend.to_str())


def _decoders(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The decoder, or the parts of a sequence."""
    if decoder is None:
        return
    if decoder.get("type") == "Sequence":
        for each in decoder.get("decoders", []):
            yield from _decoders(each)
    else:
        yield decoder


def _unusable(reason: str) -> ConfigError:
    return ConfigError(f"Structured output is not available with this model's tokenizer: {reason}.")
