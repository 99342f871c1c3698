"""One way to run independent tasks over the cluster with Ray Data: bounded, with progress in rows, and one-line user errors."""

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
import ray.data
from ray.data import TaskPoolStrategy

from recsys.errors import UserError

logger = logging.getLogger(__name__)
Task = TypeVar("Task")
Outcome = dict[str, Any]
_LOG_SECONDS = 5.0


def run_tasks(label: str, function: Callable[[Task], Outcome], tasks: Sequence[Task]) -> list[Outcome]:
    """Run `function` on every task, one CPU each, and return the outcomes in the tasks' order.

    An outcome is a small JSON object with `rows`, which the progress counts. Ray may run a task again after a lost
    worker, so a task must write the same objects each time. Call it with Ray initialised.

    Raises:
        UserError: the first one that a task raised.
    """
    _quieten()

    def run_one(row: dict[str, int]) -> dict[str, str | int]:
        # A user's mistake travels as a value: as an exception Ray would print its traceback.
        try:
            return {"number": row["number"], "outcome": json.dumps(function(tasks[row["number"]])), "error": ""}
        except UserError as error:
            return {"number": row["number"], "outcome": "", "error": str(error)}

    numbers = ray.data.from_items([{"number": number} for number in range(len(tasks))], override_num_blocks=max(1, len(tasks)))
    outcomes: dict[int, Outcome] = {}
    started = logged = time.monotonic()
    for row in numbers.map(run_one, num_cpus=1, compute=TaskPoolStrategy(min(_num_cores(), len(tasks)))).iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        outcomes[row["number"]] = json.loads(row["outcome"])
        if time.monotonic() - logged > _LOG_SECONDS or len(outcomes) == len(tasks):
            logged = time.monotonic()
            num_rows = sum(outcome["rows"] for outcome in outcomes.values())
            logger.info("%s: %d of %d tasks, %d rows, %.1f s", label, len(outcomes), len(tasks), num_rows, logged - started)
    return [outcomes[number] for number in range(len(tasks))]


def _num_cores() -> int:
    """The cores that are there: a private Ray offers more slots than cores, and these tasks keep a core busy."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    slots = sum(int(node["Resources"].get("CPU", 0)) for node in nodes)
    return max(1, min(slots, (os.cpu_count() or 1) * len(nodes)))


def _quieten() -> None:
    """Leave the progress to the log lines here; Ray Data's own describe its operators and their resources."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
