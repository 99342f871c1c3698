"""The OpenAPI document: complete, resolvable, and equal to what the routes take."""

import json
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from recsys.config.service import ServiceConfig
from serve.api.gateway import build_http_app
from serve.api.openapi import ROUTES, Route
from serve.api.parsing import read_request
from tests.unit.serve.api.test_gateway import Backend


def app_of(**service: Any) -> FastAPI:
    return build_http_app(ServiceConfig(**service), "digest", Backend())


@pytest.mark.parametrize("route", [route for route in ROUTES if route.request], ids=lambda route: route.name)
def test_examples_are_valid_requests(route: Route) -> None:
    assert route.request is not None
    read_request(route.request, json.dumps(route.example).encode(), ServiceConfig())


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        return {value for key, value in node.items() if key == "$ref"}.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


def test_the_document_names_every_route_and_resolves() -> None:
    document = TestClient(app_of()).get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(route.method, route.path) for route in ROUTES}
    schemas = document["components"]["schemas"]
    assert references(document) <= {f"#/components/schemas/{name}" for name in schemas}
    assert set(schemas["RecommendRequest"]["properties"]) >= {"user_id", "limit", "filter", "page_token"}
    for route in ROUTES:
        operation = document["paths"][route.path][route.method.lower()]
        assert bool(operation.get("security")) == route.needs_token
        assert ("requestBody" in operation) == (route.request is not None)


@pytest.mark.parametrize("docs", [True, False])
def test_the_page_is_self_contained_and_can_be_turned_off(docs: bool) -> None:
    client = TestClient(app_of(docs=docs))
    page = client.get("/docs")
    assert page.status_code == (200 if docs else 404)
    if docs:
        assert "https://" not in page.text
        script = client.get("/static-offline-docs/swagger-ui-bundle.js")
        assert script.status_code == 200
        assert len(script.content) > 100_000
