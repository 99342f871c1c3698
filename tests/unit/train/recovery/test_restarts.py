"""Reactions to failures, with a real store: a restart whose cause workers can read, or the end of the run."""

import pickle
import time
from pathlib import Path

import pytest

from recsys.config import Config, load_config
from recsys.errors import StoreError
from recsys.store import Storage
from recsys.train.checkpoints.lease import Lease
from recsys.train.failures import Failure
from recsys.train.recovery.restarts import Restarts

LOST = Failure(kind="worker_lost", message="gone", rank=1)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config().with_values({"storage.root": str(tmp_path / "store"), "run.name": "often", "training.max_failures": 2})


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the waiting times instead of sleeping."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def started(config: Config, *causes: Failure) -> tuple[Restarts, Lease]:
    storage = Storage.from_config(config.storage)
    owner = Lease(storage, config.run.name)
    owner._take(lease_seconds=0.1)
    restarts: Restarts = pickle.loads(pickle.dumps(Restarts(config, storage, owner, causes)))
    restarts.begin()
    return restarts, owner


def publish(config: Config, step: int) -> None:
    storage = Storage.from_config(config.storage)
    storage.write_bytes(storage.uri("runs", config.run.name, "checkpoints", f"step-{step:08d}", "manifest.json"), b"")


def test_workers_read_why_they_were_started(config: Config, waits: list[float]) -> None:
    driver = Failure(kind="driver_lost", message="ended")
    restarts, owner = started(config, driver)
    first = restarts.read()
    assert (first.token, first.causes, first.given_up) == (owner.token, (driver,), None)
    assert restarts.after(LOST)
    second = restarts.read()
    assert (second.causes, second.owned_since, waits) == ((driver, LOST), first.owned_since, [0.0])
    assert second.started_at > first.started_at


def test_a_new_checkpoint_wipes_the_slate(config: Config, waits: list[float]) -> None:
    restarts, _ = started(config, Failure(kind="driver_lost", message="ended"))
    assert restarts.after(LOST)
    assert restarts.after(LOST)
    publish(config, 10)
    assert restarts.after(LOST)
    assert restarts.read().causes == (LOST,)
    assert waits == [0.0, 1.0, 0.0]


def test_it_ends_after_too_many_failures_without_a_checkpoint(config: Config, waits: list[float]) -> None:
    restarts, _ = started(config)
    assert [restarts.after(LOST) for _ in range(3)] == [True, True, False]
    assert restarts.read().causes[-1] == LOST
    assert restarts.read().given_up == "training.max_failures = 2: it failed 3 times without a new checkpoint between"


def test_samples_of_a_loss_that_is_no_number_are_left_out_where_the_config_says_so(config: Config, waits: list[float]) -> None:
    restarts, _ = started(config.with_values({"training.on_non_finite": "skip"}))
    assert restarts.after(Failure(kind="not_finite", message="step 7", step=7))
    assert restarts.read().skip == (7,)


def test_ranks_that_the_watchdog_killed_were_hanging(config: Config, waits: list[float]) -> None:
    restarts, owner = started(config)
    owner.note_hang(1)
    assert restarts.after(LOST)
    (cause,) = restarts.read().causes
    assert cause.kind == "hang"
    assert cause.message.startswith("ranks 1 finished no step within training.hang_seconds")
    assert restarts.after(LOST)
    assert restarts.read().causes[-1] == LOST


def test_a_run_that_was_asked_to_stop_is_not_started_again(config: Config, waits: list[float]) -> None:
    restarts, owner = started(config)
    owner.ask_to_stop()
    assert not restarts.after(LOST)
    assert restarts.read().causes[-1].message == "run often was asked to stop; the same command continues from its newest checkpoint"
    assert restarts.read().causes[-1].is_explained


def test_nor_is_one_that_another_process_has_taken_over(config: Config, waits: list[float]) -> None:
    restarts, owner = started(config)
    owner._storage.write_bytes(owner._file(owner.token, "released"), b"")
    started(config)
    assert not restarts.after(LOST)
    assert "has taken it over" in restarts.read().causes[-1].message


def test_a_store_that_fails_for_a_while_is_waited_for(config: Config, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    restarts, _ = started(config)
    check, troubles = Lease.check, [StoreError("cannot list: SlowDown")]

    def check_a_bad_store(owner: Lease) -> None:
        if troubles:
            raise troubles.pop()
        check(owner)

    monkeypatch.setattr(Lease, "check", check_a_bad_store)
    assert restarts.after(LOST)
    assert waits == [0.0, 1.0]
    assert [cause.kind for cause in restarts.read().causes] == ["worker_lost", "store"]
