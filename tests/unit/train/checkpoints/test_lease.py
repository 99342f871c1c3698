"""One live owner per run: refusal, takeover, and what a superseded owner may still do."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from recsys.errors import UserError
from recsys.store import Storage
from recsys.train.checkpoints import lease as lease_module
from recsys.train.checkpoints.lease import Lease, Owner, SupersededError

LEASE = 1.0


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def test_owners_have_rising_numbers_and_a_released_run_is_free(storage: Storage) -> None:
    for expected in (1, 2, 3):
        lease = Lease(storage, "run")
        with lease.held(LEASE) as token:
            assert token == expected
            lease.check()
        assert lease.lost is None


def test_a_second_owner_is_refused_and_told_who_has_the_run(storage: Storage) -> None:
    with Lease(storage, "run").held(LEASE):
        with (
            pytest.raises(UserError, match=rf"run\.name = run: is trained by process {os.getpid()} on .* since .*choose another run\.name"),
            Lease(storage, "run").held(LEASE),
        ):
            pass
        with Lease(storage, "other").held(LEASE):
            pass


def hold(storage: Storage, ready: Any) -> None:
    with Lease(storage, "run").held(LEASE):
        ready.set()
        time.sleep(60)


def test_a_killed_owner_is_followed_at_once_on_the_same_machine(storage: Storage) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(storage, ready))
    process.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match=f"process {process.pid}"), Lease(storage, "run").held(60):
        pass
    assert process.pid is not None
    begun = time.time()
    while not storage.exists(storage.uri("runs", "run", "owners", "00000001", "alive")):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    lease = Lease(storage, "run")
    begin = time.monotonic()
    with lease.held(60):
        assert time.monotonic() - begin < 5
        assert lease.lost is not None
        assert lease.lost.process_id == process.pid
        assert lease.lost_at == pytest.approx(begun, abs=60)


def test_an_owner_of_another_machine_is_followed_when_it_gives_no_sign_of_life(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Owner.this_process().model_copy(update={"host": "elsewhere", "machine": "another"})
    monkeypatch.setattr(Owner, "this_process", lambda: elsewhere)
    first = Lease(storage, "run")
    with first.held(LEASE):
        with pytest.raises(UserError, match="on elsewhere"), Lease(storage, "run").held(LEASE):
            pass
        monkeypatch.setattr(Lease, "_last_beat", lambda self, token: b"0")  # its heartbeats no longer arrive
        second = Lease(storage, "run")
        begin = time.monotonic()
        with second.held(LEASE) as token:
            assert LEASE <= time.monotonic() - begin < LEASE + 5
            assert token == 2
            second.check()
            with pytest.raises(SupersededError, match="publishes nothing more"):
                first.check()


def test_where_processes_cannot_be_looked_up_the_lease_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "_machine", lambda: "")
    assert not Owner.this_process().is_here()
    assert not Owner.this_process().is_gone()


def race(storage: Storage, start: Any, results: Any, have_all_answered: Any) -> None:
    start.wait(60)
    try:
        with Lease(storage, "run").held(LEASE) as token:
            results.put(token)
            assert have_all_answered.wait(60)
    except UserError as error:
        results.put(str(error))


def test_of_racing_owners_one_wins(storage: Storage) -> None:
    context = multiprocessing.get_context("spawn")
    start, results, have_all_answered = context.Barrier(4), context.Queue(), context.Event()
    processes = [context.Process(target=race, args=(storage, start, results, have_all_answered)) for _ in range(4)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    have_all_answered.set()
    for process in processes:
        process.join()
    assert answers.count(1) == 1, answers
    assert sum("is trained by process" in str(answer) for answer in answers) == 3, answers
