"""The HTTP side of a replica: routes, token check, body size limit, time limit, and errors as problem documents."""

import asyncio
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import Depends, FastAPI, Path, Query
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from recsys.config.service import ServiceConfig
from recsys.schema import MAX_ID_CHARACTERS, normalize_id
from serve.api.openapi import ROUTES, Route, new_app
from serve.api.parsing import read_request
from serve.api.problems import PROBLEM_TYPE, Answer, RefusedError, busy
from serve.api.protocol import (
    Done,
    EventResult,
    EventsRequest,
    EventsResponse,
    MergeRequest,
    Message,
    ModelInfo,
    PostedEvent,
    SimilarRequest,
)
from serve.batcher import DeadlineError, OverloadedError, Timed
from serve.live.changes import Change, Erased, Happened, Merged, hash_of, session_key, user_key

MAX_LENGTH_DIGITS = 18

Posted = TypeVar("Posted", bound=Message)
PathId = Annotated[str, Path(min_length=1, max_length=MAX_ID_CHARACTERS)]

logger = logging.getLogger("ray.serve")


class Backend(Protocol):
    """What answers the requests: the replica."""

    async def ask(self, request: Message, deadline: float) -> Timed[Answer]:
        """Answer a request before the deadline, a time of `time.monotonic`."""

    async def record(self, changes: Sequence[Change]) -> list[bool]:
        """Record changes durably and return which are new."""

    @property
    def info(self) -> ModelInfo:
        """The served version; raises RuntimeError if none is loaded."""


def build_http_app(service: ServiceConfig, token_digest: str, backend: Backend) -> FastAPI:
    """Build the ASGI application; `token_digest` is the token's SHA-256."""
    gateway = Gateway(service, token_digest, backend)
    app = new_app(service)
    for route in ROUTES:
        handler = getattr(gateway, route.name, None) or gateway.answering(route)
        app.add_api_route(
            route.path,
            handler,
            methods=[route.method],
            dependencies=[Depends(gateway.check_token)] if route.needs_token else [],
            **route.documentation,
        )
    app.add_middleware(BodyCap, max_body_bytes=service.max_body_bytes)
    app.add_exception_handler(HTTPException, _routing_error)
    app.add_exception_handler(RequestValidationError, _bad_parameter)
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(Exception, _unexpected)
    return app


@dataclass(frozen=True)
class Gateway:
    """The handlers of the HTTP endpoints."""

    service: ServiceConfig
    token_digest: str
    backend: Backend

    async def check_token(self, request: Request) -> None:
        """Refuse a request without the bearer token; digests are compared in constant time."""
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not token.strip():
            message = "the bearer token is missing; send the header Authorization: Bearer TOKEN"
            raise RefusedError(401, message, {"WWW-Authenticate": "Bearer"})
        if not hmac.compare_digest(digest_of(token.strip().encode("latin-1")), self.token_digest):
            raise RefusedError(403, "the bearer token is not valid for this service")

    def answering(self, route: Route) -> Callable[[Request], Any]:
        """Return the handler of a route whose body is a request for the backend."""
        kind = route.request
        assert kind is not None

        async def handle(request: Request) -> Response:
            deadline = self._deadline()
            return await self._ask(await self._parsed(kind, request), deadline)

        return handle

    async def similar(
        self,
        item_id: PathId,
        limit: Annotated[int, Query(ge=1)] = 10,
        filter: str | None = Query(None, description="a filter, as JSON"),
    ) -> Response:
        """Return the items most similar to one."""
        body: dict[str, Any] = {"item_id": item_id, "limit": limit}
        if filter is not None:
            try:
                body["filter"] = json.loads(filter)
            except (ValueError, RecursionError):
                raise RefusedError(422, "filter: is not JSON") from None
        return await self._ask(read_request(SimilarRequest, json.dumps(body).encode(), self.service), self._deadline())

    async def events(self, request: Request) -> Response:
        """Record events, each at most once."""
        posted = await self._parsed(EventsRequest, request)
        is_new = await self._record([_happened(event, self.backend.info.default_event) for event in posted.events])
        results = [
            EventResult(event_id=event.event_id, status="accepted" if new else "duplicate")
            for event, new in zip(posted.events, is_new, strict=True)
        ]
        return respond(Answer.of(EventsResponse(results=results), 202))

    async def merge(self, session_id: PathId, request: Request) -> Response:
        """Give a session's events to a user."""
        posted = await self._parsed(MergeRequest, request)
        change_id = uuid.uuid4().hex
        await self._record([Merged(change_id=change_id, session=session_key(normalize_id(session_id)), key=user_key(posted.user_id))])
        return respond(Answer.of(Done()))

    async def erase(self, user_id: PathId) -> Response:
        """Erase a user: events since the export are deleted, and what the export knows is not used any more."""
        await self._record([Erased(change_id=uuid.uuid4().hex, key_hash=hash_of(user_key(normalize_id(user_id))))])
        return respond(Answer.of(Done()))

    async def _record(self, changes: Sequence[Change]) -> list[bool]:
        try:
            async with asyncio.timeout(self.service.request_timeout_seconds):
                return await self.backend.record(changes)
        except TimeoutError:
            raise busy("the log of events does not answer") from None

    async def model(self) -> Response:
        """Return the served version and what it reads."""
        return respond(Answer.of(self.backend.info))

    async def live(self) -> Response:
        """Answer 200: this process takes requests."""
        return respond(Answer(200, b'{"status":"ok"}'))

    async def ready(self) -> Response:
        """Answer 200 if a version is loaded."""
        try:
            version = self.backend.info.version
        except RuntimeError as error:
            raise busy(str(error)) from None
        return respond(Answer(200, f'{{"status":"ok","version":"{version}"}}'.encode()))

    async def _ask(self, request: Message, deadline: float) -> Response:
        """Answer a parsed request before the deadline."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                timed = await self.backend.ask(request, deadline)
        except OverloadedError as error:
            raise busy("too many requests at the moment", seconds=error.seconds) from None
        except (TimeoutError, DeadlineError):
            seconds = self.service.request_timeout_seconds
            raise RefusedError(504, f"no answer within {seconds:g} s (service.request_timeout_seconds)") from None
        waited, computed = 1000 * timed.waited_seconds, 1000 * timed.computed_seconds
        return respond(timed.result, {"Server-Timing": f"queue;dur={waited:.1f}, compute;dur={computed:.1f}"})

    def _deadline(self) -> float:
        return time.monotonic() + self.service.request_timeout_seconds

    async def _parsed(self, kind: type[Posted], request: Request) -> Posted:
        """Read and parse a JSON body."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusedError(415, "the content type must be application/json")
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise RefusedError(415, "the body must not be compressed; send it without Content-Encoding")
        seconds = self.service.request_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                body = await request.body()
        except TimeoutError:
            raise RefusedError(408, f"the body did not arrive within {seconds:g} s") from None
        except ClientDisconnect:
            raise RefusedError(400, "the body ended early") from None
        return read_request(kind, body, self.service)


class BodyCap:
    """ASGI middleware that refuses a body above the limit, by its declared length or as soon as too many bytes arrive."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._message = f"the body has more than {max_body_bytes} bytes (service.max_body_bytes)"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the bytes of an HTTP body while passing it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdecimal() or len(declared) > MAX_LENGTH_DIGITS:
            await respond(Answer.problem(400, "the Content-Length is not a possible number of bytes"))(scope, receive, send)
            return
        if int(declared) > self._max_body_bytes:
            await respond(Answer.problem(413, self._message))(scope, receive, send)
            return
        num_bytes = 0

        async def receive_counted() -> AsgiMessage:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise RefusedError(413, self._message)
            return message

        await self._app(scope, receive_counted, send)


def digest_of(token: bytes) -> str:
    """Return the SHA-256 of a token."""
    return hashlib.sha256(token).hexdigest()


def respond(answer: Answer, headers: dict[str, str] | None = None) -> Response:
    """Return an answer as an HTTP response."""
    return Response(answer.body, answer.status, headers, media_type="application/json" if answer.status < 400 else PROBLEM_TYPE)


def _happened(event: PostedEvent, default: str) -> Happened:
    key = user_key(event.user_id) if event.user_id is not None else session_key(str(event.session_id))
    return Happened(
        change_id=event.event_id,
        key=key,
        item_id=event.item_id,
        event=event.event or default,
        timestamp=int(time.time()) if event.timestamp is None else event.timestamp,
        value=event.value,
    )


async def _routing_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    available = ", ".join(f"{route.method} {route.path}" for route in ROUTES)
    details = {404: f"no such path; available: {available}", 405: f"this path does not allow that method; available: {available}"}
    return respond(Answer.problem(error.status_code, details.get(error.status_code, error.detail)), dict(error.headers or {}))


async def _bad_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return respond(Answer.problem(422, f"{first['loc'][-1]}: {first['msg']}"))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return respond(error.answer, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    return respond(Answer.problem(500, "the service failed to answer; its log says why"))
