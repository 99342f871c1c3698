"""The service on a real Ray, over real HTTP: served = offline, refusals, a new version, a damaged one, and no secret in any log."""

import contextlib
import json
import math
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pytest

from recsys.config import Config
from recsys.exports.files import Export
from recsys.launch.head import Head, free_port, start_head, stop_head
from tests.exports import METRICS, publish_damaged_export, publish_export, service_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
MAX_BODY_BYTES = 1_000_000
NUM_USERS = 100
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Service:
    """A running service, the version that it serves first, and its address and token."""

    config: Config
    head: Head
    folder: Path
    token: str
    export: Export
    deployed: dict[str, Any]
    client: httpx.Client

    def post(self, path: str, body: Any) -> dict[str, Any]:
        """Post a request and return the answer."""
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def deploy(self) -> "subprocess.CompletedProcess[str]":
        """Run the command again."""
        return run_deploy(self.config, self.head)


def run_deploy(config: Config, head: Head) -> "subprocess.CompletedProcess[str]":
    settings = {
        "storage.root": config.storage.root,
        "run.scratch": config.run.scratch,
        "service.port": config.service.port,
        "service.max_body_bytes": config.service.max_body_bytes,
        "service.max_batch_size": config.service.max_batch_size,
        "service.min_replicas": config.service.min_replicas,
        "service.request_timeout_seconds": config.service.request_timeout_seconds,
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    done = subprocess.run(
        [sys.executable, "-m", "serve.deploy", *overrides],
        cwd=ROOT,
        env={**os.environ, **head.environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    if done.returncode == 1:  # an unexpected end: its reason is in the newest log
        logs = sorted((Path(config.run.scratch) / "logs").glob("serve.deploy-*"), key=lambda path: path.stat().st_mtime)
        done.stderr += "".join(path.read_text(errors="replace")[-3000:] for path in logs[-1:])
    return done


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    config = service_config(
        tmp_path_factory.mktemp("service"),
        port=free_port(),
        max_body_bytes=MAX_BODY_BYTES,
        max_batch_size=8,
        min_replicas=2,
        request_timeout_seconds=60.0,
    )
    export = publish_export(config, "v1", seed=1)
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv(config.service.token_env, token)
        patch.setenv("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")  # else the head lingers for its replicas when it is stopped
        head = start_head(folder, service=config.service)
        try:
            done = run_deploy(config, head)
            assert done.returncode == 0, done.stderr[-3000:]
            deployed = json.loads(done.stdout.splitlines()[-1])
            with httpx.Client(base_url=deployed["url"], headers={"Authorization": f"Bearer {token}"}, timeout=90) as client:
                yield Service(config, head, Path(folder), token, export, deployed, client)
        finally:
            stop_head(head.process_id)


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


def test_a_replica_that_is_killed_fails_no_request(service: Service) -> None:
    replica, _ = replicas(service)
    with ThreadPoolExecutor(8) as pool:
        requests = [pool.submit(service.post, "/v1/recommend", {"user_id": f"user-{number % 100}"}) for number in range(200)]
        wait(requests[:40])
        replica.kill()  # while eight requests are on their way or in it
        assert {request.result()["version"] for request in requests} == {"v1"}
    deadline = time.monotonic() + 60
    while len(addresses_of(service)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_event_changes_the_next_list_on_every_replica_within_a_second(service: Service) -> None:
    best = service.post("/v1/recommend", {"user_id": "user-5", "limit": 1})["items"][0]["item_id"]
    addresses = addresses_of(service)
    assert len(addresses) == 2
    assert {first_item(service, address, "user-5") for address in addresses} == {best}
    event = {"event_id": "e-1", "user_id": "user-5", "item_id": best, "event": "purchase"}
    response = service.client.post("/v1/events", json={"events": [event]})
    posted = time.monotonic()
    assert (response.status_code, response.json()) == (202, {"results": [{"event_id": "e-1", "status": "accepted"}]})
    for address in addresses:
        while first_item(service, address, "user-5") == best:
            assert time.monotonic() < posted + 1
    once = [first_item(service, address, "user-5") for address in addresses]
    repeated = service.client.post("/v1/events", json={"events": [event]})
    assert repeated.json() == {"results": [{"event_id": "e-1", "status": "duplicate"}]}
    time.sleep(0.5)
    assert [first_item(service, address, "user-5") for address in addresses] == once


def test_a_new_user_and_a_session_are_known_after_their_first_event(service: Service) -> None:
    events = [
        {"event_id": "e-2", "session_id": "s-1", "item_id": "item-3"},
        {"event_id": "e-3", "user_id": "brand new", "item_id": "item-3"},
    ]
    assert service.client.post("/v1/events", json={"events": events}).status_code == 202
    until(lambda: service.post("/v1/recommend", {"user_id": "brand new"})["fallback"] is None)
    until(lambda: service.post("/v1/recommend", {"session_id": "s-1"})["fallback"] is None)
    assert service.client.post("/v1/sessions/s-1/merge", json={"user_id": "merged"}).status_code == 200
    until(lambda: service.post("/v1/recommend", {"user_id": "merged"})["fallback"] is None)
    until(lambda: service.post("/v1/recommend", {"session_id": "s-1"})["fallback"] == "popularity")


def test_the_owner_of_the_log_may_be_killed(service: Service) -> None:
    """What was acknowledged before the kill is there after it, and events go on being recorded."""
    (owner,) = (process for process in processes_of(service) if "LogOwner" in " ".join(process.cmdline()))
    events = [{"event_id": f"k-{number}", "user_id": f"killed-{number}", "item_id": "item-4"} for number in range(20)]
    assert service.client.post("/v1/events", json={"events": events}).status_code == 202
    owner.kill()
    after = [{"event_id": f"k-{number}", "user_id": f"killed-{number}", "item_id": "item-4"} for number in range(15, 25)]
    results = service.client.post("/v1/events", json={"events": after}).json()["results"]
    assert [result["status"] for result in results] == ["duplicate"] * 5 + ["accepted"] * 5
    for number in range(25):
        until(lambda number=number: service.post("/v1/recommend", {"user_id": f"killed-{number}"})["fallback"] is None)


def test_an_erased_user_is_forgotten(service: Service) -> None:
    name = "erased-user-of-the-test"
    service.client.post("/v1/events", json={"events": [{"event_id": "g-1", "user_id": name, "item_id": "item-4"}]})
    until(lambda: service.post("/v1/recommend", {"user_id": name})["fallback"] is None)
    assert service.client.delete(f"/v1/users/{name}").status_code == 200
    assert service.client.delete("/v1/users/user-9").status_code == 200
    for user in (name, "user-9"):
        until(lambda user=user: service.post("/v1/recommend", {"user_id": user})["fallback"] == "popularity")
    assert [path for path in files_of(service) if name.encode() in path.read_bytes()] == []


def test_deploying_again_changes_nothing(service: Service) -> None:
    before = replicas(service)
    done = service.deploy()
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == service.deployed
    assert replicas(service) == before
    assert len(before) == 2


def test_versions_are_swapped_without_a_restart_or_a_failed_request(service: Service) -> None:
    before = replicas(service)
    second = publish_export(service.config, "v2", seed=2)
    history = service.export.profiles.find("user-3")
    assert history is not None
    expected = {
        version: export.predictor.recommend([history], 10, [history.items])[0].scores
        for version, export in (("v1", service.export), ("v2", second))
    }
    with ThreadPoolExecutor(1) as pool:
        deploying = pool.submit(service.deploy)
        answers = []
        while not deploying.done():
            answers.append(service.post("/v1/recommend", {"user_id": "user-3"}))
    assert deploying.result().returncode == 0, deploying.result().stderr[-3000:]
    answers.append(service.post("/v1/recommend", {"user_id": "user-3"}))
    assert (answers[0]["version"], answers[-1]["version"]) == ("v1", "v2")
    for answer in answers:
        np.testing.assert_allclose([item["score"] for item in answer["items"]], expected[answer["version"]], rtol=0, atol=1e-6)
    assert replicas(service) == before

    publish_damaged_export(service.config, "v3", source="v2")
    refused = service.deploy()
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: version v3 cannot be served: export: user ")
    assert refused.stderr.splitlines()[-1].endswith("version v2 keeps serving")
    assert service.post("/v1/recommend", {"user_id": "user-3"})["version"] == "v2"
    assert replicas(service) == before


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


def addresses_of(service: Service) -> list[str]:
    """Return the addresses of the replicas, which HAProxy sends requests to."""
    found = []
    for replica in replicas(service):
        ports = {connection.laddr.port for connection in replica.net_connections("inet") if connection.status == psutil.CONN_LISTEN}
        for port in ports:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{port}/livez", timeout=5).raise_for_status()
                found.append(f"http://127.0.0.1:{port}")
    return found


def first_item(service: Service, address: str, user_id: str) -> str:
    headers = {"Authorization": f"Bearer {service.token}"}
    answer = httpx.post(f"{address}/v1/recommend", json={"user_id": user_id, "limit": 1}, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()["items"][0]["item_id"]


def until(is_true: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until a condition holds on five calls in a row, so that it holds on both replicas."""
    deadline, in_a_row = time.monotonic() + seconds, 0
    while in_a_row < 5:
        in_a_row = in_a_row + 1 if is_true() else 0
        assert time.monotonic() < deadline


def files_of(service: Service) -> list[Path]:
    roots = (service.folder, Path(service.config.storage.root).parent)
    return [path for root in roots for path in root.rglob("*") if path.is_file()]


def processes_of(service: Service) -> list[psutil.Process]:
    return psutil.Process(service.head.process_id).children(recursive=True)


def replicas(service: Service) -> list[psutil.Process]:
    """Find the processes of the replicas that live, by process id."""
    found = processes_of(service)
    return sorted((process for process in found if "ServeReplica:recsys:" in " ".join(process.cmdline())), key=lambda found: found.pid)
