"""Cost of reading in training: epochs on live shards compared with epochs on the same batches in memory, with one and two workers.

`python -m tests.benchmarks.live_shards DATASET` with the `dataset` that `python -m jobs.prepare_data` printed.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist

from recsys.config import load_config
from recsys.data.batch import Batch
from recsys.data.manifest import Dataset
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.loop import Trainer
from tests.benchmarks.tiny import add_tiny, dataset_of
from tests.distributed import run_distributed
from tests.reporters import LocalReporter


def main() -> None:
    """Measure with one and two workers; print a table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", nargs="?")
    add_tiny(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100, help="steps of an epoch at most")
    arguments = parser.parse_args()
    results = {}
    for num_workers in (1, 2):
        with tempfile.TemporaryDirectory() as scratch, dataset_of(arguments) as dataset:
            settings = (dataset, scratch, num_workers, arguments.rounds, arguments.steps)
            results[f"{num_workers} workers"] = run_distributed(measure, num_workers, *settings, timeout_seconds=1800)[0]
    for name, result in results.items():
        print(f"{name}  " + "  ".join(f"{key} {value:.4g}" for key, value in result.items()), file=sys.stderr)
    print(json.dumps(results))


def measure(uri: str, scratch: str, num_workers: int, rounds: int, num_steps: int) -> dict[str, float]:
    """Time both kinds of epoch, alternating which one is first; every rank must call this."""
    values = {
        "run.scratch": scratch,
        "storage.root": uri.rpartition("/datasets/")[0],
        "data.dataset": uri,
        "model.text.mode": "off",
        "training.num_workers": num_workers,
        "training.global_batch_size": 128,
        "training.micro_batch_size": 128 // num_workers,
        "training.zero_stage": 0,
    }
    config = load_config().with_values(values)
    dataset = Dataset.open(Storage.from_config(config.storage), uri)
    trainer = Trainer(dataset.complete(config), dataset, LocalReporter(), NextItem)

    def live() -> Iterable[Sequence[Batch]]:
        return itertools.islice(trainer.objective.steps(0), num_steps)

    held = list(live())
    seconds: dict[str, list[float]] = {"live": [], "held": []}
    for number in range(rounds + 1):
        kinds = [("live", live), ("held", lambda: held)]
        for name, source in kinds if number % 2 else kinds[::-1]:
            dist.barrier()
            begin = time.perf_counter()
            for batches in source():
                trainer._step(batches)
            dist.barrier()
            if number:
                seconds[name].append((time.perf_counter() - begin) / len(held))
    ratios = [one / other for one, other in zip(seconds["live"], seconds["held"], strict=True)]
    medians: dict[str, Any] = {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()}
    return medians | {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


if __name__ == "__main__":
    main()
