"""Cost of a checkpoint: how long it blocks training, compared with a synchronous save of the same bytes.

`python -m tests.benchmarks.checkpointing DATASET` with the `dataset` that `python -m jobs.prepare_data` printed. The loop saves every 50
steps and, for every second checkpoint, waits until it is published. This is repeated on a real S3 server whose answers are 50 ms late.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from recsys.config import Config, load_config
from recsys.data.manifest import Dataset
from recsys.objectives.next_item import NextItem
from recsys.objectives.objective import MicroBatch
from recsys.store import Storage
from recsys.train.loop import Trainer
from recsys.train.monitoring.reporter import Metrics
from recsys.train.state import TrainingState
from tests.benchmarks.peers.dataset import served_copy
from tests.benchmarks.reading import show
from tests.benchmarks.step_time import RECIPE
from tests.benchmarks.tiny import add_tiny, dataset_of
from tests.distributed import run_distributed
from tests.proxy import FaultProxy, Faults
from tests.reporters import LocalReporter

LATE_SECONDS = 0.05


def main() -> None:
    """Measure with both stores; print a table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?")
    add_tiny(parser)
    parser.add_argument("--config", default=str(RECIPE))
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="of the config; repeatable")
    parser.add_argument("--saves", type=int, default=12, help="half of them waited for")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    rows = []
    for name, place in (("folder", in_folder), ("S3, answers 50 ms late", on_slow_s3)):
        with tempfile.TemporaryDirectory() as folder, dataset_of(arguments) as dataset, place(Path(folder), dataset) as values:
            config = config_of(arguments, values)
            found = run_distributed(measure, arguments.workers, config, timeout_seconds=3000)
            rows.append({"store": name, **found[0]})
            print(rows[-1], file=sys.stderr)
    show(f"a checkpoint every {arguments.every} steps, {arguments.workers} workers", rows)
    print(json.dumps(rows))


@contextlib.contextmanager
def in_folder(folder: Path, dataset: str) -> Iterator[dict[str, Any]]:
    """Train from the dataset's own store and write the checkpoints to it."""
    yield {"run.scratch": str(folder), "storage.root": dataset.rpartition("/datasets/")[0], "data.dataset": dataset}


@contextlib.contextmanager
def on_slow_s3(folder: Path, dataset: str) -> Iterator[dict[str, Any]]:
    """Copy the dataset to an S3 server with delayed answers, and train from there."""
    held = Dataset.open(Storage(dataset.rpartition("/datasets/")[0]), dataset)
    with served_copy(held, folder / "server") as copy, FaultProxy(str(copy.storage.endpoint)) as proxy:
        proxy.faults = Faults(rates={"stall": 1.0}, stall_seconds=LATE_SECONDS)
        yield {
            "run.scratch": str(folder / "scratch"),
            "storage.root": copy.storage.root,
            "storage.endpoint": proxy.endpoint,
            "data.dataset": copy.uri,
        }


def config_of(arguments: argparse.Namespace, values: dict[str, Any]) -> Config:
    """Return the recipe with another location, duration and number of workers."""
    config = load_config(arguments.config, arguments.overrides)
    return config.with_values(
        {
            "run.name": f"checkpointing-{time.time_ns()}",
            "training.num_workers": arguments.workers,
            "training.micro_batch_size": config.training.global_batch_size // arguments.workers,
            "training.max_steps": arguments.every * (arguments.saves + 2),
            "training.epochs": 1000,
            "checkpoint.every_steps": arguments.every,
            **values,
        }
    )


def measure(config: Config) -> dict[str, float]:
    """Train with alternating kinds of saves; every rank must call this."""
    dataset, timer = Dataset.open(Storage.from_config(config.storage), config.data.dataset), StepTimer()
    trainer = Trainer(dataset.complete(config), dataset, timer, NextItem)
    saves = Saves(trainer, config.checkpoint.every_steps)
    trainer.run()
    blocked, waited = (statistics.median(saves.seconds[kind][1:]) for kind in ("blocked", "waited"))
    step = statistics.median(timer.seconds)
    newest = trainer.checkpoints.newest()
    return {
        "megabytes": sum(file.num_bytes for file in newest.files) / 1e6 if newest else 0.0,
        "step_seconds": step,
        "blocked_seconds": blocked,
        "blocked_worst": max(saves.seconds["blocked"][1:]),
        "stall_percent": 100 * blocked / (config.checkpoint.every_steps * step),
        "waited_for_seconds": waited,
        "times_less": waited / blocked,
    }


class StepTimer(LocalReporter):
    """Records the seconds between the ends of consecutive steps."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def step(self, step: int, losses: Metrics, batches: Sequence[MicroBatch]) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


class Saves:
    """Times the trainer's saves within an epoch; for every second one it waits until the checkpoint is published."""

    def __init__(self, trainer: Trainer, every_steps: int) -> None:
        self.seconds: dict[str, list[float]] = {"blocked": [], "waited": []}
        self._store, self._every, self._last = trainer.checkpoints, every_steps, trainer.total_steps
        self._upload, self._publish = trainer.checkpoints.upload, trainer.checkpoints.publish
        self._begin = 0.0
        trainer.checkpoints.upload = self._timed_upload  # type: ignore[method-assign]
        trainer.checkpoints.publish = self._timed_publish  # type: ignore[method-assign]

    def _timed_upload(self, engine: Any, step: int) -> None:
        self._begin = time.perf_counter()
        self._upload(engine, step)

    def _timed_publish(self, state: TrainingState) -> None:
        number = state.step // self._every
        self._publish(state)
        if state.step % self._every or state.step_in_epoch == 0 or state.step == self._last:  # a validation comes in between
            return
        if number % 2:
            self._store.wait()
        self.seconds["waited" if number % 2 else "blocked"].append(time.perf_counter() - self._begin)


if __name__ == "__main__":
    main()
