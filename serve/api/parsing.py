"""Parses request bodies and explains in one line what is wrong with them."""

import json
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from recsys.config.service import ServiceConfig
from serve.api.problems import RefusedError
from serve.api.protocol import Message

MAX_VALUES = 36_000
"""Keys and values of a body; the longest history has fewer."""

MAX_SHOWN_CHARACTERS = 60

Request = TypeVar("Request", bound=Message)


def read_request(kind: type[Request], body: bytes, service: ServiceConfig) -> Request:
    """Parse and validate a JSON body.

    Raises:
        RefusedError: the body is not JSON (400) or breaks a rule (422); the message is one line.
    """
    check_size(body)
    try:
        return kind.model_validate_json(body, context=service.model_dump(include={"max_k", "max_candidates"}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        raise RefusedError(400, f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    raise RefusedError(422, _explain(kind, dict(first)))


def check_size(body: bytes) -> None:
    """Refuse a body with too many values before it is parsed: each key of an object and each value of a list costs time to check.

    Raises:
        RefusedError: there are more than MAX_VALUES commas and colons, some of which may be within texts.
    """
    number = body.count(b",") + body.count(b":")
    if number > MAX_VALUES:
        raise RefusedError(422, f"the body has about {number} keys and values; at most {MAX_VALUES}")


def _explain(kind: type[BaseModel], first: dict[str, Any]) -> str:
    """Describe a broken rule in one line: key, value, rule."""
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}" if key else str(first["ctx"]["error"])
    if first["type"] == "extra_forbidden":
        return f"{_shorten(key)}: unknown key; known: {', '.join(_fields_at(kind, first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"{key}: is missing"
    return f"{key or 'the body'} = {_shorten(json.dumps(first['input'], default=str))}: {first['msg']}"


def _fields_at(kind: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Return the keys of the object at a path of a request."""
    for part in path:
        if isinstance(part, str):
            found = [model for model in _models_in(kind.model_fields[part].annotation)]
            kind = found[0]
    return list(kind.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."
