"""The service without Ray: what a request may be, what is answered to one that may not, and how answers are put together."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ServeDeploySchema

from recsys.config import ServiceConfig, load_config
from recsys.errors import UserError
from recsys.predictor import History, Predictor
from recsys.registry import Registry
from recsys.storage import Storage
from serve.answering import Answerer
from serve.app import build_app, read_arguments
from serve.gateway import build_http_app, digest_of
from serve.protocol import Answer, RecommendRequest, RequestError, ScoreRequest, read_request
from tests.exports import METRICS, publish_export, service_config

ROOT = Path(__file__).parents[2]
TOKEN = "token-of-the-tests"
SERVICE = ServiceConfig(max_k=50, max_candidates=4, max_body_bytes=2000, request_timeout_seconds=0.3)
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
JSON = {"Content-Type": "application/json"}


# What a request may be


@pytest.mark.parametrize(
    "body",
    [
        {"user_id": "u"},
        {"user_id": "u", "k": 50, "exclude_seen": False},
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
    assert (request.k, request.exclude_seen, request.history) == (10, True, None)


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
        (b"{}", 422, "either user_id or history"),
        (b'{"user_id": "u", "history": []}', 422, "not both"),
        (b'{"user_id": 7}', 422, "user_id = 7"),
        (b'{"user_id": ""}', 422, "user_id"),
        (b'{"user_id": "' + b"u" * 600 + b'"}', 422, "at most 512"),
        (b'{"user_id": "u", "k": "10"}', 422, 'k = "10"'),
        (b'{"user_id": "u", "k": 10.0}', 422, "k = 10.0"),
        (b'{"user_id": "u", "k": true}', 422, "k = true"),
        (b'{"user_id": "u", "k": NaN}', 422, "k = NaN"),
        (b'{"user_id": "u", "k": Infinity}', 422, "k = Infinity"),
        (b'{"user_id": "u", "k": null}', 422, "k = null"),
        (b'{"user_id": "u", "k": 0}', 422, "greater than or equal to 1"),
        (b'{"user_id": "u", "k": -1}', 422, "k = -1"),
        (b'{"user_id": "u", "k": 51}', 422, "at most 50 (service.max_k)"),
        (b'{"user_id": "u", "exclude_seen": 1}', 422, "exclude_seen = 1"),
        (b'{"user_id": "u", "limit": 3}', 422, "limit: unknown key; known: user_id, history, k, exclude_seen"),
        (b'{"history": {}}', 422, "history"),
        (b'{"history": ["item"]}', 422, "history.0"),
        (b'{"history": [{"event": "view"}]}', 422, "history.0.item_id: is missing"),
        (b'{"history": [{"item_id": "i", "rating": 5}]}', 422, "history.0.rating: unknown key; known: item_id, event, timestamp"),
        (b'{"history": [{"item_id": "i", "timestamp": -1}]}', 422, "history.0.timestamp = -1"),
        (b'{"history": [{"item_id": "i", "timestamp": 1700000000000}]}', 422, "253402300799"),
        (b'{"history": [{"item_id": "i", "timestamp": 1}, {"item_id": "j"}]}', 422, "every interaction a timestamp, or none"),
    ],
)
def test_bad_requests_are_refused_with_one_clear_line(body: bytes, status: int, line: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_request(RecommendRequest, body, SERVICE)
    assert caught.value.status == status
    assert line in caught.value.message
    assert len(caught.value.message) < 300


def test_histories_have_a_longest_length() -> None:
    with pytest.raises(RequestError, match="history"):
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
    with pytest.raises(RequestError) as caught:
        read_request(ScoreRequest, json.dumps({"user_id": "u", "candidates": candidates}).encode(), SERVICE)
    assert caught.value.status == 422
    assert line in caught.value.message


def test_candidates_must_be_there() -> None:
    with pytest.raises(RequestError, match="candidates: is missing"):
        read_request(ScoreRequest, b'{"user_id": "u"}', SERVICE)


# HTTP, before a scorer that answers at once, never, or with an exception


class FakeResponse:
    """What a call of a deployment handle returns."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.is_cancelled = False

    async def _wait(self) -> Any:
        if self.outcome is None:
            await asyncio.sleep(60)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def __await__(self) -> Any:
        return self._wait().__await__()

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeScorer:
    """A deployment handle whose every method gives the outcomes in order, the last one for ever."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes) or [Answer(200, b'{"version":"v"}')]
        self.responses: list[FakeResponse] = []
        self.recommend = self.score = self.describe = self.status = self

    def remote(self, *arguments: Any) -> FakeResponse:
        position = min(len(self.responses), len(self.outcomes) - 1)
        self.responses.append(FakeResponse(self.outcomes[position]))
        return self.responses[-1]


def ask(method: str, path: str, scorer: FakeScorer | None = None, **options: Any) -> httpx.Response:
    app = build_http_app(SERVICE, digest_of(TOKEN.encode()), scorer or FakeScorer())

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def assert_one_line(response: httpx.Response, status: int) -> str:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert body["error"]
    assert "\n" not in body["error"]
    return body["error"]


def test_a_scorers_answer_is_passed_on() -> None:
    response = ask("POST", "/v1/recommend", headers=AUTHORIZED, json={"user_id": "u"})
    assert (response.status_code, response.json()) == (200, {"version": "v"})
    assert ask("GET", "/v1/model", headers=AUTHORIZED).status_code == 200


@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/score", "/v1/model"])
def test_the_token_is_asked_for(path: str) -> None:
    method = "GET" if path == "/v1/model" else "POST"
    for headers in ({}, {"Authorization": TOKEN}, {"Authorization": "Bearer "}, {"Authorization": f"Basic {TOKEN}"}):
        response = ask(method, path, headers=headers)
        assert "Authorization: Bearer" in assert_one_line(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
    for token in ("wrong", TOKEN + "x", TOKEN[:-1], "\xff\xfe"):
        scorer = FakeScorer()
        error = assert_one_line(ask(method, path, scorer, headers={"Authorization": f"Bearer {token}".encode("latin-1")}), 403)
        assert token not in error
        assert not scorer.responses


def test_health_needs_no_token_but_a_scorer_that_answers() -> None:
    assert ask("GET", "/healthz").json() == {"status": "ok"}
    assert_one_line(ask("GET", "/healthz", FakeScorer(RayActorError())), 503)
    assert_one_line(ask("GET", "/healthz", FakeScorer(None)), 504)


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/recommend/", "/docs", "/openapi.json", "/v1/%ff"])
def test_unknown_paths(path: str) -> None:
    assert "POST /v1/recommend" in assert_one_line(ask("GET", path, headers=AUTHORIZED), 404)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/recommend"), ("DELETE", "/v1/score"), ("POST", "/v1/model"), ("PUT", "/healthz")]
)
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
    scorer = FakeScorer(None)
    assert_one_line(ask("POST", "/v1/recommend", scorer, headers=AUTHORIZED, json={"user_id": "u"}), 504)
    assert scorer.responses[0].is_cancelled


def test_overload_is_refused_with_a_time_to_come_back() -> None:
    scorer = FakeScorer(BackPressureError(num_queued_requests=9, max_queued_requests=9))
    response = ask("POST", "/v1/recommend", scorer, headers=AUTHORIZED, json={"user_id": "u"})
    assert_one_line(response, 503)
    assert response.headers["retry-after"] == "1"


def test_a_request_whose_replica_dies_is_answered_by_another() -> None:
    scorer = FakeScorer(RayActorError(), RayActorError(), Answer(200, b"{}"))
    assert ask("POST", "/v1/recommend", scorer, headers=AUTHORIZED, json={"user_id": "u"}).status_code == 200
    assert len(scorer.responses) == 3


def test_what_goes_wrong_inside_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    response = ask("POST", "/v1/recommend", FakeScorer(ValueError("secret")), headers=AUTHORIZED, json={"user_id": "u"})
    assert "secret" not in assert_one_line(response, 500)


# Building the application


@pytest.mark.parametrize("token", [None, "", "  "])
def test_without_a_token_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    config = service_config(tmp_path)
    publish_export(config, "v1")
    monkeypatch.delenv("RECSYS_SERVICE_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("RECSYS_SERVICE_TOKEN", token)
    with pytest.raises(UserError, match="export RECSYS_SERVICE_TOKEN="):
        build_app({"storage.root": config.storage.root})


def test_without_a_version_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECSYS_SERVICE_TOKEN", TOKEN)
    with pytest.raises(UserError, match=r"service\.alias = 'production': names no version"):
        build_app({"storage.root": str(tmp_path)})


def test_arguments_are_read_as_strings_and_as_yaml(tmp_path: Path) -> None:
    file = tmp_path / "service.toml"
    file.write_text("[service]\nport = 9000\nmax_k = 7\n")
    strings = {"config": str(file), "service.max_k": "20", "service.alias": "candidate", "data.event_kinds": '["view", "buy"]'}
    values = {"config": str(file), "service.max_k": 20, "service.alias": "candidate", "data.event_kinds": ["view", "buy"]}
    config = read_arguments(strings)
    assert config == read_arguments(values)
    assert (config.service.port, config.service.max_k, config.service.alias) == (9000, 20, "candidate")
    assert read_arguments({"training.use_gpu": True}).training.use_gpu
    for wrong in ({"service.max_k": None}, {"service": {"max_k": 3}}, {"service.max_j": 3}):
        with pytest.raises(UserError, match=r"service"):
            read_arguments(wrong)


# Answers


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Predictor, Answerer]:
    config = service_config(tmp_path_factory.mktemp("answers"))
    predictor = publish_export(config, "v1")
    registry = Registry(Storage.from_config(config.storage), config.served_export)
    return predictor, Answerer.load(registry, "v1", "production", Path(config.run.scratch))


def body_of(answer: Answer) -> dict[str, Any]:
    assert answer.status == 200, answer
    return json.loads(answer.body)


def test_a_mixed_batch_is_answered_each_by_its_own(published: tuple[Predictor, Answerer]) -> None:
    predictor, answerer = published
    requests = [
        RecommendRequest(user_id="user-3", k=3),
        RecommendRequest(user_id="nobody", k=2),
        RecommendRequest(history=[{"item_id": "item-1", "event": "stare"}]),
        RecommendRequest(user_id="user-4", k=100, exclude_seen=False),
        RecommendRequest(history=[]),
        RecommendRequest(history=[{"item_id": "gone"}, {"item_id": "item-5"}, {"item_id": "gone"}], k=1),
    ]
    answers = answerer.recommend(requests)
    first, unknown, wrong, whole, empty, partly = answers
    expected = predictor.recommend([predictor.users["user-3"]], 3, [predictor.users["user-3"].items])[0]
    assert [item["item_id"] for item in body_of(first)["items"]] == [f"item-{index}" for index in expected.items]
    assert [item["rank"] for item in body_of(first)["items"]] == [1, 2, 3]
    assert body_of(first)["items"][0]["title"].startswith("Story")
    assert body_of(first)["fallback"] is None
    popular = predictor.popular(2, History.of([]).items)
    assert [item["score"] for item in body_of(unknown)["items"]] == popular.scores.tolist()
    assert body_of(unknown)["fallback"] == body_of(empty)["fallback"] == "popularity"
    assert wrong.status == 422
    assert json.loads(wrong.body)["error"] == "history.0.event: is no event kind of this model; known: view, purchase"
    assert len(body_of(whole)["items"]) == 60
    assert body_of(partly)["unknown_items"] == ["gone"]
    assert body_of(partly)["fallback"] is None
    assert {body_of(answer)["version"] for answer in answers if answer is not wrong} == {"v1"}


def test_seen_items_are_left_out_only_if_asked(published: tuple[Predictor, Answerer]) -> None:
    predictor, answerer = published
    seen = {f"item-{index}" for index in predictor.users["user-3"].items}
    without, whole = (
        {item["item_id"] for item in body_of(answer)["items"]}
        for answer in answerer.recommend([RecommendRequest(user_id="user-3", k=60, exclude_seen=exclude) for exclude in (True, False)])
    )
    assert seen
    assert whole - without == seen


def test_times_sort_a_posted_history_and_ties_keep_their_order(published: tuple[Predictor, Answerer]) -> None:
    _, answerer = published
    sorted_history = [{"item_id": f"item-{index}", "timestamp": time} for index, time in ((1, 10), (2, 20), (3, 20), (4, 30))]
    shuffled = [sorted_history[position] for position in (1, 3, 2, 0)]
    swapped = [sorted_history[position] for position in (2, 3, 1, 0)]
    expected, same, other = (
        body_of(answer)["items"]
        for answer in answerer.recommend([RecommendRequest(history=rows) for rows in (sorted_history, shuffled, swapped)])
    )
    assert [item["score"] for item in same] == pytest.approx([item["score"] for item in expected], abs=1e-6)
    assert [item["score"] for item in other] != pytest.approx([item["score"] for item in expected], abs=1e-6)


def test_scores_keep_the_candidates_order_and_say_what_is_unknown(published: tuple[Predictor, Answerer]) -> None:
    predictor, answerer = published
    candidates = ["item-9", "gone", "item-2", "item-9"]
    known, unknown_user, nothing = (
        body_of(answer)
        for answer in answerer.score(
            [
                ScoreRequest(user_id="user-3", candidates=candidates),
                ScoreRequest(user_id="nobody", candidates=candidates),
                ScoreRequest(history=[{"item_id": "lost"}, {"item_id": "item-1"}], candidates=["gone"]),
            ]
        )
    )
    expected = predictor.score([predictor.users["user-3"]], [_indices(9, 2, 9)])[0]
    assert [row["item_id"] for row in known["scores"]] == candidates
    assert [row["known"] for row in known["scores"]] == [True, False, True, True]
    assert known["unknown_items"] == ["gone"]
    for name in ("retrieval", "purchase", "rating", "like"):
        values = [row[name] for row in known["scores"]]
        assert values[1] is None
        assert [values[0], *values[2:]] == pytest.approx(expected[name].tolist(), abs=1e-6)
    assert unknown_user["fallback"] == "popularity"
    assert unknown_user["scores"][0] == {
        "item_id": "item-9",
        "known": True,
        "retrieval": predictor.popularity[9].item(),
        "purchase": None,
        "rating": None,
        "like": None,
    }
    assert nothing["fallback"] is None
    assert nothing["unknown_items"] == ["lost", "gone"]


def test_the_model_says_what_it_is(published: tuple[Predictor, Answerer]) -> None:
    predictor, answerer = published
    info = answerer.info
    assert (info.version, info.alias, info.num_items, info.metrics) == ("v1", "production", 60, METRICS)
    assert info.dataset_fingerprint == predictor.manifest.fingerprint
    assert info.tasks == ["purchase", "rating", "like"]
    assert info.event_kinds == ["view", "purchase"]


def _indices(*values: int) -> Any:
    return History.of(values).items


# What is kept beside the code


def test_configs_and_declarations_parse() -> None:
    assert load_config(ROOT / "serve/configs/local.toml").service == ServiceConfig()
    (application,) = ServeDeploySchema(**yaml.safe_load((ROOT / "serve/configs/service.yaml").read_text())).applications
    config = read_arguments({**application.args, "config": ROOT / application.args["config"]})
    assert (config.service.min_replicas, config.storage.root) == (2, "s3://your-bucket/recsys")
