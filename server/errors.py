"""Every error that an HTTP client can see: one catalogue of codes, one JSON shape, nothing of the request echoed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

import msgspec

MAX_MESSAGE_BYTES: Final = 512
MAX_NAME_CHARS: Final = 64

JSON_CONTENT_TYPE: Final = b"application/json"


class CatalogueEntry(NamedTuple):
    status: int
    message: str
    """A format string; what is filled in is an integer of ours or was bounded by `printable_name`."""
    retry_after: float | None = None
    """Seconds after which trying again makes sense."""


CATALOGUE: Final[Mapping[str, CatalogueEntry]] = {
    # Framing and transport
    "bad_request": CatalogueEntry(400, "The request is not valid HTTP/1.1: {reason}."),
    "invalid_host": CatalogueEntry(400, "This server does not answer to that Host; see --allowed-hosts."),
    "not_found": CatalogueEntry(404, "No such route."),
    "method_not_allowed": CatalogueEntry(405, "This route does not take that method."),
    "body_timeout": CatalogueEntry(408, "The request body did not arrive within {seconds:g} seconds."),
    "head_timeout": CatalogueEntry(408, "The request header did not arrive within {seconds:g} seconds."),
    "body_too_large": CatalogueEntry(413, "The request body is larger than {limit} bytes."),
    "unsupported_media_type": CatalogueEntry(415, "Send the body as application/json in UTF-8."),
    "unsupported_content_encoding": CatalogueEntry(415, "Compressed request bodies are not supported."),
    "headers_too_large": CatalogueEntry(431, "The request header exceeds {max_bytes} bytes or {max_headers} fields."),
    # Authentication
    "invalid_api_key": CatalogueEntry(401, "Send a valid key in one header: Authorization: Bearer <key>."),
    "too_many_auth_failures": CatalogueEntry(429, "Too many failed attempts to authenticate.", 1.0),
    # JSON and fields
    "invalid_json": CatalogueEntry(400, "The request body is not valid JSON in UTF-8."),
    "invalid_body": CatalogueEntry(400, "The request body must be a JSON object."),
    "json_too_complex": CatalogueEntry(400, "The JSON has more than {limit} {what}."),
    "duplicate_key": CatalogueEntry(400, "An object in the JSON has the same key twice."),
    "non_finite_number": CatalogueEntry(400, "NaN and Infinity are not numbers in JSON."),
    "missing_required_parameter": CatalogueEntry(400, "The field '{name}' is missing."),
    "invalid_type": CatalogueEntry(400, "The field '{name}' must be {expected}."),
    "invalid_value": CatalogueEntry(400, "{reason}"),
    "unknown_parameter": CatalogueEntry(400, "The field '{name}' is unknown, and this server runs with --strict."),
    "unsupported_parameter": CatalogueEntry(
        400, "The field '{name}' is not supported with this value; leave it out or send its neutral value."
    ),
    "empty_prompt": CatalogueEntry(400, "A prompt must have at least one token."),
    "token_id_out_of_range": CatalogueEntry(400, "Token ids must be from 0 to {highest}."),
    "context_length_exceeded": CatalogueEntry(
        400, "This model's maximum context length is {context} tokens. However, you requested {requested}."
    ),
    "model_not_found": CatalogueEntry(404, "The model `{name}` does not exist."),
    # State of this server
    "queue_full": CatalogueEntry(503, "The queue is full. Try again later.", 1.0),
    "queue_timeout": CatalogueEntry(503, "The request waited too long for its first token.", 2.0),
    "generation_timeout": CatalogueEntry(503, "The request ran longer than this server allows.", 2.0),
    "too_many_connections": CatalogueEntry(503, "Too many connections are open.", 1.0),
    "draining": CatalogueEntry(503, "The server is shutting down and takes no new requests.", 5.0),
    "server_shutdown": CatalogueEntry(503, "The server was shut down before the request was finished.", 5.0),
    "engine_unavailable": CatalogueEntry(503, "The engine is not running.", 5.0),
    "no_token_allowed": CatalogueEntry(400, "The constraints of this request leave no token that may come next."),
    "grammar_too_complex": CatalogueEntry(400, "The grammar is too complex."),
    "invalid_grammar": CatalogueEntry(400, "{reason}"),
    "grammar_too_large": CatalogueEntry(400, "{reason}"),
    "grammar_timeout": CatalogueEntry(400, "The grammar took too long to compile."),
    "structured_output_unavailable": CatalogueEntry(503, "Structured output is not available at the moment.", 5.0),
    "numerical_error": CatalogueEntry(500, "The model computed a value that is not a number for this request."),
    "internal_error": CatalogueEntry(500, "An internal error occurred. It has been logged."),
}

ERROR_TYPES: Final[Mapping[int, str]] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}


class ErrorObject(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorObject


class ApiError(Exception):
    """An answer from the catalogue. `values` fill the message; `param` names the field at fault."""

    def __init__(self, code: str, /, *, param: str | None = None, **values: object) -> None:
        entry = CATALOGUE[code]
        super().__init__(code)
        self.code = code
        self.param = param
        self.status = entry.status
        self.retry_after = entry.retry_after
        self.message = _bounded(entry.message.format(**values))

    @property
    def type(self) -> str:
        return ERROR_TYPES.get(self.status, "invalid_request_error")

    def body(self) -> bytes:
        return msgspec.json.encode(ErrorBody(ErrorObject(self.message, self.type, self.param, self.code)))

    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"content-type", JSON_CONTENT_TYPE)]
        if self.retry_after is not None:
            headers.append((b"retry-after", b"%d" % max(1, round(self.retry_after))))
            headers.append((b"retry-after-ms", b"%d" % round(self.retry_after * 1000)))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers


class RejectedByEngine(ApiError):
    """The scheduler's own words: it knows the pool. Its messages are ours and bounded."""

    def __init__(self, message: str, code: str, param: str) -> None:
        super().__init__("invalid_value", param=param, reason=message)
        self.code = code


def _bounded(message: str) -> str:
    data = message.encode("utf-8", "replace")
    return message if len(data) <= MAX_MESSAGE_BYTES else data[:MAX_MESSAGE_BYTES].decode("utf-8", "ignore")


def printable_name(name: str) -> str:
    """A client's name of something, fit for a header, a log line and a message: bounded, visible ASCII, no quotes."""
    clean = re.sub(r"[^A-Za-z0-9_.:/@+-]", "?", name[:MAX_NAME_CHARS])
    return clean if len(name) <= MAX_NAME_CHARS else clean + "..."
