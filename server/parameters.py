"""From a request body to the sampling parameters that are really used, with nothing dropped in silence."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from quire.sampling_params import InvalidParameterError, SamplingParams
from quire.server.errors import ApiError, printable_name
from quire.server.schemas import CompletionRequest, StrictModel, unknown_fields
from quire.server.settings import GenerationDefaults, ServerSettings

DEFAULT_MAX_TOKENS: Final = 16
MAX_REPORTED_FIELDS: Final = 32

T = TypeVar("T")


def _only(*neutral: object) -> Callable[[object], bool]:
    """True for `neutral` values; 0 is not False and 1 is not True here."""
    return lambda value: any(type(value) is type(each) and value == each for each in neutral)


def _number(neutral: float) -> Callable[[object], bool]:
    return lambda value: type(value) in (int, float) and value == neutral


NEUTRAL: Final[Mapping[str, Callable[[object], bool]]] = {
    "allowed_token_ids": _only([]),
    "bad_words": _only([]),
    "early_stopping": _only(False),
    "frequency_penalty": _number(0),
    "guided_choice": _only(),
    "guided_grammar": _only(),
    "guided_json": _only(),
    "guided_regex": _only(),
    "json_schema": _only(),
    "kv_transfer_params": _only({}),
    "length_penalty": _number(1),
    "logit_bias": _only({}),
    "logprobs": _only(),
    "lora_path": _only(""),
    "presence_penalty": _number(0),
    "prompt_embeds": _only(),
    "prompt_logprobs": _only(),
    "regex": _only(),
    "repetition_penalty": _number(1),
    "response_format": _only({"type": "text"}),
    "return_tokens_as_token_ids": _only(False),
    "spaces_between_special_tokens": _only(True),
    "structured_outputs": _only(),
    "suffix": _only(""),
    "use_beam_search": _only(False),
    "vllm_xargs": _only({}),
}
"""Fields that are known and not yet honoured, and which of their values, besides null, ask for nothing."""


def check_model_name(name: str | None, settings: ServerSettings) -> None:
    """Raise ApiError if `name` is not served here; null is the served model."""
    if name is not None and not settings.serves(name):
        raise ApiError("model_not_found", param="model", name=printable_name(name))


def check_unknown_fields(model: StrictModel, settings: ServerSettings) -> list[str]:
    """The names of the fields that nobody reads, at most 32. Raises ApiError for the first one with --strict."""
    names = unknown_fields(model)
    if names and settings.strict:
        raise ApiError("unknown_parameter", param=names[0], name=names[0])
    return names if len(names) <= MAX_REPORTED_FIELDS else [*names[:MAX_REPORTED_FIELDS], "..."]


def refuse_unsupported(request: CompletionRequest) -> None:
    """Raise ApiError for the first field whose value would change the answer and cannot be honoured."""
    for name, is_neutral in NEUTRAL.items():
        value: Any = getattr(request, name)
        if value is not None and not is_neutral(value):
            raise ApiError("unsupported_parameter", param=name, name=name)
    n = request.n if request.n is not None else 1
    if request.best_of is not None and request.best_of != n:
        if request.best_of < n:
            raise ApiError("invalid_value", param="best_of", reason="best_of must not be smaller than n.")
        raise ApiError("unsupported_parameter", param="best_of", name="best_of")


def sampling_params(request: CompletionRequest, defaults: GenerationDefaults, max_tokens: int) -> SamplingParams:
    """The parameters of a request: its own values, else those of the model, else the neutral ones.

    Raises:
        ApiError: a value is out of its bounds.
    """

    stop = request.stop if request.stop is not None else []
    seed = request.seed
    if seed is None and request.return_effective_params:
        # The caller wants to see what was used, so the seed is drawn where it can be shown.
        seed = secrets.randbits(63)
    try:
        return SamplingParams(
            n=_given(request.n, 1),
            max_tokens=max_tokens,
            min_tokens=_given(request.min_tokens, 0),
            temperature=_given(request.temperature, defaults.temperature),
            top_k=_given(request.top_k, defaults.top_k),
            top_p=_given(request.top_p, defaults.top_p),
            min_p=_given(request.min_p, defaults.min_p),
            seed=seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(_given(request.stop_token_ids, [])),
            ignore_eos=_given(request.ignore_eos, False),
            include_stop_str_in_output=_given(request.include_stop_str_in_output, False),
            skip_special_tokens=_given(request.skip_special_tokens, True),
        )
    except InvalidParameterError as error:
        raise ApiError("invalid_value", param=error.param, reason=str(error)) from None


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
