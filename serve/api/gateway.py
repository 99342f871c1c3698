"""The HTTP side of a replica: routes, token check, body size limit, time limit, and errors as problem documents."""

import asyncio
import hashlib
import hmac
import logging
import time
from dataclasses import dataclass
from typing import Protocol

from fastapi import Depends, FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recsys.config.service import ServiceConfig
from serve.api.problems import PROBLEM_TYPE, Answer, RefusedError, busy
from serve.api.protocol import ModelInfo, RecommendRequest, ScoreRequest, UserRequest, read_request
from serve.batcher import DeadlineError, OverloadedError

MAX_LENGTH_DIGITS = 18

_ENDPOINTS = "POST /v1/recommend, POST /v1/score, GET /v1/model, GET /livez, GET /readyz"
ROUTING_ERRORS = {
    404: f"no such path; available: {_ENDPOINTS}",
    405: f"this path does not allow that method; available: {_ENDPOINTS}",
}

logger = logging.getLogger("ray.serve")


class Backend(Protocol):
    """What answers the requests: the replica."""

    async def ask(self, request: UserRequest, deadline: float) -> Answer:
        """Answer a request before the deadline, a time of `time.monotonic`."""

    @property
    def info(self) -> ModelInfo:
        """The served version; raises RuntimeError if none is loaded."""


def build_http_app(service: ServiceConfig, token_digest: str, backend: Backend) -> FastAPI:
    """Build the ASGI application; `token_digest` is the token's SHA-256."""
    gateway = Gateway(service, token_digest, backend)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    authorized = [Depends(gateway.check_token)]
    app.add_api_route("/v1/recommend", gateway.recommend, methods=["POST"], dependencies=authorized)
    app.add_api_route("/v1/score", gateway.score, methods=["POST"], dependencies=authorized)
    app.add_api_route("/v1/model", gateway.model, methods=["GET"], dependencies=authorized)
    app.add_api_route("/livez", gateway.live, methods=["GET"])
    app.add_api_route("/readyz", gateway.ready, methods=["GET"])
    app.add_middleware(BodyCap, max_body_bytes=service.max_body_bytes)
    app.add_exception_handler(HTTPException, _routing_error)
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

    async def recommend(self, request: Request) -> Response:
        """Answer with the k best items."""
        return await self._answer(request, RecommendRequest)

    async def score(self, request: Request) -> Response:
        """Answer with the candidates' scores."""
        return await self._answer(request, ScoreRequest)

    async def model(self) -> Response:
        """Return the `ModelInfo` of the served version."""
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

    async def _answer(self, request: Request, kind: type[UserRequest]) -> Response:
        """Read, parse and answer a request within `service.request_timeout_seconds`."""
        seconds = self.service.request_timeout_seconds
        deadline = time.monotonic() + seconds
        parsed = read_request(kind, await self._read(request, seconds), self.service)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return respond(await self.backend.ask(parsed, deadline))
        except OverloadedError as error:
            raise busy("too many requests at the moment", seconds=error.seconds) from None
        except (TimeoutError, DeadlineError):
            raise RefusedError(504, f"no answer within {seconds:g} s (service.request_timeout_seconds)") from None

    async def _read(self, request: Request, seconds: float) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusedError(415, "the content type must be application/json")
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise RefusedError(415, "the body must not be compressed; send it without Content-Encoding")
        try:
            async with asyncio.timeout(seconds):
                return await request.body()
        except TimeoutError:
            raise RefusedError(408, f"the body did not arrive within {seconds:g} s") from None
        except ClientDisconnect:
            raise RefusedError(400, "the body ended early") from None


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

        async def receive_counted() -> Message:
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


async def _routing_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return respond(Answer.problem(error.status_code, ROUTING_ERRORS.get(error.status_code, error.detail)), dict(error.headers or {}))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return respond(error.answer, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    return respond(Answer.problem(500, "the service failed to answer; its log says why"))
