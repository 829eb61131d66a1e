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
from quire.server.settings import Limits
from quire.server.structured_output import Constraint, check_constraint, constraint_of

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

    Bounds that need no tokens are checked first: nothing is compiled or tokenized for a request that is refused anyway.
    """
    info, tokenizer = context.client.info, context.client.tokenizer
    constraint = await constraint_of(request, context.off_loop)
    params = _checked_params(context, request, constraint)
    texts, id_lists = _split_prompt(request)
    for each in texts:
        check_text_length(each, info.max_model_len)
    if constraint is not None:
        await check_constraint(context.grammar_compiler, constraint)
    params = await _with_bad_word_ids(params, context)
    if texts:
        add_special_tokens = request.add_special_tokens is not False
        id_lists = await asyncio.gather(*(tokenizer.encode(each, add_special_tokens) for each in texts))
    jobs = []
    for prompt_index, given_ids in enumerate(id_lists):
        token_ids = _truncate(given_ids, request, info.max_model_len)
        max_tokens = _max_tokens(request, len(token_ids), info.max_model_len)
        check_token_ids(token_ids, info.vocab_size, param="prompt")
        text = texts[prompt_index] if texts and request.truncate_prompt_tokens is None else None
        fitted = params if max_tokens == params.max_tokens else _refit(params, max_tokens)
        jobs.append(PromptJob(prompt_index, token_ids, text, fitted))
    _check_log_probs(jobs, bool(request.stream), context.settings.limits)
    return jobs


def is_echo_only(request: CompletionRequest) -> bool:
    """Nothing is computed: the answer is the prompt."""
    asks_for_log_probs = request.logprobs is not None or request.prompt_logprobs is not None
    return bool(request.echo) and request.max_tokens == 0 and not asks_for_log_probs


def check_text_length(text: str, max_model_len: int) -> None:
    if len(text) > MAX_CHARS_PER_TOKEN * max_model_len:
        requested = f"a prompt of {len(text)} characters, which cannot fit"
        raise ApiError("context_length_exceeded", param="prompt", context=max_model_len, requested=requested)


def check_token_ids(token_ids: TokenIds, vocab_size: int, *, param: str) -> None:
    if not token_ids:
        raise ApiError("empty_prompt", param=param)
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise ApiError("token_id_out_of_range", param=param, highest=vocab_size - 1)


def _checked_params(
    context: ServerContext, request: CompletionRequest, constraint: Constraint | None
) -> SamplingParams:
    info = context.client.info
    requested = request.max_tokens if request.max_tokens is not None else DEFAULT_MAX_TOKENS
    grammar = constraint and constraint.grammar
    params = sampling_params(request, context.settings, 1 if is_echo_only(request) else requested, grammar)
    _check_vocabulary(params, info.vocab_size)
    if params.num_sequences > info.max_num_seqs:
        name = "n" if params.best_of is None else "num_beams" if request.best_of is None else "best_of"
        reason = f"{name} must not be larger than the {info.max_num_seqs} sequences that run at once here."
        raise ApiError("invalid_value", param=name, reason=reason)
    truncate = request.truncate_prompt_tokens
    if truncate is not None and truncate != -1 and not 1 <= truncate <= info.max_model_len:
        reason = f"truncate_prompt_tokens must be -1 or from 1 to {info.max_model_len}."
        raise ApiError("invalid_value", param="truncate_prompt_tokens", reason=reason)
    return params


async def _with_bad_word_ids(params: SamplingParams, context: ServerContext) -> SamplingParams:
    try:
        filled = await context.client.tokenizer.with_bad_word_ids(params)
    except InvalidParameterError as error:
        raise ApiError("invalid_value", param=error.param, reason=str(error)) from None
    if filled is not params:
        _check_vocabulary(filled, context.client.info.vocab_size)
    return filled


def _check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    try:
        params.check_vocabulary(vocab_size)
    except InvalidParameterError as error:
        raise ApiError("invalid_value", param=error.param, reason=str(error)) from None


def _check_log_probs(jobs: list[PromptJob], stream: bool, limits: Limits) -> None:
    """What log-probabilities take is bounded for each prompt, which the engine holds until it is computed, and for the
    answer: all prompts of a request, and without `stream` all that it may generate."""
    total = 0
    for job in jobs:
        params = job.params
        if params.prompt_logprobs is not None:
            of_prompt = len(job.token_ids) * (1 + params.prompt_logprobs)
            if of_prompt > limits.max_prompt_log_probs:
                most = limits.max_prompt_log_probs // (1 + params.prompt_logprobs)
                reason = (
                    f"With {params.prompt_logprobs} log-probabilities a position, a prompt takes {most} tokens at most."
                )
                raise ApiError("invalid_value", param="prompt", reason=reason)
            total += params.n * of_prompt
        if params.logprobs is not None and not stream:
            total += params.num_sequences * (params.max_tokens or 0) * (1 + params.logprobs)
    if total > limits.max_answer_log_probs:
        reason = f"The answer would hold more than {limits.max_answer_log_probs} log-probabilities; ask for fewer."
        name = "logprobs" if jobs[0].params.logprobs is not None else "prompt_logprobs"
        raise ApiError("invalid_value", param=name, reason=reason)


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
        keep = max(1, max_model_len - completion)
    return token_ids[-keep:]


def _max_tokens(request: CompletionRequest, num_prompt_tokens: int, max_model_len: int) -> int:
    """Output tokens of one prompt: as asked, which must fit; by default no more than what is left of the context."""
    asked = request.max_tokens
    room = max_model_len - num_prompt_tokens
    if asked == 0 and room >= 0:
        # An echo is not computed, and SamplingParams know no 0 without log-probabilities.
        return 1 if is_echo_only(request) else 0
    if room < 1 or (asked is not None and asked > room):
        completion = 1 if asked is None else asked
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
