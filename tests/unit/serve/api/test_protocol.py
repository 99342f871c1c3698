"""Valid requests, and the one-line error for invalid ones."""

import json
from typing import Any

import pytest

from recsys.config.service import ServiceConfig
from serve.api.parsing import read_request
from serve.api.problems import RefusedError
from serve.api.protocol import RecommendRequest, ScoreRequest

SERVICE = ServiceConfig(max_k=50, max_candidates=4, max_body_bytes=2000, request_timeout_seconds=0.3)
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "body",
    [
        {"user_id": "u"},
        {"user_id": "u", "limit": 50, "exclude_seen": False},
        {"history": []},
        {"history": [{"item_id": "i"}, {"item_id": "j", "event": "view"}]},
        {"history": [{"item_id": "i", "timestamp": 0}, {"item_id": "i", "timestamp": 1_700_000_000}]},
        {"user_id": "üñí ☃"},
    ],
)
def test_good_requests_are_read(body: dict[str, Any]) -> None:
    request = read_request(RecommendRequest, json.dumps(body).encode(), SERVICE)
    assert request.model_dump(exclude_unset=True) == body


def test_defaults() -> None:
    request = read_request(RecommendRequest, b'{"user_id": "u"}', SERVICE)
    assert (request.limit, request.exclude_seen, request.history) == (10, True, None)


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        (b"", 400, "EOF"),
        (b"{", 400, "EOF"),
        (b"{'user_id': 'u'}", 400, "not JSON"),
        (b'{"user_id": "u"} {}', 400, "trailing"),
        (b'{"user_id": "\xff"}', 400, "unicode"),
        (b'{"user_id": "\\ud800"}', 400, "hex escape"),
        (b'\xef\xbb\xbf{"user_id": "u"}', 400, "not JSON"),
        (b'{"user_id": ' + b"[" * 900 + b"]" * 900 + b"}", 400, "recursion"),
        (b'{"user_id": "u", "k": ' + b"9" * 6000 + b"}", 400, "out of range"),
        (b"[]", 422, "object"),
        (b"null", 422, "object"),
        (b'"user"', 422, "object"),
        (b"{}", 422, "exactly one of"),
        (b'{"user_id": "u", "history": []}', 422, "exactly one of"),
        (b'{"user_id": 7}', 422, "user_id = 7"),
        (b'{"user_id": ""}', 422, "user_id"),
        (b'{"user_id": "' + b"u" * 600 + b'"}', 422, "at most 512"),
        (b'{"user_id": "u", "k": "10"}', 422, 'k = "10"'),
        (b'{"user_id": "u", "k": 10.5}', 422, "k = 10.5"),
        (b'{"user_id": "u", "filter": []}', 422, "filter"),
        (b'{"user_id": "u", "k": true}', 422, "k = true"),
        (b'{"user_id": "u", "k": NaN}', 422, "k = NaN"),
        (b'{"user_id": "u", "k": Infinity}', 422, "k = Infinity"),
        (b'{"user_id": "u", "k": null}', 422, "k = null"),
        (b'{"user_id": "u", "k": 0}', 422, "greater than or equal to 1"),
        (b'{"user_id": "u", "k": -1}', 422, "k = -1"),
        (b'{"user_id": "u", "k": 51}', 422, "at most 50 (service.max_k)"),
        (b'{"user_id": "u", "exclude_seen": 1}', 422, "exclude_seen = 1"),
        (
            b'{"user_id": "u", "length": 3}',
            422,
            "length: unknown key; known: limit, filter, boost, include_ids, exclude_ids, diversity, include, user_id, session_id,",
        ),
        (b'{"history": {}}', 422, "history"),
        (b'{"user_id": "u", "query": ""}', 422, 'query = ""'),
        (b'{"query": " \\n"}', 422, "query"),
        (b'{"query": 7}', 422, "query = 7"),
        (b'{"query": "' + b"q" * 1001 + b'"}', 422, "at most 1000"),
        (b'{"user_id": "u", "history": [], "query": "q"}', 422, "exactly one of"),
        (b'{"history": ["item"]}', 422, "history.0"),
        (b'{"profile": {"age": null}}', 422, "profile.age"),
        (b'{"profile": {"age": {"years": 3}}}', 422, "profile.age"),
        (b'{"user_id": "u", "context": ["phone"]}', 422, "context"),
        (b'{"user_id": "u", "time": "now"}', 422, "time"),
        (b'{"history": [{"event": "view"}]}', 422, "history.0.item_id: is missing"),
        (b'{"history": [{"item_id": "i", "rating": 5}]}', 422, "history.0.rating: unknown key; known: item_id, event, timestamp"),
        (b'{"history": [{"item_id": "i", "timestamp": -1}]}', 422, "history.0.timestamp = -1"),
        (b'{"history": [{"item_id": "i", "timestamp": 1700000000000}]}', 422, "253402300799"),
        (b'{"history": [{"item_id": "i", "timestamp": 1}, {"item_id": "j"}]}', 422, "every interaction a timestamp, or none"),
    ],
)
def test_bad_requests_are_refused_with_one_clear_line(body: bytes, status: int, line: str) -> None:
    with pytest.raises(RefusedError) as caught:
        read_request(RecommendRequest, body, SERVICE)
    assert caught.value.status == status
    assert line in caught.value.detail
    assert len(caught.value.detail) < 300


def test_histories_have_a_longest_length() -> None:
    with pytest.raises(RefusedError, match="history"):
        read_request(RecommendRequest, json.dumps({"history": [{"item_id": "i"}] * 5000}).encode(), SERVICE)


@pytest.mark.parametrize(
    ("candidates", "line"),
    [
        ([], "at least 1"),
        (["i"] * 5, "at most 4 (service.max_candidates)"),
        ([1], "candidates.0 = 1"),
        ([""], "candidates.0"),
        ("item", 'candidates = "item"'),
        (None, "candidates = null"),
    ],
)
def test_bad_candidates_are_refused(candidates: Any, line: str) -> None:
    with pytest.raises(RefusedError) as caught:
        read_request(ScoreRequest, json.dumps({"user_id": "u", "candidates": candidates}).encode(), SERVICE)
    assert caught.value.status == 422
    assert line in caught.value.detail


def test_candidates_must_be_there() -> None:
    with pytest.raises(RefusedError, match="candidates: is missing"):
        read_request(ScoreRequest, b'{"user_id": "u"}', SERVICE)


def test_ids_are_spelled_as_where_data_is_prepared() -> None:
    body = json.dumps({"history": [{"item_id": " Cafe\u0301 ", "event": "view\t"}], "k": 1}).encode()
    (posted,) = read_request(RecommendRequest, body, ServiceConfig()).history or []
    assert (posted.item_id, posted.event) == ("Caf\u00e9", "view")
    assert read_request(RecommendRequest, json.dumps({"user_id": f" {'u' * 512} "}).encode(), ServiceConfig()).user_id == "u" * 512
    for user_id in (" ", 7):
        with pytest.raises(RefusedError, match="user_id"):
            read_request(RecommendRequest, json.dumps({"user_id": user_id}).encode(), ServiceConfig())
