"""A process without heartbeat is killed and reported; one that beats, rests or ends is not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recsys.store import Storage
from recsys.train.checkpoints.lease import Lease

LIMIT = 1.0
PATIENT = 4.0
PROGRAM = """
import sys, time
from recsys.config.storage import StorageConfig
from recsys.train.recovery.watchdog import Watchdog
with Watchdog({limit}, StorageConfig(root=sys.argv[1]), "run", 3, 1) as watchdog:
    {body}
print("ended")
"""


def run(storage: Storage, body: str, limit: float = LIMIT) -> "subprocess.Popen[str]":
    program = PROGRAM.format(limit=limit, body=body)
    return subprocess.Popen([sys.executable, "-c", program, storage.root], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(5)",
        "watchdog.beat(); watchdog.rest(); time.sleep(5)",
        "[(watchdog.beat(), time.sleep(0.5)) for _ in range(10)]",
        "watchdog.beat()",
    ],
    ids=["before the first beat", "at rest", "beating", "ended"],
)
def test_who_is_not_silent_lives(tmp_path: Path, body: str) -> None:
    process = run(Storage(str(tmp_path)), body, PATIENT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "ended\n"), errors
    assert Lease(Storage(str(tmp_path)), "run", 3).take_hangs() == []


@pytest.mark.parametrize(
    ("word", "is_stopped"),
    [("beat", False), ("beat", True), ("rest", True)],
    ids=["deadlocked", "stopped in a step", "stopped at rest"],
)
def test_who_is_silent_is_killed_and_named(tmp_path: Path, word: str, is_stopped: bool) -> None:
    process = run(Storage(str(tmp_path)), f"watchdog.{word}(); print('begun', flush=True); time.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    if is_stopped:
        os.kill(process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert LIMIT * 0.9 <= time.monotonic() - begin < 30
    assert "rank 1 has finished no step for 1.0 s; killing it" in errors
    lease = Lease(Storage(str(tmp_path)), "run", 3)
    assert lease.take_hangs() == [1]
    assert lease.take_hangs() == []
