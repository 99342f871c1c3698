"""The HTTP ingress: routes, token check, body size limit, timeout, overload and one-line errors."""

import asyncio
import hashlib
import hmac
import logging
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recsys.config.service import ServiceConfig
from serve.protocol import Answer, RecommendRequest, ScoreRequest, UserRequest, read_request

ATTEMPTS = 3
"""Attempts for a request whose replica dies; requests are idempotent, so another replica may answer."""

RETRY_PAUSE_SECONDS = 0.05
RETRY_AFTER_SECONDS = 1
MAX_LENGTH_DIGITS = 18

_ENDPOINTS = "POST /v1/recommend, POST /v1/score, GET /v1/model, GET /healthz"
ROUTING_ERRORS = {
    404: f"no such path; available: {_ENDPOINTS}",
    405: f"this path does not allow that method; available: {_ENDPOINTS}",
}

logger = logging.getLogger("ray.serve")


def build_http_app(service: ServiceConfig, token_digest: str, scorer: Any) -> FastAPI:
    """Build the ASGI application; `scorer` is a handle to the scorer deployment, `token_digest` the token's SHA-256."""
    gateway = Gateway(service, token_digest, scorer)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    authorized = [Depends(gateway.check_token)]
    app.add_api_route("/v1/recommend", gateway.recommend, methods=["POST"], dependencies=authorized)
    app.add_api_route("/v1/score", gateway.score, methods=["POST"], dependencies=authorized)
    app.add_api_route("/v1/model", gateway.model, methods=["GET"], dependencies=authorized)
    app.add_api_route("/healthz", gateway.health, methods=["GET"])
    app.add_middleware(BodyCap, max_body_bytes=service.max_body_bytes)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    return app


@dataclass(frozen=True)
class Gateway:
    """The handlers of the HTTP endpoints."""

    service: ServiceConfig
    token_digest: str
    scorer: Any

    async def check_token(self, request: Request) -> None:
        """Refuse a request without the bearer token; digests are compared in constant time."""
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not token.strip():
            message = "the bearer token is missing; send the header Authorization: Bearer TOKEN"
            raise HTTPException(401, message, headers={"WWW-Authenticate": "Bearer"})
        if not hmac.compare_digest(digest_of(token.strip().encode("latin-1")), self.token_digest):
            raise HTTPException(403, "the bearer token is not valid for this service")

    async def recommend(self, request: Request) -> Response:
        """Answer with the k best items."""
        return _respond(await self._ask(self.scorer.recommend, await self._read(request, RecommendRequest)))

    async def score(self, request: Request) -> Response:
        """Answer with the candidates' scores."""
        return _respond(await self._ask(self.scorer.score, await self._read(request, ScoreRequest)))

    async def model(self) -> Response:
        """Return the `ModelInfo` of the served version."""
        return _respond(await self._ask(self.scorer.describe))

    async def health(self) -> Response:
        """Answer 200 if a scorer answers."""
        await self._ask(self.scorer.status)
        return _respond(Answer(200, b'{"status":"ok"}'))

    async def _read(self, request: Request, kind: type[UserRequest]) -> UserRequest:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "the content type must be application/json")
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise HTTPException(415, "the body must not be compressed; send it without Content-Encoding")
        seconds = self.service.request_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                body = await request.body()
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {seconds:g} s") from None
        except ClientDisconnect:
            raise HTTPException(400, "the body ended early") from None
        return read_request(kind, body, self.service)

    async def _ask(self, method: Any, *arguments: UserRequest) -> Any:
        """Call a scorer with a timeout, and turn its failures into HTTP errors."""
        seconds = self.service.request_timeout_seconds
        busy = {"Retry-After": str(RETRY_AFTER_SECONDS)}
        try:
            async with asyncio.timeout(seconds):
                return await _call_until_answered(method, arguments)
        except TimeoutError:
            raise HTTPException(504, f"no answer within {seconds:g} s (service.request_timeout_seconds)") from None
        except BackPressureError:
            raise HTTPException(503, f"too many requests at the moment; try again in {RETRY_AFTER_SECONDS} s", headers=busy) from None
        except (RayActorError, DeploymentUnavailableError):
            raise HTTPException(503, f"no scorer can be reached; try again in {RETRY_AFTER_SECONDS} s", headers=busy) from None


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
            await _respond(Answer.error(400, "the Content-Length is not a possible number of bytes"))(scope, receive, send)
            return
        if int(declared) > self._max_body_bytes:
            await _respond(Answer.error(413, self._message))(scope, receive, send)
            return
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise HTTPException(413, self._message)
            return message

        await self._app(scope, receive_counted, send)


def digest_of(token: bytes) -> str:
    """Return the SHA-256 of a token."""
    return hashlib.sha256(token).hexdigest()


async def _call_until_answered(method: Any, arguments: tuple[UserRequest, ...]) -> Any:
    """Call a scorer; if its replica dies, retry with a pause on another one."""
    for attempt in range(1, ATTEMPTS + 1):
        response = method.remote(*arguments)
        try:
            return await response
        except RayActorError:
            if attempt == ATTEMPTS:
                raise
            await asyncio.sleep(RETRY_PAUSE_SECONDS * attempt)
        except asyncio.CancelledError:  # timeout, or the client has disconnected
            response.cancel()
            raise
    raise AssertionError("unreachable")


def _respond(answer: Answer, headers: dict[str, str] | None = None) -> Response:
    return Response(answer.body, answer.status, headers, media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = ROUTING_ERRORS.get(error.status_code, error.detail)
    return _respond(Answer.error(error.status_code, message), dict(error.headers or {}))


async def _unexpected(request: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    return _respond(Answer.error(500, "the service failed to answer; its log says why"))
