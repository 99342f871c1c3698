"""A run that tests interrupt: `tests.resume.ledger` in a separate process on a small dataset, and the results to compare."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from recsys.data.manifest import Dataset
from recsys.train.checkpoints.manifest import read_manifest
from tests.datasets import small_settings
from tests.resume.ledger import Ledger, read_ledger

ROOT = Path(__file__).parents[2]
EPOCHS = 4
BATCH = 16
EVERY = 10


class Run:
    """A run of `tests.resume.ledger`, which is `jobs.train` with a ledger, that may be started several times."""

    def __init__(self, dataset: Dataset, folder: Path, name: str, **values: object) -> None:
        self.dataset, self.scratch, self.name = dataset, folder / name, name
        base = {
            "run__scratch": str(self.scratch),
            "run__name": name,
            "training__num_workers": 2,
            "training__global_batch_size": BATCH,
            "training__micro_batch_size": BATCH // 2,
            "training__epochs": EPOCHS,
            "training__early_stopping_patience": EPOCHS,
            "checkpoint__every_steps": EVERY,
        }
        settings = small_settings(dataset, folder, **base | values)
        self.command = [sys.executable, "-m", "tests.resume.ledger", *(f"--set={key}={value}" for key, value in settings.items())]
        self.scratch.mkdir(mode=0o700)
        self.log = self.scratch / "log"

    def set_pace(self, seconds: float) -> None:
        """Set the minimum time of each following micro batch."""
        (self.scratch / "pace").write_text(str(seconds))

    def start(self, cluster: Mapping[str, str] = {}) -> "subprocess.Popen[str]":
        """Start it on a private Ray, or on the cluster given by these environment variables."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | dict(cluster)
        return subprocess.Popen(self.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=self.log.open("a"), text=True)

    def finish(self, process: "subprocess.Popen[str] | None" = None, timeout_seconds: float = 500) -> dict[str, Any]:
        """Start it unless `process` is given, wait for its end, and return the JSON that it prints."""
        process = process or self.start()
        output, _ = process.communicate(timeout=timeout_seconds)
        assert process.returncode == 0, self.log.read_text()[-4000:]
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return result

    def wait_for_checkpoint(self, process: "subprocess.Popen[str]", above_step: int) -> None:
        folder, deadline = self.dataset.storage.uri("runs", self.name, "checkpoints"), time.monotonic() + 300
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


def steps_per_epoch(dataset: Dataset) -> int:
    return -(-dataset.manifest.num_samples // BATCH)


def assert_same(run: Run, undisturbed: Run) -> None:
    """Compare weights, optimizer and training samples, and check that every id occurs once per epoch."""
    per_epoch = steps_per_epoch(run.dataset)
    assert run.hashes(EPOCHS * per_epoch) == undisturbed.hashes(EPOCHS * per_epoch)
    ledger, _ = run.ledger()
    assert ledger == undisturbed.ledger()[0]
    for epoch in range(EPOCHS):
        ids = [sample for (_, step), ids in ledger.items() if step // per_epoch == epoch for sample in ids]
        assert sorted(ids) == list(range(run.dataset.manifest.num_samples))
