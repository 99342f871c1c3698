"""Step time of `jobs.train` compared with a bare PyTorch loop on the same batches in memory, with one worker, and with two under DDP.

`python -m tests.benchmarks.step_time DATASET` with the `dataset` that `python -m jobs.prepare_data` printed. Ours is the complete loop of
a Ray Train worker, which reports to Ray once per epoch: reading, learning rate, ZeRO-0, TensorBoard, watchdog, and the recipe's
checkpoints. After each block of its steps, the bare loop runs on the same batches.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from recsys.config import Config, load_config
from recsys.data.manifest import Dataset
from recsys.model.recommender import build_recommender
from recsys.model.text.catalogue_text import Ranks
from recsys.objectives.next_item import NextItem
from recsys.objectives.objective import MicroBatch
from recsys.store import Storage
from recsys.train.loop import Trainer
from recsys.train.monitoring.reporter import Metrics
from tests.benchmarks.tiny import add_tiny, dataset_of
from tests.distributed import run_distributed
from tests.reporters import LocalReporter

RECIPE = Path(__file__).parents[2] / "jobs" / "configs" / "ml-1m.toml"


def main() -> None:
    """Measure with each number of workers; print a table to stderr and one JSON line to stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?")
    add_tiny(parser)
    parser.add_argument("--config", default=str(RECIPE))
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10, help="of each loop in a block")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    results = {}
    for num_workers in arguments.workers:
        with tempfile.TemporaryDirectory() as scratch, dataset_of(arguments) as dataset:
            config = config_of(arguments, dataset, scratch, num_workers)
            results[f"{num_workers} workers"] = run_distributed(measure, num_workers, config, arguments.steps, timeout_seconds=3000)[0]
        row = results[f"{num_workers} workers"]
        print(f"{num_workers} workers  " + "  ".join(f"{key} {value:.4g}" for key, value in row.items()), file=sys.stderr)
    print(json.dumps(results))


def config_of(arguments: argparse.Namespace, dataset: str, scratch: str, num_workers: int) -> Config:
    """Return the recipe with another location, duration and number of workers."""
    config = load_config(arguments.config)
    values = {
        "run.scratch": scratch,
        "run.name": f"step-time-{num_workers}-{time.time_ns()}",
        "storage.root": dataset.rpartition("/datasets/")[0],
        "data.dataset": dataset,
        "training.num_workers": num_workers,
        "training.micro_batch_size": config.training.global_batch_size // num_workers,
        "training.zero_stage": 0,
        "training.max_steps": arguments.steps * (arguments.blocks + 1),
        "training.epochs": 1000,
    }
    return config.with_values(values)


def measure(config: Config, steps_per_block: int) -> dict[str, float]:
    """Train, with the bare loop between blocks of steps; every rank must call this."""
    dataset = Dataset.open(Storage.from_config(config.storage), config.data.dataset)
    beside = Beside(config, dataset, steps_per_block)
    Trainer(dataset.complete(config), dataset, beside, NextItem).run()
    pairs = list(zip(beside.seconds["ours"], beside.seconds["bare"], strict=True))[1:]  # the first block is a warm-up
    ratios = [ours / bare for ours, bare in pairs]
    ours, bare = (statistics.median(each) for each in zip(*pairs, strict=True))
    return {
        "ours_seconds": ours / steps_per_block,
        "bare_seconds": bare / steps_per_block,
        "ratio": statistics.median(ratios),
        "ratio_of_sums": sum(ours for ours, _ in pairs) / sum(bare for _, bare in pairs),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "blocks": len(pairs),
    }


class Beside(LocalReporter):
    """Times blocks of our steps, and trains the bare loop on the same batches after each block."""

    def __init__(self, config: Config, dataset: Dataset, steps_per_block: int) -> None:
        super().__init__()
        device, ranks = torch.device("cpu"), Ranks(dist.get_rank(), dist.get_world_size(), dist.barrier)
        module = build_recommender(dataset.complete(config), dataset, device, ranks)
        self._clip, self._steps_per_block = config.optimizer.clip_norm, steps_per_block
        self._model: nn.Module = (
            DistributedDataParallel(module, broadcast_buffers=False, static_graph=True) if ranks.world_size > 1 else module
        )
        self._model.train()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=config.optimizer.learning_rate, fused=True)
        self._batches: list[Sequence[MicroBatch]] = []
        self.seconds: dict[str, list[float]] = {"ours": [], "bare": []}
        self._begin = time.perf_counter()

    def step(self, step: int, losses: Metrics, batches: Sequence[MicroBatch]) -> None:
        """Keep the step's batches; after each block, time the bare loop on them."""
        self._batches.append(batches)
        if len(self._batches) < self._steps_per_block:
            return
        self._note("ours")
        for held in self._batches:
            self._bare_step(held)
        self._note("bare")
        self._batches = []

    def _note(self, name: str) -> None:
        dist.barrier()
        self.seconds[name].append(time.perf_counter() - self._begin)
        self._begin = time.perf_counter()

    def _bare_step(self, batches: Sequence[Any]) -> None:
        """Make a step like a plain script: the mean of each loss over the batch, clipped gradients, AdamW."""
        for batch in batches:
            sums, counts = self._model(batch), batch.valid_counts().clamp(min=1)
            loss = torch.stack([total / count for total, count in zip(sums.values(), counts, strict=True)]).sum()
            (loss.float() / len(batches)).backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
