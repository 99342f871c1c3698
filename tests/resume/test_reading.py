"""Readers on S3, killed by SIGKILL and restarted, also with another number of ranks: no sample lost or repeated, the same order."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from recsys.data.manifest import Dataset
from recsys.data.plan import EpochPlan
from recsys.store import Storage
from tests.datasets import make_dataset
from tests.resume.reading_worker import GLOBAL_BATCH_SIZE

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 90


@pytest.fixture
def dataset(s3_storage: Storage) -> Dataset:
    return make_dataset(s3_storage, num_users=900, max_history=6)


@contextmanager
def reading(
    dataset: Dataset, folder: Path, attempt: int, world_size: int, pause_seconds: float
) -> Iterator[list["subprocess.Popen[bytes]"]]:
    first_step = position(folder)
    for path in folder.glob("position-*"):
        path.unlink()
    orders = [
        {
            "root": dataset.storage.root,
            "endpoint": dataset.storage.endpoint,
            "dataset": dataset.uri,
            "scratch": str(folder / "scratch"),
            "folder": str(folder),
            "rank": rank,
            "world_size": world_size,
            "attempt": attempt,
            "first_step": first_step,
            "pause_seconds": pause_seconds,
        }
        for rank in range(world_size)
    ]
    (folder / "start").write_text(json.dumps({"first_step": first_step, "world_size": world_size}))
    processes = [subprocess.Popen([sys.executable, "-m", "tests.resume.reading_worker", json.dumps(order)], cwd=ROOT) for order in orders]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def position(folder: Path) -> int:
    """Return the position that all ranks have reached: the smallest saved one, or the start of the last attempt if a rank saved none."""
    if not (folder / "start").exists():
        return 0
    start = json.loads((folder / "start").read_text())
    kept = [int(path.read_text()) for path in folder.glob("position-[0-9]")]
    return min(kept) if len(kept) == start["world_size"] else int(start["first_step"])


def ledger(folder: Path) -> list[dict[str, Any]]:
    lines = [line for path in sorted(folder.glob("ledger-*")) for line in path.read_text().splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def kill_after(processes: list["subprocess.Popen[bytes]"], folder: Path, step: int) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while max((line["step"] for line in ledger(folder)), default=-1) < step:
        assert time.monotonic() < deadline, "the readers did not come so far in time"
        assert all(process.poll() in (None, 0) for process in processes)
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()


def consumed(folder: Path) -> dict[int, dict[int, dict[str, Any]]]:
    """Return what the last attempt that reached each step read there, by step and rank; rolled-back steps are left out."""
    last: dict[int, int] = {}
    for line in ledger(folder):
        last[line["step"]] = max(line["attempt"], last.get(line["step"], 0))
    steps: dict[int, dict[int, dict[str, Any]]] = {}
    for line in ledger(folder):
        if line["attempt"] == last[line["step"]]:
            assert line["rank"] not in steps.setdefault(line["step"], {}), "a rank did one step twice in one attempt"
            steps[line["step"]][line["rank"]] = line
    return steps


@pytest.mark.parametrize(
    ("world_sizes", "seed"),
    [((2, 1, 2), 0), pytest.param((1, 1, 1, 1), 1, marks=pytest.mark.slow), pytest.param((2, 3, 2), 2, marks=pytest.mark.slow)],
)
def test_killed_readers_lose_and_repeat_nothing(dataset: Dataset, tmp_path: Path, world_sizes: tuple[int, ...], seed: int) -> None:
    rows = [row for shard in dataset.manifest.train_shards for row in dataset.read_shard(shard)["items"].to_pylist()]
    sizes = tuple(size for shard in dataset.manifest.train_shards for size in shard.row_groups)
    plan = EpochPlan(sizes, GLOBAL_BATCH_SIZE, dataset.manifest.num_streams, 2, seed=0, epoch=0)
    moments = sorted(random.Random(seed).sample(range(6, plan.num_steps - 6), len(world_sizes) - 1))
    rolled_back = 0
    for attempt, world_size in enumerate(world_sizes):
        is_last = attempt == len(world_sizes) - 1
        with reading(dataset, tmp_path, attempt, world_size, pause_seconds=0.0 if is_last else 0.01) as processes:
            if is_last:
                assert [process.wait(DEADLINE_SECONDS) for process in processes] == [0] * world_size
            else:
                kill_after(processes, tmp_path, moments[attempt])
                done = max(line["step"] for line in ledger(tmp_path)) + 1
                rolled_back += done - position(tmp_path)
    steps = consumed(tmp_path)
    order: list[int] = []
    for step in range(plan.num_steps):
        shares = {rank: line["samples"] for rank, line in steps[step].items()}
        first = step * GLOBAL_BATCH_SIZE
        num_samples = sum(map(len, shares.values()))
        dealt = [shares[(first + place) % len(shares)].pop(0) for place in range(num_samples)]
        assert all(items == rows[sample] for sample, items in dealt)
        order += [sample for sample, _ in dealt]
    assert order == [sample for step in range(plan.num_steps) for sample in plan.step_ids(step).tolist()]
    assert sorted(order) == list(range(len(rows)))
    assert rolled_back > 0
