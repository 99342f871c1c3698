"""A model that goes on from yesterday's, compared with one that is trained on everything each day.

`python -m tests.benchmarks.daily FOLDER` with RecBole's files of MovieLens 100K. All events before the last days are the first version;
each day is appended. `warm` starts from yesterday's warm checkpoint and replays a part of the history; `full` is trained from random
weights with the recipe. Both are evaluated on the test users of the day's version. With `--work`, runs that exist are not repeated.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.reading import show
from tests.benchmarks.tiny import add_tiny, write_movies

ROOT = Path(__file__).parents[2]
DAY_SECONDS = 86_400
METRIC = "ndcg@10"
TINY = {"data.source": "files", "model.width": 16, "model.text.mode": "off", "training.num_workers": 1, "training.epochs": 2}


def main() -> None:
    """Run all days; print a table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="RecBole's files")
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument("--replay", type=float, default=10.0, help="training.replay of warm runs")
    parser.add_argument("--epochs", type=int, default=4, help="training.epochs of warm runs")
    parser.add_argument("--rate", type=float, default=5e-4, help="optimizer.learning_rate of warm runs")
    parser.add_argument("--keep-optimizer", action="store_true", help="training.keep_optimizer of warm runs")
    parser.add_argument("--config", default="jobs/configs/ml-100k.toml", help="the recipe")
    parser.add_argument("--work", type=Path, help="folder for the store and the days' files, kept for further runs")
    add_tiny(parser)
    arguments = parser.parse_args()
    with _work(arguments) as work:
        settings = {"storage.root": work / "store", "run.scratch": work / "scratch"} | (TINY if arguments.tiny else {})
        if arguments.tiny:
            arguments.folder, arguments.days, arguments.epochs = write_movies(work), 2, 1
            arguments.config = "jobs/configs/demo.toml"
        days = split_days(arguments.folder, work, arguments.days)
        results = [*measure(arguments, settings, days)]
    gaps = [row["gap"] for row in results]
    shares = [row["steps warm"] / row["steps full"] for row in results]
    means = {f"mean {METRIC} {name}": float(np.mean([row[name] for row in results])) for name in ("warm", "full")}
    summary = means | {"mean gap": float(np.mean(gaps)), "mean share of steps": float(np.mean(shares))}
    show("a day appended each time: yesterday's model trained further, and a model trained on everything", results)
    print(json.dumps({"days": results, **summary}))


@contextlib.contextmanager
def _work(arguments: argparse.Namespace) -> Iterator[Path]:
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
        yield arguments.work.absolute()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def split_days(folder: Path, work: Path, num_days: int) -> list[Path]:
    """Write the events before the last days, and those of each of these days; return the files' folders, the first with the items."""
    source = next(folder.glob("*.inter"))
    header, *rows = source.read_text().splitlines()
    place = [name.split(":")[0] for name in header.split("\t")].index("timestamp")
    days = np.array([float(row.split("\t")[place]) for row in rows]).astype(np.int64) // DAY_SECONDS
    first = int(days.max()) - num_days
    numbers = np.maximum(days, first) - first
    written = []
    for number in range(num_days + 1):
        target = work / f"day-{number}"
        target.mkdir(exist_ok=True)
        (target / source.name).write_text("\n".join([header, *(row for row, of in zip(rows, numbers, strict=True) if of == number)]) + "\n")
        written.append(target)
    for table in [path for path in folder.iterdir() if path.suffix in (".item", ".user")]:
        (written[0] / table.name).write_bytes(table.read_bytes())
    return written


def measure(arguments: argparse.Namespace, settings: dict[str, Any], days: list[Path]) -> Iterator[dict[str, Any]]:
    """Train and evaluate day by day; yield a row for each day after the first version."""
    recipe = arguments.config
    dataset = verb("jobs.prepare_data", recipe, settings | {"data.folder": days[0]})["dataset"]
    start = verb("jobs.train", recipe, settings | {"data.dataset": dataset, "run.name": "base"})["checkpoint"]
    variant = f"{arguments.replay}-{arguments.epochs}-{arguments.rate}-{arguments.keep_optimizer}"
    for number, day in enumerate(days[1:], 1):
        appended = {"data.base": dataset, "data.events": next(day.glob("*.inter"))}
        prepared = verb("jobs.prepare_data", recipe, settings | appended)
        dataset = prepared["dataset"]
        warm = {
            "run.name": f"warm-{variant}-{number}",
            "training.start_from": start,
            "training.keep_optimizer": str(arguments.keep_optimizer).lower(),
            "training.replay": arguments.replay,
            "training.epochs": arguments.epochs,
            "optimizer.learning_rate": arguments.rate,
            "optimizer.warmup_steps": 2,
        }
        results = {
            name: verb("jobs.train", recipe, settings | {"data.dataset": dataset} | own)
            for name, own in (("warm", warm), ("full", {"run.name": f"full-{number}"}))
        }
        start = results["warm"]["checkpoint"]
        metrics = {
            name: verb("jobs.evaluate", None, _place(settings) | {"evaluation.checkpoint": result["checkpoint"]})["metrics"][METRIC]
            for name, result in results.items()
        }
        yield {
            "day": number,
            "steps warm": results["warm"]["steps"],
            "steps full": results["full"]["steps"],
            **metrics,
            "gap": 1 - metrics["warm"] / metrics["full"] if metrics["full"] else 0.0,
        }


def _place(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in ("storage.root", "run.scratch")}


def verb(name: str, recipe: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Run a verb with the settings that it reads, and return the JSON that it prints."""
    command = [
        sys.executable,
        "-m",
        name,
        *([f"--config={recipe}"] if recipe else []),
        *(f"--set={key}={value}" for key, value in settings.items()),
    ]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)}: {finished.stderr[-3000:]}")
    print(finished.stderr.splitlines()[-1], file=sys.stderr, flush=True)
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
