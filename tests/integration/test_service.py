"""The service on a real Ray, over real HTTP: served = offline, refusals, a new version, a damaged one, and no secret in any log."""

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import numpy as np
import psutil
import pytest

from tests.exports import METRICS
from tests.services import Service, files_of, processes_of, running_service

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

MAX_BODY_BYTES = 1_000_000
NUM_USERS = 100
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("service")) as service:
        yield service


def assert_one_line(response: httpx.Response, status: int) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == status
    assert response.json()["detail"]
    assert "\n" not in response.json()["detail"]


def test_the_verb_says_what_it_started(service: Service) -> None:
    url = f"http://127.0.0.1:{service.config.service.port}"
    assert service.deployed == {"url": url, "version": "v1", "alias": "production", "export": "default", "replicas": 2}
    model = service.client.get("/v1/model").json()
    assert (model["version"], model["metrics"], model["tasks"]) == ("v1", METRICS, ["purchase", "rating", "like"])
    assert httpx.get(f"{url}/readyz").json() == {"status": "ok", "version": "v1"}


def test_recommendations_served_are_those_computed_offline(service: Service) -> None:
    """Requests from many threads at once, so that users with different histories and k share batches."""
    predictor, histories = service.export.predictor, dict(service.export.profiles.items())
    users = sorted(histories)[:NUM_USERS]
    with ThreadPoolExecutor(16) as pool:
        served = list(pool.map(lambda row: service.post("/v1/recommend", {"user_id": row[1], "k": 5 + row[0] % 20}), enumerate(users)))
    for position, (user_id, answer) in enumerate(zip(users, served, strict=True)):
        history = histories[user_id]
        expected = predictor.recommend([history], 5 + position % 20, [history.items])[0]
        assert answer["version"] == "v1"
        assert answer["fallback"] is None
        assert [item["item_id"] for item in answer["items"]] == [predictor.catalogue.item_ids[index] for index in expected.items]
        np.testing.assert_allclose([item["score"] for item in answer["items"]], expected.scores, rtol=0, atol=1e-6)


def test_scores_served_are_those_computed_offline(service: Service) -> None:
    predictor, histories = service.export.predictor, dict(service.export.profiles.items())
    users = sorted(histories)[:NUM_USERS]
    candidates = [np.random.default_rng(position).integers(1, 61, 3 + position % 9) for position in range(len(users))]
    names = predictor.catalogue.item_ids
    bodies = [{"user_id": user, "candidates": [names[index] for index in own]} for user, own in zip(users, candidates, strict=True)]
    with ThreadPoolExecutor(16) as pool:
        served = list(pool.map(lambda body: service.post("/v1/score", body), bodies))
    for user_id, indices, answer in zip(users, candidates, served, strict=True):
        expected = predictor.score([histories[user_id]], [indices])[0]
        assert set(expected) == {"retrieval", "purchase", "rating", "like"}
        for name, values in expected.items():
            np.testing.assert_allclose([row[name] for row in answer["scores"]], values, rtol=0, atol=1e-6)


def test_a_posted_history_gets_the_answer_of_the_stored_one(service: Service) -> None:
    predictor = service.export.predictor
    history = service.export.profiles.find("user-7")
    assert history is not None
    rows = zip(*(column.tolist() for column in (history.items, history.events, history.timestamps, history.values)), strict=True)
    posted = [
        {"item_id": predictor.catalogue.item_ids[item], "event": predictor.manifest.event_kinds[event], "timestamp": time}
        | ({} if math.isnan(value) else {"value": value})
        for item, event, time, value in rows
    ]
    answers = [service.post("/v1/recommend", body)["items"] for body in ({"history": posted}, {"user_id": "user-7"})]
    assert [item["item_id"] for item in answers[0]] == [item["item_id"] for item in answers[1]]
    assert [item["score"] for item in answers[0]] == pytest.approx([item["score"] for item in answers[1]], abs=1e-5)


def test_unknown_users_get_what_is_popular(service: Service) -> None:
    expected = service.export.predictor.popular(10, np.zeros(0, np.int64))
    for body in ({"user_id": "nobody"}, {"history": []}, {"history": [{"item_id": "gone"}]}):
        answer = service.post("/v1/recommend", body)
        assert answer["fallback"] == "popularity"
        assert [item["score"] for item in answer["items"]] == expected.scores.tolist()
    score = service.post("/v1/score", {"user_id": "nobody", "candidates": ["item-1", "gone"]})
    assert (score["fallback"], score["unknown_items"], score["scores"][0]["rating"]) == ("popularity", ["gone"], None)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b'{"user_id": "\xff"}', 400),
        (b"[" * 10_000, 400),
        (b'{"user_id": 5}', 422),
        (b'{"user_id": "u", "k": 501}', 422),
        (b'{"user_id": "u", "k": NaN}', 422),
        (b'{"history": [{"item_id": "item-1", "event": "stare"}]}', 409),
        (b" " * (MAX_BODY_BYTES + 1), 413),
    ],
)
def test_bad_bodies_are_refused_with_one_line(service: Service, body: bytes, status: int) -> None:
    assert_one_line(service.client.post("/v1/recommend", content=body, headers=JSON), status)


def test_a_body_without_a_length_is_cut_off_at_the_cap(service: Service) -> None:
    chunks = (b" " * 10_000 for _ in range(200))
    assert_one_line(service.client.post("/v1/recommend", content=chunks, headers=JSON), 413)


def test_tokens_paths_and_methods(service: Service) -> None:
    url = service.deployed["url"]
    missing = httpx.post(f"{url}/v1/recommend", json={"user_id": "user-1"})
    assert_one_line(missing, 401)
    assert missing.headers["www-authenticate"] == "Bearer"
    wrong = httpx.post(f"{url}/v1/recommend", json={"user_id": "user-1"}, headers={"Authorization": f"Bearer {service.token}0"})
    assert_one_line(wrong, 403)
    assert_one_line(service.client.get("/v2"), 404)
    assert_one_line(service.client.get("/v1/recommend"), 405)
    assert_one_line(service.client.post("/v1/recommend", data={"user_id": "user-1"}), 415)


def test_nothing_listens_off_loopback_but_what_asks_for_rays_token(service: Service) -> None:
    """Ray Serve binds each replica's own gRPC port to all interfaces, whatever the options; it must refuse requests without the token."""
    processes = [psutil.Process(service.head.process_id), *processes_of(service)]
    listening = {
        (connection.laddr, " ".join(process.cmdline()))
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert any(address.port == service.config.service.port for address, _ in listening)
    open_ports = [(address.port, name) for address, name in listening if address.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")]
    assert all("ServeReplica:recsys:" in name for _, name in open_ports), open_ports
    for port, _ in open_ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_every_answer_is_as_the_openapi_document_says(service: Service, tmp_path: Path) -> None:
    """Thousands of generated requests, right and wrong, alone and in sequences; run after the tests that ask for known users."""
    command = [str(Path(sys.executable).parent / "st"), "run", f"{service.deployed['url']}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {service.token}", "--max-examples", "20", "--continue-on-failure", "--seed", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    ((generated, passed),) = re.findall(r"(\d+) generated, (\d+) passed", done.stdout)
    assert int(generated) == int(passed) > 2000


def test_the_token_is_in_no_file(service: Service) -> None:
    """Runs last, after requests with right and wrong tokens."""
    files = files_of(service)
    assert any(path.name.startswith("replica_") for path in files)
    assert [path for path in files if service.token.encode() in path.read_bytes()] == []
