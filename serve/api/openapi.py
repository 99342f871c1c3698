"""The routes of the service, and the OpenAPI document and page that describe them."""

import inspect
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
from recsys.filters import SCHEMA
from serve.api.problems import PROBLEM_TYPE, Problem
from serve.api.protocol import (
    COMPONENT,
    BatchRequest,
    BatchResponse,
    Done,
    EventsRequest,
    EventsResponse,
    ItemList,
    MergeRequest,
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
    409: "The served version does not have what was asked for: an attribute, an event kind, a column, queries",
    408: "The body arrives too slowly",
    413: "The body is too long",
    415: "The body is not application/json, or compressed",
    422: "A rule is broken; `detail` names the key, the value and the rule",
    503: "Too many requests; see Retry-After",
    504: "No answer in time",
}


@dataclass(frozen=True)
class Route:
    """One endpoint; `name` is the gateway's method, if it has one of this name. Others hand their `request` to the backend."""

    method: str
    path: str
    name: str
    summary: str
    tag: str
    response: type[BaseModel] | None = None
    request: type[Message] | None = None
    example: dict[str, Any] | None = None
    needs_token: bool = True
    status: int = 200

    @property
    def documentation(self) -> dict[str, Any]:
        """Return what FastAPI documents of the route."""
        content = {"application/json": {"schema": _reference(self.response) if self.response else {"type": "object"}}}
        responses: dict[int | str, Any] = {self.status: {"description": "OK", "content": content}}
        if self.needs_token:
            problem = {PROBLEM_TYPE: {"schema": _reference(Problem)}}
            responses |= {status: {"description": text, "content": problem} for status, text in REFUSALS.items()}
        extra: dict[str, Any] = {"security": [{SCHEME: []}]} if self.needs_token else {}
        if self.request:
            body = {"schema": _reference(self.request), "example": self.example}
            extra["requestBody"] = {"required": True, "content": {"application/json": body}}
        named = {"name": self.name, "operation_id": self.name, "summary": self.summary, "tags": [self.tag], "status_code": self.status}
        return {**named, "description": inspect.getdoc(self.request) or "", "responses": responses, "openapi_extra": extra}


_CANDIDATES = {"user_id": "196", "candidates": ["50", "181"]}
_EVENT = {"event_id": "7d1c", "user_id": "196", "item_id": "50", "event": "purchase"}

ROUTES = (
    Route(
        *("POST", "/v1/recommend", "recommend", "The best items for a user", "lists", ItemList, RecommendRequest),
        example={"user_id": "196", "limit": 3, "filter": {"genre": ["Drama", "War"], "year": {"gte": 1990}}},
    ),
    Route(
        *("POST", "/v1/recommend:batch", "recommend_batch", "Lists for several users at once", "lists", BatchResponse, BatchRequest),
        example={"requests": [{"user_id": "196"}, {"user_id": "22"}], "distinct": True},
    ),
    Route("POST", "/v1/rank", "rank", "Candidates from best to worst", "lists", ItemList, RankRequest, _CANDIDATES),
    Route("POST", "/v1/score", "score", "All scores of candidates, in their order", "lists", ScoreResponse, ScoreRequest, _CANDIDATES),
    Route("GET", "/v1/items/{item_id}/similar", "similar", "The items most similar to one", "lists", ItemList),
    Route(
        *("POST", "/v1/events", "events", "Record what users did", "users", EventsResponse, EventsRequest),
        example={"events": [_EVENT]},
        status=202,
    ),
    Route(
        *("POST", "/v1/sessions/{session_id}/merge", "merge", "Give a session's events to a user", "users", Done, MergeRequest),
        example={"user_id": "196"},
    ),
    Route("DELETE", "/v1/users/{user_id}", "erase", "Erase a user", "users", Done),
    Route("GET", "/v1/model", "model", "The served version and what it reads", "operation", ModelInfo),
    Route("GET", "/livez", "live", "Whether the process takes requests", "operation", needs_token=False),
    Route("GET", "/readyz", "ready", "Whether a version is loaded", "operation", needs_token=False),
)


def new_app(service: ServiceConfig) -> FastAPI:
    """Return an application without routes that describes them at /openapi.json and, with `service.docs`, at /docs."""
    settings: dict[str, Any] = {"title": "recsys", "version": recsys.__version__, "redirect_slashes": False}
    app = (
        FastAPIOffline(redoc_url=None, **settings)
        if service.docs
        else FastAPI(docs_url=None, redoc_url=None, openapi_url="/openapi.json", **settings)
    )
    app.openapi = partial(_document, app, service)  # type: ignore[method-assign]
    return app


def _document(app: FastAPI, service: ServiceConfig) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document; FastAPI does not know the models, since the gateway parses and encodes by itself."""
    if not app.openapi_schema:
        document = get_openapi(title=app.title, version=app.version, openapi_version="3.1.0", routes=app.routes)
        requests = [(route.request, "validation") for route in ROUTES if route.request]
        responses = [(route.response, "serialization") for route in ROUTES if route.response]
        _, schemas = models_json_schema([*requests, *responses, (Problem, "serialization")], ref_template=REFERENCE)  # type: ignore[list-item]
        components = document.setdefault("components", {})
        components["schemas"] = _with_limits(_with_components(schemas["$defs"]), service) | {"Filter": SCHEMA}
        for parameter in document["paths"]["/v1/items/{item_id}/similar"]["get"]["parameters"]:
            if parameter["name"] == "limit":
                parameter["schema"]["maximum"] = service.max_k
            if parameter["name"] == "filter":
                del parameter["schema"]
                parameter["content"] = {"application/json": {"schema": {"$ref": REFERENCE.format(model="Filter")}}}
        components["securitySchemes"] = {SCHEME: {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = document
    return app.openapi_schema


def _with_components(node: Any) -> Any:
    """Replace what names a component by a reference to it."""
    if isinstance(node, list):
        return [_with_components(part) for part in node]
    if not isinstance(node, dict):
        return node
    if COMPONENT in node:
        return {"$ref": REFERENCE.format(model=node[COMPONENT])}
    return {key: _with_components(value) for key, value in node.items()}


def _with_limits(schemas: dict[str, Any], service: ServiceConfig) -> dict[str, Any]:
    """Add the limits that the config sets to the schemas of requests."""
    for schema in schemas.values():
        fields = schema.get("properties", {})
        if "limit" in fields:
            fields["limit"]["maximum"] = service.max_k
        for name in {"candidates", "include_ids", "exclude_ids"}.intersection(fields):
            of_list = next((part for part in fields[name].get("anyOf", ()) if part.get("type") == "array"), fields[name])
            of_list["maxItems"] = service.max_candidates
    return schemas


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REFERENCE.format(model=model.__name__)}
