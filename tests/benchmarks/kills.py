"""Repeatedly killed runs: equality with the undisturbed run, goodput, and the cost of each kill.

`python -m tests.benchmarks.kills [--kills 20] [--ends 10]`: in one run, workers are killed at random steps; in another, the workers and the
process that started them are killed, and the same command is run again each time.
"""

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from recsys.store import Storage
from tests.benchmarks.reading import show
from tests.benchmarks.tiny import add_tiny
from tests.conftest import kill_descendants
from tests.datasets import make_dataset
from tests.resume.ledger import order_kills
from tests.resume.runs import Run, assert_same, steps_per_epoch, workers_of

PACE_SECONDS = 0.05
"""Minimum duration of a step; with steps of milliseconds, restarts would take most of a run."""


def main() -> None:
    """Run all; print the results as they come and a table to stderr, and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ends", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    add_tiny(parser)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.kills, arguments.ends = 1, 1
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = make_dataset(Storage(str(folder / "store")), num_users=2000)
        runs = {kind: Run(dataset, folder, kind) for kind in ("undisturbed", "workers", "everything")}
        for run in runs.values():
            run.set_pace(PACE_SECONDS)
        try:
            undisturbed, results = runs["undisturbed"], []
            for run, num_kills, disturb in (
                (undisturbed, 0, run_to_the_end),
                (runs["everything"], arguments.ends, kill_everything),
                (runs["workers"], arguments.kills, kill_workers),
            ):
                results.append(row_of(disturb(run, num_kills, generator), num_kills))
                assert_same(run, undisturbed)
                print(results[-1], file=sys.stderr, flush=True)
        finally:
            kill_descendants("tests.resume.ledger")
    show("killed runs, each equal to the undisturbed one: weights, optimizer, random generators, every sample once an epoch", results)
    print(json.dumps(results))


def run_to_the_end(run: Run, num_kills: int, generator: random.Random) -> dict[str, Any]:
    """Run without kills."""
    return run.finish()


def kill_workers(run: Run, num_kills: int, generator: random.Random) -> dict[str, Any]:
    """Kill one of the two workers at each of `num_kills` random steps."""
    order_kills(run.scratch, [(generator.randrange(2), step) for step in generator.sample(range(1, run_steps(run)), num_kills)])
    return run.finish(timeout_seconds=60 * (num_kills + 5))


def kill_everything(run: Run, num_kills: int, generator: random.Random) -> dict[str, Any]:
    """Kill workers and driver some time after each new checkpoint, and run the same command again."""
    for number in range(num_kills):
        process = run.start()
        run.wait_for_checkpoint(process, above_step=number * run_steps(run) // (num_kills + 1))
        time.sleep(generator.random())
        for victim in (*workers_of(process), process):
            victim.send_signal(signal.SIGKILL)
        process.wait()
    return run.finish()


def run_steps(run: Run) -> int:
    """Return the number of steps of a complete run."""
    return 4 * steps_per_epoch(run.dataset)


def row_of(result: dict[str, Any], num_kills: int) -> dict[str, Any]:
    """Summarize a run's result.

    Raises:
        RuntimeError: the incidents do not have one cause per kill.
    """
    incidents = result["incidents"]  # two kills without a new checkpoint in between are two causes of one incident
    if (found := sum(len(incident["causes"]) for incident in incidents)) != num_kills:
        raise RuntimeError(f"{num_kills} kills, but {found} causes of incidents")
    row: dict[str, Any] = {"run": result["run"], "kills": num_kills, "steps": result["steps"], "goodput": result["goodput"]}
    for part in ("seconds", "start_seconds", "load_seconds", "seek_seconds"):
        row[part] = statistics.median(incident[part] for incident in incidents) if incidents else 0.0
    return row


if __name__ == "__main__":
    main()
