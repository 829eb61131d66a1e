"""From the prompts of a request to what the engine is asked: token ids, within every bound before they are queued."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Final, cast

from quire.sampling_params import InvalidParameterError, SamplingParams
from quire.server.context import ServerContext
from quire.server.errors import ApiError
from quire.server.parameters import DEFAULT_MAX_TOKENS, sampling_params
from quire.server.schemas import CompletionRequest, TokenIds

MAX_CHARS_PER_TOKEN: Final = 16
"""A prompt longer than this many characters per token of context is refused before it is tokenized."""


@dataclass(frozen=True, slots=True)
class PromptJob:
    """One prompt of a request, ready for the engine."""

    prompt_index: int
    token_ids: list[int]
    text: str | None
    """As sent; None for token ids."""
    params: SamplingParams


async def plan_jobs(context: ServerContext, request: CompletionRequest) -> list[PromptJob]:
    """One job per prompt. Raises ApiError if a prompt or parameter is out of bounds.

    Bounds that need no tokens are checked first: nothing is tokenized for a request that is refused anyway.
    """
    info = context.client.info
    params = _checked_params(context, request)
    texts, id_lists = _split_prompt(request)
    if texts:
        for each in texts:
            check_text_length(each, info.max_model_len)
        add_special_tokens = request.add_special_tokens is not False
        id_lists = await asyncio.gather(*(context.client.tokenizer.encode(each, add_special_tokens) for each in texts))
    jobs = []
    for prompt_index, given_ids in enumerate(id_lists):
        token_ids = _truncate(given_ids, request, info.max_model_len)
        max_tokens = _max_tokens(request, len(token_ids), info.max_model_len)
        check_token_ids(token_ids, info.vocab_size, param="prompt")
        text = texts[prompt_index] if texts and request.truncate_prompt_tokens is None else None
        fitted = params if max_tokens == params.max_tokens else _refit(params, max_tokens)
        jobs.append(PromptJob(prompt_index, token_ids, text, fitted))
    return jobs


def is_echo_only(request: CompletionRequest) -> bool:
    """Nothing is generated: the answer is the prompt."""
    return bool(request.echo) and request.max_tokens == 0


def check_text_length(text: str, max_model_len: int) -> None:
    if len(text) > MAX_CHARS_PER_TOKEN * max_model_len:
        requested = f"a prompt of {len(text)} characters, which cannot fit"
        raise ApiError("context_length_exceeded", param="prompt", context=max_model_len, requested=requested)


def check_token_ids(token_ids: TokenIds, vocab_size: int, *, param: str) -> None:
    if not token_ids:
        raise ApiError("empty_prompt", param=param)
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise ApiError("token_id_out_of_range", param=param, highest=vocab_size - 1)


def _checked_params(context: ServerContext, request: CompletionRequest) -> SamplingParams:
    info = context.client.info
    requested = request.max_tokens if request.max_tokens is not None else DEFAULT_MAX_TOKENS
    params = sampling_params(request, context.settings.generation_defaults, 1 if is_echo_only(request) else requested)
    try:
        params.check_vocabulary(info.vocab_size)
    except InvalidParameterError as error:
        raise ApiError("invalid_value", param=error.param, reason=str(error)) from None
    if params.n > info.max_num_seqs:
        reason = f"n must not be larger than the {info.max_num_seqs} sequences that run at once here."
        raise ApiError("invalid_value", param="n", reason=reason)
    truncate = request.truncate_prompt_tokens
    if truncate is not None and truncate != -1 and not 1 <= truncate <= info.max_model_len:
        reason = f"truncate_prompt_tokens must be -1 or from 1 to {info.max_model_len}."
        raise ApiError("invalid_value", param="truncate_prompt_tokens", reason=reason)
    return params


def _split_prompt(request: CompletionRequest) -> tuple[list[str], list[list[int]]]:
    """The prompts as texts, or as lists of token ids; the other list is empty."""
    texts: list[str] = []
    id_lists: list[list[int]] = []
    prompt = request.prompt
    # The schema lets no list of mixed types through, so the first element speaks for all.
    if isinstance(prompt, str):
        texts = [prompt]
    elif prompt and isinstance(prompt[0], int):
        id_lists = [prompt]
    elif prompt and isinstance(prompt[0], str):
        texts = prompt
    else:
        id_lists = cast("list[list[int]]", prompt)
    if not (texts or id_lists) or not all(texts) or not all(id_lists):
        raise ApiError("empty_prompt", param="prompt")
    return texts, id_lists


def _truncate(token_ids: list[int], request: CompletionRequest, max_model_len: int) -> list[int]:
    """The last `truncate_prompt_tokens` ids; -1 keeps as many as leave room for the completion."""
    keep = request.truncate_prompt_tokens
    if keep is None:
        return token_ids
    if keep == -1:
        completion = request.max_tokens if request.max_tokens is not None else DEFAULT_MAX_TOKENS
        keep = max(1, max_model_len - max(1, completion))
    return token_ids[-keep:]


def _max_tokens(request: CompletionRequest, num_prompt_tokens: int, max_model_len: int) -> int:
    """Output tokens of one prompt: as asked, which must fit; by default no more than what is left of the context."""
    asked = request.max_tokens
    room = max_model_len - num_prompt_tokens
    if is_echo_only(request):
        asked, room = 1, room + 1
    if room < 1 or (asked is not None and asked > room):
        completion = 0 if is_echo_only(request) else asked or 1
        requested = (
            f"{num_prompt_tokens + completion} tokens ({num_prompt_tokens} in the prompt, {completion} for the "
            "completion). Please reduce the length of the prompt or of the completion"
        )
        param = "prompt" if room < 1 else "max_tokens"
        raise ApiError("context_length_exceeded", param=param, context=max_model_len, requested=requested)
    return asked if asked is not None else min(DEFAULT_MAX_TOKENS, room)


def _refit(params: SamplingParams, max_tokens: int) -> SamplingParams:
    try:
        return replace(params, max_tokens=max_tokens)
    except InvalidParameterError as error:
        raise ApiError("invalid_value", param=error.param, reason=str(error)) from None
