"""The service while things happen: events, killed processes, new versions and rollbacks, without a failed request."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest

from recsys.exports.registry import Registry
from recsys.store import Storage
from tests.exports import publish_damaged_export, publish_export
from tests.services import Service, addresses_of, files_of, first_item, processes_of, replicas, running_service, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("service")) as service:
        yield service


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
    (owner,) = (process for process in processes_of(service) if "SqliteLog" in " ".join(process.cmdline()))
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

    begin = time.monotonic()
    rolled_back = service.roll_back()
    seconds = time.monotonic() - begin
    assert rolled_back.returncode == 0, rolled_back.stderr[-3000:]
    result = json.loads(rolled_back.stdout.splitlines()[-1])
    assert (result["version"], result["rolled_back"]) == ("v1", "v2")
    assert {service.post("/v1/recommend", {"user_id": "user-3"})["version"] for _ in range(10)} == {"v1"}
    assert seconds < 30  # 3 s on an idle machine, most of it the start of the command
    assert Registry(Storage.from_config(service.config.storage), "default").promote("production", "v2", "again")
    assert service.deploy().returncode == 0

    publish_damaged_export(service.config, "v3", source="v2")
    refused = service.deploy()
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: version v3 cannot be served: export: user ")
    assert refused.stderr.splitlines()[-1].endswith("production points to v2 again")
    assert service.post("/v1/recommend", {"user_id": "user-3"})["version"] == "v2"
    assert replicas(service) == before
