"""What one step brought to one choice, as text; and several steps of it as one."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from quire.scheduler.output import ErrorCode, TokenLogProbs

__all__ = ["TextDelta", "TokenLogProbs", "join", "merge"]


class TextDelta(msgspec.Struct, gc=False):
    """What one step brought to one choice, as text.

    `text` lags behind `token_ids` while a character is incomplete or a stop string may have begun. The concatenation of
    the texts is the choice's text; after a stop string it is what stands before it (or the string too, if included).
    """

    choice_index: int
    text: str
    token_ids: list[int]
    """Up to and including the token that completed a stop string, and the end-of-sequence or stop token."""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the choice; None for end-of-sequence, length and errors."""
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    """Output tokens of this choice so far."""
    log_probs: list[TokenLogProbs] | None = None
    """One for each of `token_ids`, if the request asks for `logprobs`."""
    text_offsets: list[int] | None = None
    """With `log_probs`: characters of the choice's text that the tokens before each of `token_ids` completed. So the
    tokens of one character share its place, and those of a stop string that is cut off lie at the end or beyond it."""
    prompt_log_probs: list[TokenLogProbs] | None = None
    """With the first delta of a request that asks for `prompt_logprobs`: of all prompt tokens but the first."""
    cumulative_log_prob: float | None = None
    """With the finish, where log-probabilities were computed: the sum over the choice's tokens; of a beam that was
    searched to its end, what the search ranked it by, without length penalty."""
    error: ErrorCode | None = None
    """With the finish reason "error": the code of the API's answer."""
    num_discarded_tokens: int = 0
    """With the finish of `best_of`, once for a request: output tokens of the choices that were not among the best."""
    started_at: float | None = None
    """When the engine first scheduled the request, in seconds of time.monotonic(); None where nobody measured."""


def merge(deltas: Iterable[TextDelta]) -> list[TextDelta]:
    """One delta for each choice, in the order in which the choices first appear; the inputs are left as they are."""
    by_choice: dict[int, list[TextDelta]] = {}
    for delta in deltas:
        by_choice.setdefault(delta.choice_index, []).append(delta)
    return [parts[0] if len(parts) == 1 else join(parts) for parts in by_choice.values()]


def join(parts: list[TextDelta]) -> TextDelta:
    """Consecutive deltas of one choice as one."""
    last = parts[-1]
    return TextDelta(
        choice_index=last.choice_index,
        text="".join(part.text for part in parts),
        token_ids=[token_id for part in parts for token_id in part.token_ids],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        num_cached_tokens=last.num_cached_tokens,
        num_output_tokens=last.num_output_tokens,
        log_probs=None if last.log_probs is None else [each for part in parts for each in part.log_probs or ()],
        text_offsets=None if last.log_probs is None else [each for part in parts for each in part.text_offsets or ()],
        prompt_log_probs=next((part.prompt_log_probs for part in parts if part.prompt_log_probs is not None), None),
        cumulative_log_prob=last.cumulative_log_prob,
        error=last.error,
        num_discarded_tokens=last.num_discarded_tokens,
        started_at=last.started_at,
    )
