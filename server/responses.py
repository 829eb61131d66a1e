"""Bodies of answers: declared structs, in the order and with the names of OpenAI and vLLM."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from quire.grammar import Grammar
from quire.sampling_params import EarlyStopping, SamplingParams
from quire.server.log_probs import LogProbs, PromptLogProbs
from quire.server.sse import event

encode_text: Callable[[str], bytes] = msgspec.json.Encoder().encode
"""A JSON string."""


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class EffectiveParams(msgspec.Struct, frozen=True):
    """The sampling parameters that were really used."""

    n: int
    best_of: int | None
    use_beam_search: bool
    length_penalty: float
    early_stopping: EarlyStopping
    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    seed: int | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[int, float]
    allowed_token_ids: tuple[int, ...] | None
    bad_words: tuple[str, ...]
    grammar: Grammar | None
    logprobs: int | None
    prompt_logprobs: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    num_speculative_tokens: int | None

    @classmethod
    def of(cls, params: SamplingParams) -> EffectiveParams:
        return cls(**{name: getattr(params, name) for name in cls.__struct_fields__})


class CompletionChoice(msgspec.Struct):
    """One choice of an answer, or what one engine step brought to it."""

    index: int
    text: str
    logprobs: LogProbs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType | None = UNSET
    prompt_logprobs: PromptLogProbs | UnsetType = UNSET
    cumulative_logprob: float | UnsetType | None = UNSET
    """Of beams, with their finish: what the search ranked them by, without length penalty."""


class Completion(msgspec.Struct, kw_only=True):
    """The answer to POST /v1/completions; as a stream, each chunk of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: None = None
    warnings: list[str] | UnsetType = UNSET
    effective_params: EffectiveParams | UnsetType = UNSET


class ChunkTemplate:
    """Encodes chunks of a stream that differ in their text alone: the rest of them is encoded once."""

    __slots__ = ("after", "before")

    def __init__(self, chunk: Completion) -> None:
        """chunk: with one choice, whose text is empty."""
        # Inside a JSON string quotes are escaped, so no name or id that a client chose can look like this.
        before, text, after = event(msgspec.json.encode(chunk)).partition(b'"text":""')
        self.before = before + text[:-2]
        self.after = _one_copy(after)

    def fill(self, text: str) -> bytes:
        """The event that tells `text`."""
        return self.before + encode_text(text) + self.after


@lru_cache(maxsize=64)
def _one_copy(data: bytes) -> bytes:
    """What most streams have in common is one object, so that caches hold it once."""
    return data


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    return Usage(
        prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, PromptTokensDetails(cached_tokens)
    )


def warnings_for(ignored: list[str]) -> list[str] | UnsetType:
    return [f"The field '{name}' was ignored." for name in ignored] if ignored else UNSET


def ignored_header(ignored: list[str]) -> dict[str, str]:
    return {"x-quire-ignored": ",".join(ignored)} if ignored else {}


def json_response(body: msgspec.Struct, ignored: list[str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(body), headers={"content-type": "application/json", **ignored_header(ignored or [])}
    )
