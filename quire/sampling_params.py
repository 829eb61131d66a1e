"""How one request chooses its tokens. The constructor is the one place where bounds are checked. A leaf."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_N = 128
MAX_STOP_STRINGS = 4
MAX_STOP_STRING_BYTES = 256
MAX_STOP_TOKEN_IDS = 128
MAX_TOP_K = 2**31 - 1


class InvalidParameterError(ValueError):
    """A request parameter is out of its bounds. `param` names the field; the message never echoes long input."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Names and defaults are those of vLLM's request body.

    Order of the chain: min_tokens mask, temperature, top_k, top_p, min_p, draw. `temperature` 0 is greedy and ignores
    the rest of the chain. `top_k` 0 or -1 is off.

    Raises:
        InvalidParameterError: a field is out of bounds.
    """

    n: int = 1
    max_tokens: int | None = 16
    """Most output tokens; `None`: what is left of the context."""
    min_tokens: int = 0
    """No end-of-sequence, stop token or stop string before so many output tokens."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    """64 bits, signed or unsigned; `None`: one is drawn at admission."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameterError("min_tokens", "min_tokens must not be larger than max_tokens.")
        _number("temperature", self.temperature, 0.0, 2.0)
        _integer("top_k", self.top_k, -1, MAX_TOP_K)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidParameterError("top_p", "top_p must be greater than 0 and at most 1.")
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidParameterError("stop", f"stop takes at most {MAX_STOP_STRINGS} strings.")
        for text in self.stop:
            if not text:
                raise InvalidParameterError("stop", "stop strings must not be empty.")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise InvalidParameterError("stop", "stop strings must be valid Unicode, without lone surrogates.")
            if len(text.encode()) > MAX_STOP_STRING_BYTES:
                raise InvalidParameterError("stop", f"a stop string takes at most {MAX_STOP_STRING_BYTES} bytes.")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidParameterError("stop_token_ids", f"stop_token_ids takes at most {MAX_STOP_TOKEN_IDS} ids.")
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0, 2**31 - 1)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InvalidParameterError if a token id lies outside the vocabulary."""
        if any(token_id >= vocab_size for token_id in self.stop_token_ids):
            raise InvalidParameterError(
                "stop_token_ids", f"stop_token_ids must lie in the vocabulary: 0 to {vocab_size - 1}."
            )


def _integer(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidParameterError(name, f"{name} must be an integer.")
    if not low <= value <= high:
        raise InvalidParameterError(name, f"{name} must be from {low} to {high}.")


def _number(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidParameterError(name, f"{name} must be a number.")
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidParameterError(name, f"{name} must be from {low:g} to {high:g}.")
