"""Request bodies: strict types, bounded sizes, and a parse that answers a bad body as fast as a good one.

Types and sizes are checked here; the ranges of sampling parameters in quire.sampling_params, their one place.

The prompt is a union tried from left to right whose lists stop at their first wrong element: a 4 MiB list of token ids
that is wrong at its end costs 60 ms. (A smart union builds an error for every element of every branch: 55 MB of errors
from 1 MB. A discriminator function converts the whole list to Python objects first: 4 times the time.)
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from quire.sampling_params import MAX_ALLOWED_TOKEN_IDS, MAX_LOGIT_BIASES
from quire.server.body import Body, OffLoop
from quire.server.errors import ApiError, printable_name

MAX_PROMPTS: Final = 128
MAX_TOKEN_IDS: Final = 2**18
MAX_CACHE_SALT_BYTES: Final = 256
MAX_USER_BYTES: Final = 256
_MAX_LIST: Final = 1024

TokenIds = Annotated[list[int], Field(fail_fast=True, max_length=MAX_TOKEN_IDS)]
Prompt = Annotated[
    str
    | TokenIds
    | Annotated[list[str], Field(fail_fast=True, max_length=MAX_PROMPTS)]
    | Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_PROMPTS)],
    Field(union_mode="left_to_right"),
]
StopStrings = Annotated[
    str | Annotated[list[str], Field(fail_fast=True, max_length=_MAX_LIST)], Field(union_mode="left_to_right")
]
StopTokenIds = Annotated[list[int], Field(fail_fast=True, max_length=_MAX_LIST)]
AllowedTokenIds = Annotated[list[int], Field(fail_fast=True, max_length=MAX_ALLOWED_TOKEN_IDS)]
BadWords = Annotated[list[str], Field(fail_fast=True, max_length=_MAX_LIST)]
Choices = Annotated[list[str], Field(fail_fast=True)]
"""quire.grammar bounds their number and size."""
SchemaObject = dict[str, object]
JsonSchema = Annotated[SchemaObject | str, Field(union_mode="left_to_right")]
"""Objects keep the order of their keys, which is that of the properties in the output. A string holds the JSON."""
LogitBias = Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIASES)]
"""JSON has no integers as keys: quire.server.parameters reads them."""


def _at_most_bytes(limit: int) -> AfterValidator:
    def check(text: str) -> str:
        if len(text.encode("utf-8")) > limit:
            raise ValueError("too many bytes")
        return text

    return AfterValidator(check)


class StrictModel(BaseModel):
    """Unknown fields are kept, to be reported by name; `null` means the default wherever a default exists."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True, protected_namespaces=()
    )


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(StrictModel):
    """Of `response_format`. The schema is followed whether or not it is said to be strict."""

    name: str | None = None
    schema_object: SchemaObject | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    type: str
    json_schema: JsonSchemaFormat | None = None
    schema_object: SchemaObject | None = Field(None, alias="schema")


class StructuredOutputs(StrictModel):
    json_schema: JsonSchema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


class CompletionRequest(StrictModel):
    """POST /v1/completions: names and defaults of OpenAI and vLLM. Fields of type Any are known and not yet honoured:
    quire.server.parameters says which of their values are neutral and refuses the others."""

    prompt: Prompt
    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: StopStrings | None = None
    stop_token_ids: StopTokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_effective_params: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1), _at_most_bytes(MAX_CACHE_SALT_BYTES)] | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    typical_p: float | None = None
    logit_bias: LogitBias | None = None
    allowed_token_ids: AllowedTokenIds | None = None
    bad_words: BadWords | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_tokens_as_token_ids: bool | None = None
    num_speculative_tokens: int | None = None
    priority: Annotated[int, Field(ge=-(2**31), le=2**31 - 1)] | None = None
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:@+=/-]{1,128}$")] | None = None
    user: Annotated[str, _at_most_bytes(MAX_USER_BYTES)] | None = None

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    json_schema: JsonSchema | None = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None

    guided_whitespace_pattern: Any = None
    kv_transfer_params: Any = None
    lora_path: Any = None
    prompt_embeds: Any = None
    spaces_between_special_tokens: Any = None
    structural_tag: Any = None
    suffix: Any = None
    vllm_xargs: Any = None


class TokenizeRequest(StrictModel):
    prompt: str | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    messages: Any = None


class DetokenizeRequest(StrictModel):
    tokens: TokenIds
    model: str | None = None


M = TypeVar("M", bound=StrictModel)

_EXPECTED: Final = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
_NESTED: Final = ("response_format", "stream_options", "structured_outputs")
"""Fields whose own fields are ours: their names can be shown."""
_SCHEMA: Final = "an object, or a string that holds its JSON"
_EXPECTED_OF_UNIONS: Final = {
    "early_stopping": 'true, false or "never"',
    "guided_json": _SCHEMA,
    "json_schema": _SCHEMA,
    "prompt": "a string, an array of strings, an array of token ids, or an array of arrays of token ids",
    "stop": "a string or an array of strings",
    "structured_outputs.json": _SCHEMA,
}


async def parse_body(body: Body, model: type[M], off_loop: OffLoop) -> M:
    """The body as a `model`. Raises ApiError: the first fault found, never its input."""
    data = body.data
    try:
        return await off_loop(partial(_validate, model, data), len(data))
    finally:
        body.release()


def _validate(model: type[M], data: bytes) -> M:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
    raise _first_fault(details)


def _first_fault(details: list[ErrorDetails]) -> ApiError:
    fault = details[0]
    kind, location = fault["type"], fault["loc"]
    if kind == "json_invalid":
        return ApiError("invalid_json")
    if not location:
        return ApiError("invalid_body")
    path = [part for part in location if isinstance(part, str)]
    union = next((name for name in _EXPECTED_OF_UNIONS if path[: name.count(".") + 1] == name.split(".")), None)
    name = union or (".".join(path) if path[0] in _NESTED else path[0])
    if union is not None and kind != "missing":
        if any(detail["type"] == "too_long" for detail in details):
            return ApiError("invalid_value", param=name, reason=f"The field '{name}' has too many elements.")
        return ApiError("invalid_type", param=name, name=name, expected=_EXPECTED_OF_UNIONS[name])
    if kind == "missing":
        return ApiError("missing_required_parameter", param=name, name=name)
    if kind in _EXPECTED:
        return ApiError("invalid_type", param=name, name=name, expected=_EXPECTED[kind])
    if kind == "finite_number":
        return ApiError("non_finite_number", param=name)
    return ApiError("invalid_value", param=name, reason=f"The field '{name}' has a value out of its bounds.")


def unknown_fields(model: StrictModel, prefix: str = "") -> list[str]:
    """Names of the fields that nobody reads, those of nested objects with their path; fit to be printed."""
    names = [printable_name(prefix + name) for name in model.model_extra or ()]
    for name in sorted(model.model_fields_set & type(model).model_fields.keys()):
        value = getattr(model, name)
        if isinstance(value, StrictModel):
            names += unknown_fields(value, f"{prefix}{name}.")
    return names
