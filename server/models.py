"""GET /v1/models."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from quire.server.context import context_of
from quire.server.errors import ApiError, printable_name
from quire.server.responses import json_response

router = APIRouter()


class ModelPermission(msgspec.Struct, kw_only=True):
    id: str
    object: str = "model_permission"
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = False
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "quire"
    root: str
    parent: str | None = None
    max_model_len: int
    permission: list[ModelPermission]


class ModelList(msgspec.Struct):
    object: str
    data: list[ModelCard]


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    return json_response(ModelList("list", _cards(request)))


@router.get("/v1/models/{name:path}")
async def retrieve_model(request: Request, name: str) -> Response:
    for card in _cards(request):
        if card.id == name:
            return json_response(card)
    raise ApiError("model_not_found", param="model", name=printable_name(name))


def _cards(request: Request) -> list[ModelCard]:
    context = context_of(request)
    return [
        ModelCard(
            id=name,
            created=context.created,
            root=context.settings.model_name,
            max_model_len=context.client.info.max_model_len,
            permission=[ModelPermission(id=f"modelperm-{index}", created=context.created)],
        )
        for index, name in enumerate(context.settings.served_model_names)
    ]
