"""ZeRO must not change training: the same loss curve for every stage, number of workers and micro batch size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys.config import Config, load_config
from recsys.data.manifest import Dataset
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.loop import Trainer
from tests.datasets import make_dataset
from tests.distributed import run_distributed
from tests.reporters import LocalReporter

NUM_STEPS = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zero")
    make_dataset(Storage(str(path / "store")), num_users=200)
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> np.ndarray:
    """Return the loss curve of one worker with ZeRO-0 and a doubled micro batch."""
    return loss_curve(folder, "reference", num_workers=1, zero_stage=0, micro_batch_size=16)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_workers_learn_as_one(folder: Path, reference: np.ndarray, zero_stage: int) -> None:
    curve = loss_curve(folder, f"stage-{zero_stage}", num_workers=2, zero_stage=zero_stage, micro_batch_size=8)
    np.testing.assert_allclose(curve, reference, rtol=1e-4)
    assert curve[-5:, 0].mean() < 0.9 * curve[:5, 0].mean(), "nothing was learned, so equal curves say little"


@pytest.mark.slow
def test_weights_and_optimizer_in_host_memory_learn_the_same(folder: Path, reference: np.ndarray) -> None:
    values = {"training.offload_parameters": True, "training.offload_optimizer": True, "training.recompute_activations": True}
    curve = loss_curve(folder, "offloaded", num_workers=2, zero_stage=3, micro_batch_size=8, values=values)
    np.testing.assert_allclose(curve, reference, rtol=1e-4)


def test_accumulation_is_a_large_batch(folder: Path, reference: np.ndarray) -> None:
    curve = loss_curve(folder, "accumulated", num_workers=1, zero_stage=0, micro_batch_size=4)
    np.testing.assert_allclose(curve, reference, rtol=1e-4)


def loss_curve(
    folder: Path, name: str, num_workers: int, zero_stage: int, micro_batch_size: int, values: dict[str, Any] | None = None
) -> np.ndarray:
    """Train 50 steps without dropout and return the losses, (steps, losses)."""
    base = {
        "storage.root": str(folder / "store"),
        "run.scratch": str(folder / "scratch"),
        "run.name": name,
        "data.dataset": str(folder / "store/datasets/tiny-200-40-0"),
        "data.max_history": 10,
        "model.width": 16,
        "model.dropout": 0.0,
        "model.text.mode": "off",
        "model.ranker.task_weight": 0.5,
        "optimizer.learning_rate": 5e-3,
        "training.num_workers": num_workers,
        "training.zero_stage": zero_stage,
        "training.global_batch_size": 16,
        "training.micro_batch_size": micro_batch_size,
        "training.max_steps": NUM_STEPS,
        "training.early_stopping_patience": None,
    }
    return run_distributed(train_and_record, num_workers, load_config().with_values({**base, **(values or {})}))[0]


def train_and_record(config: Config) -> np.ndarray:
    reporter = LocalReporter()
    Trainer(config, Dataset.open(Storage.from_config(config.storage), config.data.dataset), reporter, NextItem).run()
    return np.array([list(losses.values()) for losses in reporter.losses])
