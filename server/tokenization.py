"""POST /tokenize and /detokenize, GET /tokenizer_info, as vLLM has them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from quire.server.context import context_of, state_of
from quire.server.errors import ApiError
from quire.server.parameters import check_model_name, check_unknown_fields
from quire.server.prompts import check_text_length, check_token_ids
from quire.server.responses import json_response, warnings_for
from quire.server.schemas import DetokenizeRequest, TokenizeRequest, parse_body

if TYPE_CHECKING:
    from quire.engine.tokenizer import TokenizerPool

router = APIRouter()

_PIECES_AT_ONCE: Final = 2048


class Tokenized(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


class Detokenized(msgspec.Struct):
    prompt: str
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


class TokenizerInfo(msgspec.Struct):
    """What clients read of tokenizer_config.json."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: None = None


@router.post("/tokenize")
async def tokenize(http_request: Request) -> Response:
    context, state = context_of(http_request), state_of(http_request)
    request = await parse_body(state.body, TokenizeRequest, context.off_loop)
    ignored = check_unknown_fields(request, context.settings)
    check_model_name(request.model, context.settings)
    if request.messages is not None:
        raise ApiError("unsupported_parameter", param="messages", name="messages")
    if request.prompt is None:
        raise ApiError("missing_required_parameter", param="prompt", name="prompt")
    max_model_len = context.client.info.max_model_len
    check_text_length(request.prompt, max_model_len)
    tokenizer = context.client.tokenizer
    token_ids = await tokenizer.encode(request.prompt, request.add_special_tokens is not False)
    body = Tokenized(len(token_ids), max_model_len, token_ids, None, warnings_for(ignored))
    if request.return_token_strs:
        body.token_strs = await _pieces(tokenizer, token_ids)
    return json_response(body, ignored)


async def _pieces(pool: TokenizerPool, token_ids: list[int]) -> list[str]:
    """The vocabulary's spelling of each token. The tokenizer belongs to the event loop, which gets its turns."""
    pieces: list[str] = []
    for start in range(0, len(token_ids), _PIECES_AT_ONCE):
        part = token_ids[start : start + _PIECES_AT_ONCE]
        pieces += [pool.tokenizer.id_to_piece(token_id) or "" for token_id in part]
        await asyncio.sleep(0)
    return pieces


@router.get("/tokenizer_info")
async def tokenizer_info(http_request: Request) -> Response:
    tokenizer = context_of(http_request).client.tokenizer.tokenizer
    return json_response(TokenizerInfo(tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token))


@router.post("/detokenize")
async def detokenize(http_request: Request) -> Response:
    context, state = context_of(http_request), state_of(http_request)
    request = await parse_body(state.body, DetokenizeRequest, context.off_loop)
    ignored = check_unknown_fields(request, context.settings)
    check_model_name(request.model, context.settings)
    info = context.client.info
    if len(request.tokens) > info.max_model_len:
        requested = f"{len(request.tokens)} tokens"
        raise ApiError("context_length_exceeded", param="tokens", context=info.max_model_len, requested=requested)
    text = ""
    if request.tokens:
        check_token_ids(request.tokens, info.vocab_size, param="tokens")
        text = await context.client.tokenizer.decode(request.tokens, False)
    return json_response(Detokenized(text, warnings_for(ignored)), ignored)
