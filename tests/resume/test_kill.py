"""Killed workers and killed drivers: the run ends by itself, or by the same command given again, and is the one that nobody disturbed."""

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

import psutil
import pytest

from recsys.data.manifest import Dataset
from recsys.storage import Storage
from recsys.train.checkpoint import read_manifest
from tests.conftest import kill_descendants
from tests.datasets import make_dataset
from tests.resume.ledger import Ledger, order_kills, read_ledger

ROOT = Path(__file__).parents[2]
EPOCHS = 4
BATCH = 16
EVERY = 10
UPLOAD_STEPS = 5
"""At most so many of these steps, of some milliseconds each, are made while a checkpoint is uploaded."""

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("killed") / "store")), num_users=300)


class Run:
    """A run of `tests.resume.ledger`, which is `jobs.train` with a ledger, that may be started several times."""

    def __init__(self, dataset: Dataset, folder: Path, name: str, **values: object) -> None:
        self.dataset, self.scratch, self.name = dataset, folder / name, name
        settings = {
            "storage.root": dataset.storage.root,
            "run.scratch": str(self.scratch),
            "run.name": name,
            "data.dataset": dataset.uri,
            "data.max_history": 10,
            "model.width": 16,
            "model.text.mode": "off",
            "training.global_batch_size": BATCH,
            "training.micro_batch_size": BATCH // 2,
            "training.epochs": EPOCHS,
            "training.early_stopping_patience": EPOCHS,
            "checkpoint.every_steps": EVERY,
            **{key.replace("__", "."): value for key, value in values.items()},
        }
        self.command = [sys.executable, "-m", "tests.resume.ledger", *(f"--set={key}={value}" for key, value in settings.items())]
        self.scratch.mkdir(mode=0o700)
        self.log = self.scratch / "log"

    def start(self) -> "subprocess.Popen[str]":
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        return subprocess.Popen(self.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=self.log.open("a"), text=True)

    def finish(self, process: "subprocess.Popen[str] | None" = None) -> dict[str, Any]:
        """Start it, or take it as started, and wait for what it prints."""
        process = process or self.start()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, self.log.read_text()[-4000:]
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return result

    def wait_for_checkpoint(self, process: "subprocess.Popen[str]", above_step: int) -> None:
        folder, deadline = self.dataset.storage.uri("runs", self.name, "checkpoints"), time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            manifests = [found.uri for found in self.dataset.storage.list(folder) if found.uri.endswith("manifest.json")]
            if any(int(uri.split("step-")[1][:8]) > above_step for uri in manifests):
                return
            time.sleep(0.1)
        pytest.fail(f"no checkpoint in time; exit status {process.poll()}; {self.log.read_text()[-4000:]}")

    def resumed_steps(self) -> list[int]:
        mark = f"resuming run {self.name} from step"
        return [int(line.rpartition(" ")[2]) for line in self.log.read_text().splitlines() if mark in line]

    def hashes(self, step: int) -> dict[str, str]:
        """Return the hashes of a checkpoint's files: weights, optimizer and random generators of both ranks."""
        uri = self.dataset.storage.uri("runs", self.name, "checkpoints", f"step-{step:08d}")
        return {file.path: file.sha256 for file in read_manifest(self.dataset.storage, uri).files}

    def ledger(self) -> tuple[Ledger, dict[int, int]]:
        return read_ledger(self.scratch, 2)


def workers_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]
    assert len(workers) == 2
    return workers


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    kill_descendants("tests.resume.ledger")


@pytest.fixture(scope="module")
def undisturbed(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    run = Run(dataset, tmp_path_factory.mktemp("undisturbed"), "undisturbed")
    result = run.finish()
    assert result["incidents"] == []
    yield run
    kill_descendants("tests.resume.ledger")


def steps_per_epoch(dataset: Dataset) -> int:
    return -(-dataset.manifest.num_samples // BATCH)


def assert_same(run: Run, undisturbed: Run) -> None:
    """Compare weights, optimizer, and what was trained on, with every id once in each epoch."""
    per_epoch = steps_per_epoch(run.dataset)
    assert run.hashes(EPOCHS * per_epoch) == undisturbed.hashes(EPOCHS * per_epoch)
    ledger, _ = run.ledger()
    assert ledger == undisturbed.ledger()[0]
    for epoch in range(EPOCHS):
        ids = [sample for (_, step), ids in ledger.items() if step // per_epoch == epoch for sample in ids]
        assert sorted(ids) == list(range(run.dataset.manifest.num_samples))


def test_a_run_whose_workers_are_killed_at_random_steps_ends_by_itself(dataset: Dataset, undisturbed: Run, tmp_path: Path) -> None:
    per_epoch = steps_per_epoch(dataset)
    kills = [
        (generator.randrange(2), per_epoch * seed + generator.randrange(1, per_epoch))
        for seed in range(3)
        if (generator := random.Random(seed))
    ]
    kills.append((0, 3 * per_epoch))  # right after an epoch was reported
    run = Run(dataset, tmp_path, "killed")
    order_kills(run.scratch, kills)
    result = run.finish()
    assert_same(run, undisturbed)
    assert [incident["causes"][-1]["kind"] for incident in result["incidents"]] == ["worker_lost"] * len(kills)
    assert [incident["step"] for incident in result["incidents"]] == run.resumed_steps()
    for (_, step), resumed in zip(kills, run.resumed_steps(), strict=True):
        assert 0 <= step - resumed <= EVERY + UPLOAD_STEPS, (step, resumed)
    assert run.resumed_steps()[-1] == 3 * per_epoch
    assert 0 < result["goodput"] < 1
    assert all(incident["seconds"] > incident["start_seconds"] + incident["load_seconds"] > 0 for incident in result["incidents"])


def test_a_killed_run_goes_on_when_it_is_submitted_again(dataset: Dataset, undisturbed: Run, tmp_path: Path) -> None:
    run = Run(dataset, tmp_path, "submitted-again")
    process = run.start()
    run.wait_for_checkpoint(process, above_step=20)
    for victim in (*workers_of(process), process):
        victim.send_signal(signal.SIGKILL)
    process.wait()
    result = run.finish()
    assert_same(run, undisturbed)
    assert run.resumed_steps()[0] >= 20
    assert [incident["causes"][0]["kind"] for incident in result["incidents"]] == ["driver_lost"]
    assert run.finish()["checkpoint"] == result["checkpoint"]
    assert len(run.resumed_steps()) == 1
    folders = {
        found.uri.removeprefix(dataset.storage.uri("runs")).split("/")[1] for found in dataset.storage.list(dataset.storage.uri("runs"))
    }
    assert not [folder for folder in folders if folder.startswith("submitted-again") and folder != "submitted-again"]


def test_a_worker_that_stands_still_is_found_and_the_run_goes_on(dataset: Dataset, undisturbed: Run, tmp_path: Path) -> None:
    run = Run(dataset, tmp_path, "stopped-worker", training__hang_seconds=5)
    process = run.start()
    run.wait_for_checkpoint(process, above_step=0)
    workers_of(process)[1].send_signal(signal.SIGSTOP)
    result = run.finish(process)
    assert_same(run, undisturbed)
    assert [incident["causes"][-1]["kind"] for incident in result["incidents"]] == ["hang"]
    assert result["incidents"][0]["seconds"] < 5 + 60


def test_a_run_that_is_told_to_end_saves_its_last_step_and_repeats_none(dataset: Dataset, undisturbed: Run, tmp_path: Path) -> None:
    run = Run(dataset, tmp_path, "stopped", checkpoint__every_steps=10_000)
    process = run.start()
    run.wait_for_checkpoint(process, above_step=0)
    begin = time.monotonic()
    process.terminate()
    process.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    assert process.returncode == 2
    assert "run stopped was asked to stop; the same command goes on from step" in run.log.read_text()
    result = run.finish()
    assert_same(run, undisturbed)
    assert result["incidents"] == []
    assert set(run.ledger()[1].values()) == {1}


@pytest.mark.slow
def test_a_run_that_is_submitted_twice_is_trained_by_the_first(dataset: Dataset, tmp_path: Path) -> None:
    run = Run(dataset, tmp_path, "twice", training__epochs=60, training__early_stopping_patience=60)
    first = run.start()
    run.wait_for_checkpoint(first, above_step=1)
    second = run.start()
    _, _ = second.communicate(timeout=120)
    assert second.returncode == 2
    assert f"run.name = twice: is trained by process {first.pid} on" in run.log.read_text()
    assert first.poll() is None
    first.kill()


@pytest.mark.parametrize(
    ("resume", "error"), [("must", "has no checkpoint"), pytest.param("never", "has checkpoints", marks=pytest.mark.slow)]
)
def test_whether_to_go_on_may_be_said(dataset: Dataset, undisturbed: Run, tmp_path: Path, resume: str, error: str) -> None:
    name = "absent" if resume == "must" else "undisturbed"
    run = Run(dataset, tmp_path, name, run__resume=resume, training__epochs=EPOCHS + 1)
    process = run.start()
    process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"run.resume = {resume}: run {name} {error}" in run.log.read_text()
