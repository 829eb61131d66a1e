"""How probable a model finds given text: what `LLM.score` and `LLM.perplexity` look at, and what it adds up to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quire.engine.tokenizer import Tokenizer
from quire.sampling_params import InvalidParameterError
from quire.scheduler.output import TokenLogProbs


@dataclass(frozen=True, slots=True)
class ContinuationScore:
    """How probable one continuation is after its context; natural logarithms."""

    log_prob: float
    """The sum of `token_log_probs`."""
    token_log_probs: list[float]
    is_greedy: bool
    """Whether each token is the most probable one at its position; of equal ones only the lowest id is."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_log_probs)


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """How probable a text is, all of its tokens but the first."""

    token_log_probs: list[float]
    perplexity: float
    bits_per_byte: float
    """By the UTF-8 bytes of the scored tokens' text; special tokens have none."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_log_probs)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """Token ids of both together, and how many of them are the context's.

    As EleutherAI's lm-evaluation-harness does it (`_encode_pair`): trailing spaces of the context go to the
    continuation, both are encoded as one text, and what is longer than the context alone is the continuation. Before
    an empty context stands the token that begins a text, or else the one that ends it.

    Raises:
        InvalidParameterError: the continuation has no token of its own.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    token_ids = tokenizer.encode(stripped + continuation)
    num_context_tokens = len(tokenizer.encode(stripped)) if stripped else 0
    if not stripped:
        prefix_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if prefix_id is None:
            raise InvalidParameterError("context", "The tokenizer has no token to stand in for an empty context.")
        if token_ids[:1] != [prefix_id]:
            token_ids = [prefix_id, *token_ids]
        num_context_tokens = 1
    if len(token_ids) <= num_context_tokens:
        raise InvalidParameterError("continuation", "A continuation must have at least one token of its own.")
    return token_ids, num_context_tokens


def score_of_continuation(scored: list[TokenLogProbs], num_context_tokens: int) -> ContinuationScore:
    """`scored`: of all tokens but the first, with at least the most probable one at each position."""
    entries = scored[num_context_tokens - 1 :]
    log_probs = [entry.log_prob for entry in entries]
    greedy = all(entry.top_token_ids[0] == entry.token_id for entry in entries)
    return ContinuationScore(math.fsum(log_probs), log_probs, greedy)


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [start, end) are looked at together; of these the last `num_scored` count."""

    start: int
    end: int
    num_scored: int


def windows(num_tokens: int, size: int, stride: int | None) -> list[Window]:
    """Cut a text so that each token but the first is scored once.

    As in transformers' "Perplexity of fixed-length models": windows begin at multiples of `stride`, and each scores
    what those before it have not. With None they share a single token, the shortest context there is.

    Raises:
        InvalidParameterError: there is nothing to score, or the stride would leave tokens out.
    """
    if num_tokens < 2:
        raise InvalidParameterError("text", "A text must have at least two tokens to be scored.")
    if size < 2:
        raise InvalidParameterError("text", "Nothing can be scored in a context of one token.")
    stride = size - 1 if stride is None else stride
    if not 1 <= stride < size:
        raise InvalidParameterError("stride", f"stride must be from 1 to {size - 1}: one less than the context length.")
    cut = [Window(0, min(size, num_tokens), min(size, num_tokens) - 1)]
    while cut[-1].end < num_tokens:
        start = cut[-1].start + stride
        end = min(start + size, num_tokens)
        cut.append(Window(start, end, end - cut[-1].end))
    return cut


def perplexity_result(
    token_log_probs: list[float], token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> PerplexityResult:
    """`token_log_probs`: of `token_ids[1:]`; `decode` leaves special tokens out."""
    total = -math.fsum(token_log_probs)
    num_bytes = len(decode(token_ids[1:]).encode())
    mean = total / len(token_log_probs)
    return PerplexityResult(
        token_log_probs,
        math.exp(mean) if mean < math.log(float("1e308")) else math.inf,
        total / math.log(2) / num_bytes if num_bytes else math.inf,
    )
