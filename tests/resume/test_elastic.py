"""A run resumed with another number of workers: the same samples in each step, and the weights of an unchanged run."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.checkpoints.load_recommender import load_trained
from recsys.train.checkpoints.manifest import read_manifest
from recsys.train.checkpoints.resharding import needs_conversion
from recsys.train.failures import TrainingError
from recsys.train.loop import Trainer
from recsys.train.monitoring.reporter import Metrics, Request
from tests.checkpoints import store_of
from tests.datasets import make_dataset, small_config
from tests.distributed import run_distributed
from tests.reporters import LocalReporter

WIDTH = 16
STEPS = 9
STOPS = (3, 6)
"""The step after which the number of workers changes."""


def config_of(folder: Path, name: str, **values: object) -> Config:
    base = {
        "run__name": name,
        "model__width": WIDTH,
        "model__dropout": 0.0,  # its draws belong to ranks
        "optimizer__warmup_steps": 1,
        "optimizer__learning_rate": 1e-2,
        "training__num_workers": [1, 3],
        "training__global_batch_size": 22,  # 3 workers have unequal shares of it
        "training__micro_batch_size": 4,
        "training__max_steps": STEPS,
        "checkpoint__keep_last": 20,
    }
    return small_config(make_dataset(Storage(str(folder / "store"))), folder, **base | values)


class Stopping(LocalReporter):
    """Records the samples of each step, and requests a stop after one of them, the second that it sees or a later one."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after, self.steps = after, dict[int, list[int]]()

    def request(self) -> Request:
        return Request.STOP if max(self.steps, default=-1) + 2 == self.after else Request.NONE

    def step(self, step: int, losses: Metrics, batches: Sequence[Any]) -> None:
        super().step(step, losses, batches)
        self.steps[step] = [sample for batch in batches for sample in batch.sample_ids.tolist()]


def run(config: Config, stop: int) -> tuple[dict[int, list[int]], list[float]]:
    """Train up to a step; return this rank's samples by step, and the losses."""
    reporter = Stopping(stop)
    trainer = Trainer(config, Dataset.open(Storage.from_config(config.storage), config.data.dataset), reporter, NextItem)
    with contextlib.suppress(TrainingError) if stop < STEPS else contextlib.nullcontext():
        trainer.run()
    assert trainer.state.step == stop
    return reporter.steps, [sum(losses.values()) for losses in reporter.losses]


def run_in_parts(config: Config, workers: Sequence[int]) -> tuple[dict[int, list[int]], list[float]]:
    """Train with several numbers of workers in turn; return all samples by step, and the losses."""
    samples: dict[int, list[int]] = {}
    losses: list[float] = []
    for num_workers, stop in zip(workers, (*STOPS, STEPS), strict=True):
        answers = run_distributed(run, num_workers, config, stop)
        losses += answers[0][1]
        for steps, _ in answers:
            for step, ids in steps.items():
                samples.setdefault(step, []).extend(ids)
    return {step: sorted(ids) for step, ids in samples.items()}, losses


def final_weights(config: Config) -> dict[str, Tensor]:
    storage, store = Storage.from_config(config.storage), store_of(config)
    assert store.steps()[-1] == STEPS
    weights: dict[str, Tensor] = load_trained(storage, store.uri(STEPS), config.run.scratch)[3].state_dict()
    return weights


@pytest.mark.parametrize(
    ("zero_stage", "workers"),
    [
        (3, (2, 1, 2)),
        *(pytest.param(stage, (2, 1, 2), marks=pytest.mark.slow) for stage in (0, 1, 2)),
        *(pytest.param(stage, (2, 3, 2), marks=pytest.mark.slow) for stage in (0, 1, 2, 3)),
    ],
)
def test_another_number_of_workers_changes_nothing(tmp_path: Path, zero_stage: int, workers: tuple[int, ...]) -> None:
    expected_config = config_of(tmp_path, "fixed", training__zero_stage=zero_stage)
    expected = run_in_parts(expected_config, (2, 2, 2))
    config = config_of(tmp_path, "elastic", training__zero_stage=zero_stage)
    samples, losses = run_in_parts(config, workers)
    assert samples == expected[0]
    assert sorted(samples) == list(range(STEPS))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected[1]), rtol=1e-5, atol=0)
    weights, expected_weights = final_weights(config), final_weights(expected_config)
    for name, tensor in expected_weights.items():
        difference = (weights[name] - tensor).abs()
        if name.endswith("attention.qkv.bias"):  # what is added to all keys cancels: its gradient is rounding, which Adam makes steps of
            difference[WIDTH : 2 * WIDTH] = 0
        assert difference.max() <= 1e-5 * tensor.abs().max(), name


def test_the_conversion_is_made_once_and_again_where_it_is_damaged(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path, "once")
    run_distributed(run, 2, config, STOPS[0])
    storage, uri = Storage.from_config(config.storage), store_of(config).uri(STOPS[0])
    assert needs_conversion(read_manifest(storage, uri), 1)

    def go_on() -> tuple[Any, int]:
        """Resume with one worker; return its samples and losses, and the number of conversions."""
        for step in store_of(config).steps()[1:]:
            storage.delete_tree(store_of(config).uri(step))
        capfd.readouterr()
        return run_distributed(run, 1, config, STOPS[0] + 2)[0], capfd.readouterr().out.count("/convert-")

    first, num_conversions = go_on()
    assert num_conversions == 1
    assert go_on() == (first, 0)
    archive = next(Path(found.uri) for found in storage.list(uri) if found.uri.endswith(".tar"))
    archive.write_bytes(archive.read_bytes()[:-1])
    assert go_on() == (first, 1)
