"""The HTTP layer with a backend that answers at once, never, or with an exception."""

import asyncio
import gzip
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import pytest

from recsys.config.service import ServiceConfig
from serve.api.gateway import build_http_app, digest_of
from serve.api.problems import Answer
from serve.api.protocol import Message, ModelInfo
from serve.batcher import DeadlineError, OverloadedError, Timed
from serve.live.changes import Change, Erased, Happened, Merged, hash_of, session_key, user_key

TOKEN = "token-of-the-tests"
SERVICE = ServiceConfig(max_k=50, max_candidates=4, max_body_bytes=2000, request_timeout_seconds=0.3)
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
JSON = {"Content-Type": "application/json"}


INFO = ModelInfo(
    version="v", alias="production", dataset_fingerprint="f", num_items=3, tasks=[], event_kinds=["view"], default_event="view",
    takes_queries=False,     metrics={}, code_version=None,
)  # fmt: skip


class Backend:
    """Answers every request with the same outcome: an answer, an exception, or nothing for a minute."""

    def __init__(self, outcome: Answer | Exception | None = Answer(200, b'{"version":"v"}')) -> None:  # noqa: B008
        self.outcome = outcome
        self.num_asked = 0
        self.recorded: list[Change] = []
        self.is_cancelled = False

    async def ask(self, request: Message, deadline: float) -> Timed[Answer]:
        self.num_asked += 1
        if self.outcome is None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.is_cancelled = True
                raise
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return Timed(self.outcome, 0.001, 0.002)

    async def record(self, changes: Sequence[Change]) -> list[bool]:
        self.recorded += changes
        return [change.change_id != "again" for change in changes]

    @property
    def info(self) -> ModelInfo:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return INFO


def ask(method: str, path: str, backend: Backend | None = None, **options: Any) -> httpx.Response:
    app = build_http_app(SERVICE, digest_of(TOKEN.encode()), backend or Backend())

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def assert_one_line(response: httpx.Response, status: int) -> str:
    """Check that a response is a problem document with one line of detail, and return the line."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert list(body) == ["type", "title", "status", "detail"]
    assert (body["type"], body["status"]) == ("about:blank", status)
    assert body["title"]
    assert body["detail"]
    assert "\n" not in body["detail"]
    return body["detail"]


def test_an_answer_is_passed_on() -> None:
    response = ask("POST", "/v1/recommend", headers=AUTHORIZED, json={"user_id": "u"})
    assert (response.status_code, response.json()) == (200, {"version": "v"})
    assert response.headers["server-timing"] == "queue;dur=1.0, compute;dur=2.0"
    assert ask("GET", "/v1/model", headers=AUTHORIZED).status_code == 200


@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/score", "/v1/model"])
def test_the_token_is_asked_for(path: str) -> None:
    method = "GET" if path == "/v1/model" else "POST"
    for headers in ({}, {"Authorization": TOKEN}, {"Authorization": "Bearer "}, {"Authorization": f"Basic {TOKEN}"}):
        response = ask(method, path, headers=headers)
        assert "Authorization: Bearer" in assert_one_line(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
    for token in ("wrong", TOKEN + "x", TOKEN[:-1], "\xff\xfe"):
        backend = Backend()
        error = assert_one_line(ask(method, path, backend, headers={"Authorization": f"Bearer {token}".encode("latin-1")}), 403)
        assert token not in error
        assert not backend.num_asked


def test_liveness_and_readiness_need_no_token() -> None:
    loading = Backend(RuntimeError("no version is loaded"))
    assert ask("GET", "/livez", loading).json() == {"status": "ok"}
    assert ask("GET", "/readyz").json() == {"status": "ok", "version": "v"}
    response = ask("GET", "/readyz", loading)
    assert "no version is loaded" in assert_one_line(response, 503)
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/recommend/", "/redoc", "/v1/%ff"])
def test_unknown_paths(path: str) -> None:
    assert "POST /v1/recommend" in assert_one_line(ask("GET", path, headers=AUTHORIZED), 404)


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/recommend"), ("DELETE", "/v1/score"), ("POST", "/v1/model"), ("PUT", "/readyz")])
def test_wrong_methods(method: str, path: str) -> None:
    response = ask(method, path, headers=AUTHORIZED)
    assert_one_line(response, 405)
    assert response.headers["allow"]


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_wrong_content_types(content_type: str | None) -> None:
    headers = AUTHORIZED if content_type is None else AUTHORIZED | {"Content-Type": content_type}
    assert "application/json" in assert_one_line(ask("POST", "/v1/recommend", headers=headers, content=b'{"user_id": "u"}'), 415)


def test_a_charset_is_no_other_content_type() -> None:
    headers = AUTHORIZED | {"Content-Type": "Application/JSON; charset=utf-8"}
    assert ask("POST", "/v1/recommend", headers=headers, content=b'{"user_id": "u"}').status_code == 200


def test_a_compressed_body_is_not_unpacked() -> None:
    bomb = gzip.compress(b"[" * 1_000_000)
    assert_one_line(ask("POST", "/v1/recommend", headers=AUTHORIZED | JSON | {"Content-Encoding": "gzip"}, content=bomb), 415)


def test_a_malformed_body_is_one_line() -> None:
    assert "not JSON" in assert_one_line(ask("POST", "/v1/score", headers=AUTHORIZED | JSON, content=b"\x00\x01{"), 400)


def test_a_body_that_says_it_is_too_long_is_not_read() -> None:
    chunks_read = []

    async def body() -> AsyncIterator[bytes]:
        chunks_read.append(1)
        yield b" " * 2001

    headers = AUTHORIZED | JSON | {"Content-Length": "2001"}
    assert "2000 bytes" in assert_one_line(ask("POST", "/v1/recommend", headers=headers, content=body()), 413)
    assert not chunks_read
    for impossible in ("-1", "many", "9" * 30):
        assert_one_line(ask("POST", "/v1/recommend", headers=headers | {"Content-Length": impossible}, content=body()), 400)
    assert not chunks_read


def test_a_body_that_goes_on_is_read_up_to_the_cap_only() -> None:
    chunks_read = []

    async def body() -> AsyncIterator[bytes]:
        for _ in range(1000):
            chunks_read.append(1)
            yield b" " * 500

    assert_one_line(ask("POST", "/v1/recommend", headers=AUTHORIZED | JSON, content=body()), 413)
    assert len(chunks_read) == 5


def test_a_body_of_exactly_the_cap_is_read() -> None:
    content = b'{"user_id": "u"}'.ljust(2000)
    assert ask("POST", "/v1/recommend", headers=AUTHORIZED | JSON, content=content).status_code == 200


def test_a_body_that_drips_is_given_up() -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" "
            await asyncio.sleep(0.05)

    assert "0.3 s" in assert_one_line(ask("POST", "/v1/recommend", headers=AUTHORIZED | JSON, content=body()), 408)


def test_a_slow_answer_is_given_up_and_cancelled() -> None:
    backend = Backend(None)
    assert_one_line(ask("POST", "/v1/recommend", backend, headers=AUTHORIZED, json={"user_id": "u"}), 504)
    assert backend.is_cancelled
    assert_one_line(ask("POST", "/v1/recommend", Backend(DeadlineError()), headers=AUTHORIZED, json={"user_id": "u"}), 504)


@pytest.mark.parametrize(("seconds", "expected"), [(0.3, "1"), (7.4, "7")])
def test_overload_is_refused_with_a_time_to_come_back(seconds: float, expected: str) -> None:
    response = ask("POST", "/v1/recommend", Backend(OverloadedError(seconds)), headers=AUTHORIZED, json={"user_id": "u"})
    assert_one_line(response, 503)
    assert response.headers["retry-after"] == expected


def test_what_goes_wrong_inside_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    response = ask("POST", "/v1/recommend", Backend(ValueError("secret")), headers=AUTHORIZED, json={"user_id": "u"})
    assert "secret" not in assert_one_line(response, 500)


def test_events_are_recorded_with_a_result_each() -> None:
    backend = Backend()
    events = [
        {"event_id": "a", "user_id": " ann ", "item_id": "i", "event": "buy", "timestamp": 5, "value": 2.5},
        {"event_id": "again", "session_id": "s", "item_id": "j"},
    ]
    response = ask("POST", "/v1/events", backend, headers=AUTHORIZED, json={"events": events})
    assert response.status_code == 202
    assert response.json() == {"results": [{"event_id": "a", "status": "accepted"}, {"event_id": "again", "status": "duplicate"}]}
    first, second = backend.recorded
    assert first == Happened(change_id="a", key=user_key("ann"), item_id="i", event="buy", timestamp=5, value=2.5)
    assert isinstance(second, Happened)
    assert (second.key, second.event, second.value) == (session_key("s"), "view", None)
    assert second.timestamp > 1_700_000_000


@pytest.mark.parametrize(
    ("event", "line"),
    [
        ({"user_id": "u", "item_id": "i"}, "events.0.event_id: is missing"),
        ({"event_id": "a", "item_id": "i"}, "either user_id or session_id"),
        ({"event_id": "a", "item_id": "i", "user_id": "u", "session_id": "s"}, "either user_id or session_id"),
        ({"event_id": "a", "item_id": "i", "user_id": "u", "timestamp": 1_700_000_000_000}, "timestamp"),
        ({"event_id": "a", "item_id": "i", "user_id": "u", "rating": 3}, "rating: unknown key; known: event_id, user_id"),
    ],
)
def test_a_wrong_event_is_refused_with_all_of_its_request(event: dict[str, Any], line: str) -> None:
    backend = Backend()
    good = {"event_id": "b", "user_id": "u", "item_id": "i"}
    response = ask("POST", "/v1/events", backend, headers=AUTHORIZED, json={"events": [event, good]})
    assert line in assert_one_line(response, 422)
    assert not backend.recorded


def test_a_session_is_merged_and_a_user_erased() -> None:
    backend = Backend()
    assert ask("POST", "/v1/sessions/s%201/merge", backend, headers=AUTHORIZED, json={"user_id": "ann"}).json() == {"status": "ok"}
    assert ask("DELETE", "/v1/users/ann", backend, headers=AUTHORIZED).json() == {"status": "ok"}
    merged, erased = backend.recorded
    assert isinstance(merged, Merged)
    assert (merged.session, merged.key) == (session_key("s 1"), user_key("ann"))
    assert isinstance(erased, Erased)
    assert erased.key_hash == hash_of(user_key("ann"))
    assert ask("DELETE", "/v1/users/ann").status_code == 401
