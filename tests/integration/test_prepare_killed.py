"""prepare_data as a separate program, killed with all its processes at a random moment and started again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recsys.errors import UserError
from recsys.ingest.ray_tasks import Outcome, Record, run_tasks
from recsys.store import Storage, sha256_of
from tests.conftest import kill_descendants, local_ray

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
NUM_TASKS = 18
"""Fewer tasks than the passes events, partitions, k-core and shards have together."""

SMALL = ["data.source=synthetic", "data.synthetic.num_users=3000", "data.synthetic.num_items=50", "data.synthetic.mean_events=8"]


def start(folder: Path, log: str) -> "subprocess.Popen[str]":
    settings = [f"storage.root={folder / 'store'}", f"run.scratch={folder / 'scratch'}", "data.num_shards=6", "data.k_core=2", *SMALL]
    command = [sys.executable, "-m", "jobs.prepare_data", *(f"--set={setting}" for setting in settings)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "RECSYS_"))}
    output = (folder / log).open("w")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=output, text=True, start_new_session=True)


def finish(process: "subprocess.Popen[str]", log: Path) -> dict[str, Any]:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, log.read_text()[-4000:]
    return json.loads(output.splitlines()[-1])


def wait_for_outcomes(folder: Path, process: "subprocess.Popen[str]", number: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.glob("store/datasets/*/staging/outcomes/*/*.json"))) < number:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)


def files_of(folder: Path) -> dict[str, str]:
    dataset = next(folder.glob("store/datasets/*"))
    return {str(path.relative_to(dataset)): sha256_of(path) for path in dataset.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    kill_descendants("jobs.prepare_data")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, finish(start(folder, "log"), folder / "log")


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_preparation_goes_on_and_ends_the_same(seed: int, tmp_path: Path, uninterrupted: tuple[Path, dict[str, Any]]) -> None:
    reference, expected = uninterrupted
    chance = random.Random(seed)
    killed = start(tmp_path, "first")
    wait_for_outcomes(tmp_path, killed, number=chance.randint(1, NUM_TASKS))
    time.sleep(chance.uniform(0, 0.1))
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not list(tmp_path.glob("store/datasets/*/manifest.json"))
    result = finish(start(tmp_path, "second"), tmp_path / "second")
    assert "were already finished" in (tmp_path / "second").read_text()
    assert result["fingerprint"] == expected["fingerprint"]
    found, wanted = files_of(tmp_path), files_of(reference)
    assert found.keys() == wanted.keys()
    assert {name for name in found if found[name] != wanted[name]} <= {"manifest.json", "report.html"}  # etags and dates


@pytest.fixture
def _ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with local_ray(tmp_path_factory.mktemp("ray")):
        yield


@pytest.mark.usefixtures("_ray")
def test_tasks_that_are_finished_are_not_run_again(tmp_path: Path) -> None:
    class Done(Outcome):
        task: int

    record = Record(Storage(str(tmp_path)), str(tmp_path / "outcomes"), Done)

    def work(task: int) -> Done:
        if task == 5 and not (tmp_path / "mended").exists():
            raise UserError("task 5 cannot be done")
        with (tmp_path / f"ran-{task}").open("a") as file:
            file.write("x")
        return Done(rows=1, task=task)

    with pytest.raises(UserError, match="task 5 cannot be done"):
        run_tasks("work", work, range(6), record)
    known = record.read()
    assert 0 in known
    assert 5 not in known
    (tmp_path / "mended").touch()
    assert [outcome.task for outcome in run_tasks("work", work, range(6), record)] == list(range(6))
    assert {number: (tmp_path / f"ran-{number}").read_text() for number in known} == dict.fromkeys(known, "x")
    assert [outcome.task for outcome in run_tasks("work", work, range(6), record)] == list(range(6))
    assert (tmp_path / "ran-5").read_text() == "x"
