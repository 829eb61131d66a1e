"""From a request body to the sampling parameters that are really used, with nothing dropped in silence."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from quire.grammar import Grammar
from quire.sampling_params import MAX_BEAM_WIDTH, InvalidParameterError, SamplingParams
from quire.server.errors import ApiError, printable_name
from quire.server.schemas import CompletionRequest, StrictModel, unknown_fields
from quire.server.settings import GenerationDefaults, ServerSettings

DEFAULT_MAX_TOKENS: Final = 16
MAX_REPORTED_FIELDS: Final = 32

_TOKEN_ID: Final = re.compile("0|[1-9][0-9]{0,9}")

T = TypeVar("T")


def _only(*neutral: object) -> Callable[[object], bool]:
    """True for `neutral` values; 0 is not False and 1 is not True here."""
    return lambda value: any(type(value) is type(each) and value == each for each in neutral)


NEUTRAL: Final[Mapping[str, Callable[[object], bool]]] = {
    "guided_whitespace_pattern": _only(),
    "kv_transfer_params": _only({}),
    "lora_path": _only(""),
    "prompt_embeds": _only(),
    "spaces_between_special_tokens": _only(True),
    "structural_tag": _only(),
    "suffix": _only(""),
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


def sampling_params(
    request: CompletionRequest, settings: ServerSettings, max_tokens: int, grammar: Grammar | None
) -> SamplingParams:
    """The parameters of a request: its own values, else those of the model, else the neutral ones. `bad_words` are not
    yet tokenized; `grammar` was read by quire.server.structured_output.

    Raises:
        ApiError: a value is out of its bounds.
    """
    seed = request.seed
    if seed is None and request.return_effective_params:
        # The caller wants to see what was used, so the seed is drawn where it can be shown.
        seed = secrets.randbits(63)
    beams = _choices(request)
    defaults = settings.generation_defaults
    if beams["use_beam_search"]:
        # What the model recommends for drawing is no obstacle to a search that draws nothing.
        defaults = GenerationDefaults(repetition_penalty=defaults.repetition_penalty)
    stop = _given(request.stop, [])
    try:
        return SamplingParams(
            **beams,
            **_chain(request, defaults),
            **_log_probs(request, settings.max_logprobs),
            max_tokens=max_tokens,
            min_tokens=_given(request.min_tokens, 0),
            grammar=grammar,
            seed=seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(_given(request.stop_token_ids, [])),
            ignore_eos=_given(request.ignore_eos, False),
            include_stop_str_in_output=_given(request.include_stop_str_in_output, False),
            skip_special_tokens=_given(request.skip_special_tokens, True),
            num_speculative_tokens=request.num_speculative_tokens,
        )
    except InvalidParameterError as error:
        raise _invalid(error.param, str(error)) from None


def _choices(request: CompletionRequest) -> dict[str, Any]:
    """How many choices, and whether they are searched. `num_beams` is Hugging Face's name of a search's width: more
    than one asks for a search by itself, one is neutral without."""
    n, width = _given(request.n, 1), request.num_beams
    best_of, searches = request.best_of, request.use_beam_search
    if width is not None:
        if best_of is not None and best_of != width:
            raise _invalid("num_beams", "num_beams and best_of are the same number; they differ.")
        if not 1 <= width <= MAX_BEAM_WIDTH:
            raise _invalid("num_beams", f"num_beams must be from 1 to {MAX_BEAM_WIDTH}.")
        if width > 1 and searches is False:
            raise _invalid("num_beams", "num_beams above 1 is a beam search, and use_beam_search is false.")
        searches = searches or width > 1
        if searches and width < n:
            raise _invalid("num_beams", "num_beams must not be smaller than n.")
        best_of = width if searches else best_of
    if request.stream and not searches and best_of is not None and best_of > n:
        raise _invalid("best_of", "best_of above n cannot be streamed: the best are known only at the end.")
    return {
        "n": n,
        "best_of": best_of,
        "use_beam_search": bool(searches),
        "length_penalty": _given(request.length_penalty, 1.0),
        "early_stopping": _given(request.early_stopping, False),
    }


def _chain(request: CompletionRequest, defaults: GenerationDefaults) -> dict[str, Any]:
    """What is done to the logits, in the order of SamplingParams."""
    return {
        "repetition_penalty": _given(request.repetition_penalty, defaults.repetition_penalty),
        "presence_penalty": _given(request.presence_penalty, 0.0),
        "frequency_penalty": _given(request.frequency_penalty, 0.0),
        "logit_bias": _logit_bias(request.logit_bias or {}),
        "allowed_token_ids": None if request.allowed_token_ids is None else tuple(request.allowed_token_ids),
        "bad_words": tuple(_given(request.bad_words, [])),
        "temperature": _given(request.temperature, defaults.temperature),
        "top_k": _given(request.top_k, defaults.top_k),
        "top_p": _given(request.top_p, defaults.top_p),
        "min_p": _given(request.min_p, defaults.min_p),
        "typical_p": _given(request.typical_p, defaults.typical_p),
    }


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    biases = {}
    for name, bias in given.items():
        if _TOKEN_ID.fullmatch(name) is None:
            raise _invalid("logit_bias", "The keys of logit_bias are token ids: integers from 0, as strings.")
        biases[int(name)] = bias
    return biases


def _log_probs(request: CompletionRequest, most: int) -> dict[str, Any]:
    """`echo` with `logprobs` shows those of the prompt, so it asks for them too."""
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(request, name)
        if count is not None and not 0 <= count <= most:
            raise _invalid(name, f"{name} must be from 0 to {most} here.")
    if request.stream and request.prompt_logprobs is not None:
        raise _invalid("prompt_logprobs", "prompt_logprobs cannot be streamed.")
    of_prompt = [request.prompt_logprobs, request.logprobs if request.echo else None]
    return {
        "logprobs": request.logprobs,
        "prompt_logprobs": max((count for count in of_prompt if count is not None), default=None),
    }


def _invalid(param: str, reason: str) -> ApiError:
    return ApiError("invalid_value", param=param, reason=reason)


def _given(value: T | None, default: T) -> T:
    return default if value is None else value
