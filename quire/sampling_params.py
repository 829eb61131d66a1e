"""How one request chooses its tokens. The constructor is the one place where bounds are checked. A leaf."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from quire.grammar import Grammar

MAX_N = 128
MAX_BEAM_WIDTH = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 4
MAX_STOP_STRING_BYTES = 256
MAX_STOP_TOKEN_IDS = 128
MAX_TOP_K = 2**31 - 1
MAX_LOGIT_BIASES = 1024
MAX_ABSOLUTE_LOGIT_BIAS = 100.0
MAX_ALLOWED_TOKEN_IDS = 2**15
MAX_BAD_WORDS = 128
MAX_BAD_WORD_BYTES = 256
MAX_BAD_WORD_TOKENS = 64
MAX_ABSOLUTE_LENGTH_PENALTY = 10.0
MAX_SPECULATIVE_TOKENS = 16

EarlyStopping = bool | Literal["never"]


class InvalidParameterError(ValueError):
    """A request parameter is out of its bounds. `param` names the field; the message never echoes long input."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Names and defaults are those of vLLM's request body; `early_stopping` is Hugging Face's.

    Order of the chain: repetition, presence and frequency penalty, logit_bias, allowed_token_ids, grammar, bad words,
    min_tokens, temperature, typical_p, top_k, top_p, min_p, draw. `temperature` 0 is greedy and ignores what follows
    it in the chain. `top_k` 0 or -1 is off.

    With `use_beam_search` the chain up to min_tokens works on each beam's log-probabilities, as in Hugging Face's
    `generate`; what follows it must be off, and `temperature` is not looked at.

    Raises:
        InvalidParameterError: a field is out of bounds.
    """

    n: int = 1
    best_of: int | None = None
    """Choices that are computed, of which the `n` with the best mean log-probability are returned. Beam search: the
    width. `None`: n."""
    use_beam_search: bool = False
    length_penalty: float = 1.0
    """A finished beam's score is its log-probability divided by length ** length_penalty."""
    early_stopping: EarlyStopping = False
    """When to end a beam search: True, once `width` hypotheses are finished; False, once no live beam is better than
    the worst of them at its present length; "never", once none can become better at any length."""
    max_tokens: int | None = 16
    """Most output tokens; `None`: what is left of the context; 0 only together with `prompt_logprobs`."""
    min_tokens: int = 0
    """No end-of-sequence, stop token or stop string before so many output tokens."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int | None = None
    """64 bits, signed or unsigned; `None`: one is drawn at admission."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that occur in prompt or output, multiplies negative ones."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that occurs in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit as often as it occurs in the output."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    allowed_token_ids: tuple[int, ...] | None = None
    """If given, no other token is chosen."""
    bad_words: tuple[str, ...] = ()
    """Texts that are not to be generated; see `bad_word_token_ids`."""
    bad_word_token_ids: tuple[tuple[int, ...], ...] = ()
    """What `bad_words` are as tokens, each with and without a space before it: the last token of one is never chosen
    where the others stand before it. `engine.tokenizer.with_bad_word_ids` fills it in."""
    grammar: Grammar | None = None
    """What the whole output must look like; it ends where the grammar does, also with `ignore_eos` or `min_tokens`."""
    logprobs: int | None = None
    """Log-probabilities of the chosen tokens, and of so many of the best at each position, of the raw distribution."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    num_speculative_tokens: int | None = None
    """Tokens guessed from the text so far and verified in one step; the output is the same. `None`: as configured."""

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        self._check_choices()
        self._check_lengths()
        self._check_chain()
        self._check_token_lists()
        self._check_stops()
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        if self.num_speculative_tokens is not None:
            _integer("num_speculative_tokens", self.num_speculative_tokens, 0, MAX_SPECULATIVE_TOKENS)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def num_sequences(self) -> int:
        """Sequences that run at once: choices computed, or beams."""
        return self.n if self.best_of is None else self.best_of

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InvalidParameterError if a token id lies outside the vocabulary."""
        lists: dict[str, Sequence[int]] = {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": list(self.logit_bias),
            "allowed_token_ids": self.allowed_token_ids or (),
            "bad_words": [token_id for word in self.bad_word_token_ids for token_id in word],
        }
        for name, token_ids in lists.items():
            if token_ids and max(token_ids) >= vocab_size:
                raise InvalidParameterError(name, f"{name} must lie in the vocabulary: 0 to {vocab_size - 1}.")

    def _check_choices(self) -> None:
        if self.best_of is not None:
            _integer("best_of", self.best_of, 1, MAX_N)
            if self.best_of < self.n:
                raise InvalidParameterError("best_of", "best_of must not be smaller than n.")
        _number("length_penalty", self.length_penalty, -MAX_ABSOLUTE_LENGTH_PENALTY, MAX_ABSOLUTE_LENGTH_PENALTY)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InvalidParameterError("early_stopping", 'early_stopping must be true, false or "never".')
        if not self.use_beam_search:
            if self.length_penalty != 1.0:
                raise InvalidParameterError("length_penalty", "length_penalty needs use_beam_search.")
            if self.early_stopping is not False:
                raise InvalidParameterError("early_stopping", "early_stopping needs use_beam_search.")
            return
        if self.num_sequences > MAX_BEAM_WIDTH:
            name = "n" if self.best_of is None else "best_of"
            raise InvalidParameterError(name, f"a beam search has at most {MAX_BEAM_WIDTH} beams.")
        for name, off in (("top_k", self.top_k in (0, -1)), ("top_p", self.top_p == 1), ("min_p", self.min_p == 0)):
            if not off:
                raise InvalidParameterError(name, f"{name} chooses at random: it cannot go with use_beam_search.")
        if self.typical_p != 1:
            raise InvalidParameterError("typical_p", "typical_p cannot go with use_beam_search.")

    def _check_lengths(self) -> None:
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _integer(name, count, 0, MAX_LOGPROBS)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0, 2**31 - 1)
            if self.max_tokens == 0 and self.prompt_logprobs is None:
                raise InvalidParameterError("max_tokens", "max_tokens must be at least 1, or 0 with prompt_logprobs.")
            if self.max_tokens == 0 and self.use_beam_search:
                raise InvalidParameterError("max_tokens", "max_tokens must be at least 1 with use_beam_search.")
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidParameterError("min_tokens", "min_tokens must not be larger than max_tokens.")

    def _check_chain(self) -> None:
        _number("temperature", self.temperature, 0.0, 2.0)
        _integer("top_k", self.top_k, -1, MAX_TOP_K)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("typical_p", self.typical_p, 0.0, 1.0, above=True)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)

    def _check_token_lists(self) -> None:
        _at_most("logit_bias", self.logit_bias, MAX_LOGIT_BIASES, "entries")
        for token_id, bias in self.logit_bias.items():
            _integer("logit_bias", token_id, 0, 2**31 - 1)
            _number("logit_bias", bias, -MAX_ABSOLUTE_LOGIT_BIAS, MAX_ABSOLUTE_LOGIT_BIAS)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise InvalidParameterError("allowed_token_ids", "allowed_token_ids must name at least one token.")
            _at_most("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS, "ids")
            for token_id in self.allowed_token_ids:
                _integer("allowed_token_ids", token_id, 0, 2**31 - 1)
        _at_most("bad_words", self.bad_words, MAX_BAD_WORDS, "strings")
        for text in self.bad_words:
            _text("bad_words", text, MAX_BAD_WORD_BYTES)
        for token_ids in self.bad_word_token_ids:
            if not 0 < len(token_ids) <= MAX_BAD_WORD_TOKENS:
                raise InvalidParameterError("bad_words", f"a bad word takes at most {MAX_BAD_WORD_TOKENS} tokens.")
            for token_id in token_ids:
                _integer("bad_words", token_id, 0, 2**31 - 1)

    def _check_stops(self) -> None:
        _at_most("stop", self.stop, MAX_STOP_STRINGS, "strings")
        for text in self.stop:
            _text("stop", text, MAX_STOP_STRING_BYTES)
        _at_most("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS, "ids")
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0, 2**31 - 1)


def _integer(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidParameterError(name, f"{name} must be an integer.")
    if not low <= value <= high:
        raise InvalidParameterError(name, f"{name} must be from {low} to {high}.")


def _number(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """`above`: `low` itself is out of bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidParameterError(name, f"{name} must be a number.")
    if not (math.isfinite(value) and low <= value <= high) or (above and value == low):
        bounds = f"greater than {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise InvalidParameterError(name, f"{name} must be {bounds}.")


def _at_most(name: str, values: Sequence[object] | dict[int, float], limit: int, what: str) -> None:
    if len(values) > limit:
        raise InvalidParameterError(name, f"{name} takes at most {limit} {what}.")


def _text(name: str, text: str, max_bytes: int) -> None:
    if not text:
        raise InvalidParameterError(name, f"{name}: strings must not be empty.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidParameterError(name, f"{name}: strings must be valid Unicode, without lone surrogates.")
    if len(text.encode()) > max_bytes:
        raise InvalidParameterError(name, f"{name}: a string takes at most {max_bytes} bytes.")
