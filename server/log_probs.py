"""Log-probabilities as OpenAI and vLLM write them.

A token is written as its own text. One whose bytes are no text, such as a part of a character, is written as OpenAI
does: `bytes:\\xe6\\x97`. If two ids read the same within one object of `top_logprobs`, the chosen token and then the
more probable one keep the text, and the other is written `token_id:N`, as all are with `return_tokens_as_token_ids`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from quire.engine.detokenizer import DetokenizerFactory
    from quire.engine.text_delta import TokenLogProbs

_POSITIONS_AT_ONCE: Final = 256

ToString = Callable[[int], str]


class LogProbs(msgspec.Struct):
    """Four lists with one entry for each token. `text_offset` counts characters from the beginning of the choice's
    text, the echoed prompt included."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    def extend(self, other: LogProbs) -> None:
        self.tokens += other.tokens
        self.token_logprobs += other.token_logprobs
        self.top_logprobs += other.top_logprobs
        self.text_offset += other.text_offset


class PromptLogProb(msgspec.Struct, frozen=True):
    logprob: float
    rank: int | None
    """1 for the most probable; null for a token of the prompt that is not among those asked for."""
    decoded_token: str


PromptLogProbs = list[dict[int, PromptLogProb] | None]


class TokenStrings(dict[int, str]):
    """Token id to how it is written. Filled as tokens occur; one thread only."""

    def __init__(self, detokenizers: DetokenizerFactory) -> None:
        super().__init__()
        self._detokenizers = detokenizers

    def __missing__(self, token_id: int) -> str:
        text = self._detokenizers.token_text(token_id)
        string = text if isinstance(text, str) else "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)
        self[token_id] = string
        return string


def token_id_string(token_id: int) -> str:
    return f"token_id:{token_id}"


def join(echoed: LogProbs | None, output: LogProbs | None) -> LogProbs | None:
    """One after the other, as far as they are there; both are left as they are."""
    if echoed is None or output is None:
        return output if echoed is None else echoed
    whole = LogProbs([], [], [], [])
    whole.extend(echoed)
    whole.extend(output)
    return whole


def render(positions: Sequence[TokenLogProbs], num_top: int, offsets: Iterable[int], to_string: ToString) -> LogProbs:
    """`positions` with the `num_top` best of each, and the chosen token if it is not among them."""
    chosen = [to_string(each.token_id) for each in positions]
    best = [_best(each, num_top, string, to_string) for each, string in zip(positions, chosen, strict=True)]
    return LogProbs(chosen, [each.log_prob for each in positions], [*best], [*offsets])


async def render_echo(
    token_ids: Sequence[int],
    positions: Sequence[TokenLogProbs],
    num_top: int,
    offsets: Sequence[int],
    to_string: ToString,
) -> LogProbs:
    """Of a prompt, whose first token follows nothing. The event loop gets its turns."""
    first = token_ids[0]
    whole = LogProbs([to_string(first)], [None], [None], [offsets[0]])
    for start in range(0, len(positions), _POSITIONS_AT_ONCE):
        end = start + _POSITIONS_AT_ONCE
        whole.extend(render(positions[start:end], num_top, offsets[1 + start : 1 + end], to_string))
        await asyncio.sleep(0)
    return whole


async def render_prompt(positions: Sequence[TokenLogProbs], num_top: int, strings: TokenStrings) -> PromptLogProbs:
    """As vLLM's `prompt_logprobs`: null for the first token, then the token itself and the best by id."""
    rendered: PromptLogProbs = [None]
    for start in range(0, len(positions), _POSITIONS_AT_ONCE):
        rendered += [_by_id(each, num_top, strings) for each in positions[start : start + _POSITIONS_AT_ONCE]]
        await asyncio.sleep(0)
    return rendered


async def echo_offsets(
    token_ids: Sequence[int], text: str, detokenizers: DetokenizerFactory, *, hides_special: bool
) -> list[int]:
    """Where in an echoed `text` each of its tokens begins. Tokens that the echo does not show, because they are hidden
    or a tokenizer put them around what was sent, have no length. The event loop gets its turns."""
    detokenizer = detokenizers.create([], skip_special_tokens=hides_special)
    offsets, parts, num_characters = [], [], 0
    for position, token_id in enumerate(token_ids):
        offsets.append(num_characters)
        part = detokenizer.push(token_id)
        parts.append(part)
        num_characters += len(part)
        if position % _POSITIONS_AT_ONCE == _POSITIONS_AT_ONCE - 1:
            await asyncio.sleep(0)
    whole = "".join(parts) + detokenizer.finish()
    begin = len(whole) - len(text) if whole.endswith(text) else max(0, whole.find(text))
    return [min(max(0, offset - begin), len(text)) for offset in offsets]


def _best(each: TokenLogProbs, num_top: int, chosen: str, to_string: ToString) -> dict[str, float]:
    best: dict[str, float] = {}
    for token_id, log_prob in zip(each.top_token_ids[:num_top], each.top_log_probs, strict=False):
        string = chosen if token_id == each.token_id else to_string(token_id)
        if token_id != each.token_id and (string == chosen or string in best):
            string = token_id_string(token_id)
        best[string] = log_prob
    best.setdefault(chosen, each.log_prob)
    return best


def _by_id(each: TokenLogProbs, num_top: int, strings: TokenStrings) -> dict[int, PromptLogProb]:
    rendered = {each.token_id: PromptLogProb(each.log_prob, None, strings[each.token_id])}
    for index, (token_id, log_prob) in enumerate(
        zip(each.top_token_ids[:num_top], each.top_log_probs, strict=False), start=1
    ):
        rendered[token_id] = PromptLogProb(log_prob, index, strings[token_id])
    return rendered
