"""A killed worker and a killed driver: the run ends by itself, or by the same command given again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from recsys.data.manifest import Dataset
from recsys.storage import Storage
from tests.conftest import kill_descendants
from tests.datasets import make_dataset

ROOT = Path(__file__).parents[2]
EPOCHS = 6

pytestmark = pytest.mark.ray


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(Storage(str(tmp_path / "store")), num_users=200)


def start(dataset: Dataset, folder: Path, log: str) -> "subprocess.Popen[str]":
    settings = {
        "storage.root": dataset.storage.root,
        "run.scratch": str(folder / "scratch"),
        "run.name": "killed",
        "data.dataset": dataset.uri,
        "data.max_history": 10,
        "model.width": 16,
        "model.text.mode": "off",
        "training.global_batch_size": 16,
        "training.micro_batch_size": 8,
        "training.epochs": EPOCHS,
        "training.early_stopping_patience": EPOCHS,
        "checkpoint.every_steps": 10,
    }
    command = [sys.executable, "-m", "jobs.train", *(f"--set={key}={value}" for key, value in settings.items())]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=(folder / log).open("w"), text=True)


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    kill_descendants("jobs.train")


def wait_for_checkpoints(dataset: Dataset, process: "subprocess.Popen[str]", log: Path, above_step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        manifests = [
            found.uri for found in dataset.storage.list(dataset.storage.uri("runs", "killed", "checkpoints")) if "manifest" in found.uri
        ]
        if any(int(uri.split("step-")[1][:8]) > above_step for uri in manifests):
            return
        time.sleep(0.1)
    pytest.fail(f"no checkpoint in time; exit status {process.poll()}; {log.read_text()[-4000:]}")


def finish(process: "subprocess.Popen[str]", log: Path) -> dict[str, object]:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, log.read_text()[-4000:]
    return json.loads(output.splitlines()[-1])


def resumed_steps(log: Path) -> list[int]:
    return [int(line.rpartition(" ")[2]) for line in log.read_text().splitlines() if "resuming run killed from step" in line]


def test_a_run_whose_worker_is_killed_ends_by_itself(dataset: Dataset, tmp_path: Path) -> None:
    process = start(dataset, tmp_path, "log")
    wait_for_checkpoints(dataset, process, tmp_path / "log", above_step=20)
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    result = finish(process, tmp_path / "log")
    assert result["steps"] == EPOCHS * -(-dataset.manifest.num_samples // 16)
    assert resumed_steps(tmp_path / "log")
    assert resumed_steps(tmp_path / "log")[0] >= 20


def test_a_killed_run_goes_on_when_it_is_submitted_again(dataset: Dataset, tmp_path: Path) -> None:
    process = start(dataset, tmp_path, "first")
    wait_for_checkpoints(dataset, process, tmp_path / "first", above_step=20)
    process.kill()
    process.wait()
    again = start(dataset, tmp_path, "second")
    result = finish(again, tmp_path / "second")
    assert result["steps"] == EPOCHS * -(-dataset.manifest.num_samples // 16)
    assert resumed_steps(tmp_path / "second")[0] >= 20
    third = start(dataset, tmp_path, "third")
    assert finish(third, tmp_path / "third")["checkpoint"] == result["checkpoint"]
    assert not resumed_steps(tmp_path / "third")
    assert [found.uri for found in dataset.storage.list(dataset.storage.uri("runs")) if "/runs/killed/" not in found.uri] == []
