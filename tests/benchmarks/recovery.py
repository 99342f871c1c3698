"""Seconds from the kill of a worker to the first new step, by part, compared with plain Ray Train with DeepSpeed.

`python -m tests.benchmarks.recovery [--rounds 3]`: both train the same model on the same batches, one after the other, each on its own
private Ray, with a checkpoint every 10 steps. A worker is killed at the same step of each.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from recsys.data.manifest import Dataset
from recsys.store import Storage
from tests.benchmarks.reading import show
from tests.benchmarks.tiny import add_tiny
from tests.conftest import kill_descendants
from tests.datasets import make_dataset
from tests.resume.ledger import order_kills
from tests.resume.runs import Run, assert_same, steps_per_epoch

OURS, PLAIN = "jobs.train", "Ray Train + DeepSpeed"
KILLED_RANK = 1


def main() -> None:
    """Run the rounds; print a table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--users", type=int, default=600)
    add_tiny(parser)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.rounds, arguments.users = 1, 200
    found: dict[str, list[dict[str, float]]] = {OURS: [], PLAIN: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = make_dataset(Storage(str(folder / "store")), num_users=arguments.users)
        try:
            undisturbed = Run(dataset, folder, "undisturbed")
            undisturbed.finish()
            for number in range(arguments.rounds):
                for contender in (OURS, PLAIN) if number % 2 else (PLAIN, OURS):
                    run = Run(dataset, folder, f"{'ours' if contender == OURS else 'plain'}-{number}")
                    found[contender].append(measure(run, contender, kill_step(dataset)))
                    if contender == OURS:
                        assert_same(run, undisturbed)
        finally:
            for verb in ("tests.resume.ledger", "plain_ray_train"):
                kill_descendants(verb)
    rows = [
        {"contender": name, **{key: statistics.median(each[key] for each in rounds) for key in rounds[0]}} for name, rounds in found.items()
    ]
    show("seconds from a worker's kill to the first new step, medians; ours equal to the undisturbed run each time", rows)
    print(json.dumps({"rows": rows, "rounds": found}))


def kill_step(dataset: Dataset) -> int:
    """Return a step in the second epoch, between two checkpoints."""
    return steps_per_epoch(dataset) + 15


def measure(run: Run, contender: str, step: int) -> dict[str, float]:
    """Run once with a kill and return its cost by part.

    Raises:
        RuntimeError: plain Ray Train did not restart the worker exactly once.
    """
    order_kills(run.scratch, [(KILLED_RANK, step)])
    if contender == PLAIN:
        run.command[2] = "tests.benchmarks.peers.plain_ray_train"
    result = run.finish()
    entries = [json.loads(line) for line in (run.scratch / f"ledger-{KILLED_RANK}").read_text().splitlines()]
    killed = next(number for number, entry in enumerate(entries) if entry["step"] == step)
    killed_at, first = entries[killed]["time"], entries[killed + 1]
    caught_up = next(entry["time"] for entry in entries[killed + 1 :] if entry["step"] == step)
    total = first["time"] - killed_at
    if contender == OURS:
        (incident,) = result["incidents"]
        load, seek = incident["load_seconds"], incident["seek_seconds"]
        restart = incident["start_seconds"]
    else:
        events = [json.loads(line) for line in (run.scratch / f"events-{KILLED_RANK}").read_text().splitlines()][2:]
        if [event["event"] for event in events] != ["started", "loaded"]:
            raise RuntimeError(f"run {run.name}: the worker was not restarted once: {events}")
        load, seek, restart = events[1]["time"] - events[0]["time"], first["time"] - events[1]["time"], float("nan")
    return {
        "detect_and_restart": total - load - seek,
        "of_that_restart": restart,
        "load": load,
        "seek": seek,
        "first_step_again": total,
        "first_new_step": caught_up - killed_at,
        "steps_made_again": float(step - first["step"]),
        "run_seconds": float(result["seconds"]),
    }


if __name__ == "__main__":
    main()
