"""The routes of the service, and the OpenAPI document and page that describe them."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import recsys
from recsys.config.service import ServiceConfig
from serve.api.problems import PROBLEM_TYPE, Problem
from serve.api.protocol import (
    BatchRequest,
    BatchResponse,
    ItemList,
    Message,
    ModelInfo,
    RankRequest,
    RecommendRequest,
    ScoreRequest,
    ScoreResponse,
)

REFERENCE = "#/components/schemas/{model}"
SCHEME = "token"
REFUSALS = {
    400: "The body is not JSON",
    401: "The token is missing",
    403: "The token is not valid",
    404: "No such item",
    408: "The body arrives too slowly",
    413: "The body is too long",
    415: "The body is not application/json, or compressed",
    422: "A rule is broken; `detail` names the key, the value and the rule",
    503: "Too many requests; see Retry-After",
    504: "No answer in time",
}


@dataclass(frozen=True)
class Route:
    """One endpoint. `name` is the gateway's method, unless the body is a `request` for the backend."""

    method: str
    path: str
    name: str
    summary: str
    response: type[BaseModel] | None = None
    request: type[Message] | None = None
    needs_token: bool = True

    @property
    def documentation(self) -> dict[str, Any]:
        """Return what FastAPI documents of the route."""
        content = {"application/json": {"schema": _reference(self.response) if self.response else {"type": "object"}}}
        responses: dict[int | str, Any] = {200: {"description": "OK", "content": content}}
        if self.needs_token:
            problem = {PROBLEM_TYPE: {"schema": _reference(Problem)}}
            responses |= {status: {"description": text, "content": problem} for status, text in REFUSALS.items()}
        extra: dict[str, Any] = {"security": [{SCHEME: []}]} if self.needs_token else {}
        if self.request:
            extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": _reference(self.request)}}}
        return {"name": self.name, "summary": self.summary, "responses": responses, "openapi_extra": extra, "operation_id": self.name}


ROUTES = (
    Route("POST", "/v1/recommend", "recommend", "The best items for a user", ItemList, RecommendRequest),
    Route("POST", "/v1/recommend:batch", "recommend_batch", "Lists for several users at once", BatchResponse, BatchRequest),
    Route("POST", "/v1/rank", "rank", "Candidates from best to worst", ItemList, RankRequest),
    Route("POST", "/v1/score", "score", "All scores of candidates, in their order", ScoreResponse, ScoreRequest),
    Route("GET", "/v1/items/{item_id}/similar", "similar", "The items most similar to one", ItemList),
    Route("GET", "/v1/model", "model", "The served version and what it reads", ModelInfo),
    Route("GET", "/livez", "live", "Whether the process takes requests", needs_token=False),
    Route("GET", "/readyz", "ready", "Whether a version is loaded", needs_token=False),
)


def new_app(service: ServiceConfig) -> FastAPI:
    """Return an application without routes that describes them at /openapi.json and, with `service.docs`, at /docs."""
    settings: dict[str, Any] = {"title": "recsys", "version": recsys.__version__, "redirect_slashes": False}
    app = (
        FastAPIOffline(redoc_url=None, **settings)
        if service.docs
        else FastAPI(docs_url=None, redoc_url=None, openapi_url="/openapi.json", **settings)
    )
    app.openapi = partial(_document, app)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document; FastAPI does not know the models, since the gateway parses and encodes by itself."""
    if not app.openapi_schema:
        document = get_openapi(title=app.title, version=app.version, openapi_version="3.1.0", routes=app.routes)
        requests = [(route.request, "validation") for route in ROUTES if route.request]
        responses = [(route.response, "serialization") for route in ROUTES if route.response]
        _, schemas = models_json_schema([*requests, *responses, (Problem, "serialization")], ref_template=REFERENCE)  # type: ignore[list-item]
        components = document.setdefault("components", {})
        components["schemas"] = schemas["$defs"]
        components["securitySchemes"] = {SCHEME: {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = document
    return app.openapi_schema


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REFERENCE.format(model=model.__name__)}
