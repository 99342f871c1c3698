"""`make bench`, first part: the training loop compared with a bare loop, alternating in one run; `reading.py` measures the reader."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recsys.config import Config, load_config
from recsys.data.batch import Batch
from recsys.data.manifest import Dataset
from recsys.model.recommender import build_recommender
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.loop import Trainer
from tests.benchmarks.tiny import add_tiny
from tests.datasets import make_dataset
from tests.distributed import run_distributed
from tests.reporters import LocalReporter

ROUNDS = 7
STEPS_PER_ROUND = 15


def main() -> None:
    """Run every benchmark; print a table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_tiny(parser)
    arguments = parser.parse_args()
    rounds, num_steps, num_users = (1, 2, 120) if arguments.tiny else (ROUNDS, STEPS_PER_ROUND, 4000)
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(str(Path(folder) / "store"))
        dataset = make_dataset(storage, num_users=num_users, num_items=num_users // 2, max_history=50)
        values = {
            "storage.root": storage.root,
            "run.scratch": str(Path(folder) / "scratch"),
            "data.dataset": dataset.uri,
            "model.text.mode": "off",
            "training.num_workers": 1,
            "training.zero_stage": 0,
            "training.global_batch_size": 128,
            "training.micro_batch_size": 128,
        }
        config = load_config().with_values(values)
        results = {"step": run_distributed(measure_steps, 1, config, rounds, num_steps)[0]}
    for name, result in results.items():
        print(f"{name:<6}" + "  ".join(f"{key} {value:.4g}" for key, value in result.items()), file=sys.stderr)
    print(json.dumps(results))


def measure_steps(config: Config, rounds: int, num_steps: int) -> dict[str, float]:
    """Time optimizer steps of the trainer (engine, global counts, finite check) and of a bare loop on the same batches."""
    dataset = Dataset.open(Storage.from_config(config.storage), config.data.dataset)
    trainer = Trainer(config, dataset, LocalReporter(), NextItem)
    steps = [batches for _, batches in zip(range(num_steps), trainer.objective.steps(0), strict=False)]
    model = build_recommender(config, dataset, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.learning_rate)

    def ours() -> None:
        for batches in steps:
            trainer._step(batches)

    def bare() -> None:
        for batches in steps:
            bare_step(model, optimizer, batches[0], trainer.objective.weights)

    return in_turn(ours, bare, len(steps), rounds)


def bare_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, weights: Mapping[str, float]) -> None:
    """Run one step like a plain script."""
    optimizer.zero_grad()
    counts = dict(zip(weights, batch.valid_counts().tolist(), strict=True))
    losses = model(batch)
    sum(weights[name] * loss / counts[name] for name, loss in losses.items()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def in_turn(ours: Callable[[], None], bare: Callable[[], None], num_units: int, rounds: int) -> dict[str, Any]:
    """Run both alternately after a warm-up; return the seconds per unit and the ratios of the rounds."""
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    for round_number in range(rounds + 1):
        for name, function in (("ours", ours), ("bare", bare)):
            begin = time.perf_counter()
            function()
            if round_number:
                times[name].append((time.perf_counter() - begin) / num_units)
    ratios = [one / other for one, other in zip(times["ours"], times["bare"], strict=True)]
    return {"ours_seconds": statistics.median(times["ours"]), "bare_seconds": statistics.median(times["bare"]), **spread(ratios)}


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Return the median, smallest and largest ratio."""
    return {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


if __name__ == "__main__":
    main()
