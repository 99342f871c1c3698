"""Runs independent tasks on the cluster with Ray Data: bounded concurrency, resumable, with progress."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from recsys.errors import UserError
from recsys.store import Storage, join
from recsys.terminal import stream

logger = logging.getLogger(__name__)
_LOG_SECONDS = 5.0
_READERS = 16


class Outcome(BaseModel):
    """The report of a finished task, small enough to be stored as JSON; `rows` is what the progress counts."""

    model_config = ConfigDict(frozen=True)

    rows: int


Task = TypeVar("Task")
Reported = TypeVar("Reported", bound=Outcome)


@dataclass(frozen=True)
class Record(Generic[Reported]):
    """The folder that stores the outcome of each finished task, of class `kind`, until the result of all tasks is published."""

    storage: Storage
    folder: str
    kind: type[Reported]

    def add(self, number: int, outcome: Reported) -> None:
        """Record that a task is finished; call it after the task's objects are written."""
        self.storage.write_bytes(join(self.folder, f"{number:06d}.json"), outcome.model_dump_json().encode())

    def read(self) -> dict[int, Reported]:
        """Return the outcomes of finished tasks, by task number."""
        uris = [found.uri for found in self.storage.list(self.folder)]
        with ThreadPoolExecutor(_READERS) as pool:
            outcomes = [self.kind.model_validate_json(content) for content in pool.map(self.storage.read_bytes, uris)]
        return {int(uri.rpartition("/")[2].removesuffix(".json")): outcome for uri, outcome in zip(uris, outcomes, strict=True)}


def run_tasks(label: str, function: Callable[[Task], Reported], tasks: Sequence[Task], record: Record[Reported]) -> list[Reported]:
    """Run `function` on every task that is not in `record`, one CPU each; return all outcomes in task order.

    Ray may run a task again after it loses a worker, so tasks must be idempotent. Ray must be initialized.

    Raises:
        UserError: the first one that a task raised.
    """
    import ray.data  # Ray reads its environment at import, after `recsys.launch.head.connect` has set it
    from ray.data import TaskPoolStrategy

    _silence()
    outcomes = {number: outcome for number, outcome in record.read().items() if number < len(tasks)}
    waiting = [number for number in range(len(tasks)) if number not in outcomes]

    def run_one(row: dict[str, int]) -> dict[str, str | int]:
        # A user error is returned as a value: Ray would print the traceback of an exception.
        number = row["number"]
        try:
            outcome = function(tasks[number])
        except UserError as error:
            return {"number": number, "outcome": "", "error": str(error)}
        record.add(number, outcome)
        pa.default_memory_pool().release_unused()  # workers are reused and would keep the memory of their largest task
        return {"number": number, "outcome": outcome.model_dump_json(), "error": ""}

    with Progress(label, len(tasks), len(outcomes)) as progress:
        if waiting:
            numbers = ray.data.from_items([{"number": number} for number in waiting], override_num_blocks=len(waiting))
            for row in numbers.map(run_one, num_cpus=1, compute=TaskPoolStrategy(min(_num_cores(), len(waiting)))).iter_rows():
                if row["error"]:
                    raise UserError(row["error"])
                outcomes[row["number"]] = record.kind.model_validate_json(row["outcome"])
                progress.add(outcomes[row["number"]].rows)
    return [outcomes[number] for number in range(len(tasks))]


class Progress:
    """Progress of one pass on stderr (tasks, rows, rows/s): a live bar on a terminal, otherwise a line every few seconds."""

    def __init__(self, label: str, num_tasks: int, num_known: int) -> None:
        self._label, self._num_tasks, self._num_done, self._num_rows = label, num_tasks, num_known, 0
        self._started = self._logged = time.monotonic()
        self._bar = tqdm(total=num_tasks, initial=num_known, desc=label, unit="task", file=stream(), disable=not stream().isatty())
        if num_known:
            logger.info("%s: %d of %d tasks were already finished", label, num_known, num_tasks)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, num_rows: int) -> None:
        """Count one finished task and its rows."""
        self._num_done += 1
        self._num_rows += num_rows
        now = time.monotonic()
        rows_per_second = self._num_rows / max(now - self._started, 1e-9)
        self._bar.set_postfix_str(f"{self._num_rows:,} rows, {rows_per_second:,.0f} rows/s", refresh=False)
        self._bar.update()
        if self._bar.disable and (now - self._logged > _LOG_SECONDS or self._num_done == self._num_tasks):
            self._logged = now
            logger.info(
                "%s: %d of %d tasks, %d rows, %.0f rows/s", self._label, self._num_done, self._num_tasks, self._num_rows, rows_per_second
            )


def _num_cores() -> int:
    """Return how many tasks may run at once: a private Ray has more CPU slots than cores, and each task keeps a core busy."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    slots = sum(int(node["Resources"].get("CPU", 0)) for node in nodes)
    return max(1, min(slots, (os.cpu_count() or 1) * len(nodes)))


def _silence() -> None:
    """Turn off Ray Data's own progress output, which describes its operators and their resources."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
