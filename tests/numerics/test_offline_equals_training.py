"""A checkpoint of any ZeRO stage, precision and text mode, loaded as a whole model, gives the metrics of the training's own validation."""

from pathlib import Path

import pytest

from recsys.config import Config, load_config
from recsys.data.manifest import Dataset
from recsys.evaluation.evaluator import evaluate
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.train.checkpoints.checkpoint_store import CheckpointStore
from recsys.train.checkpoints.load_recommender import build_predictor, load_trained
from recsys.train.loop import Trainer
from recsys.train.state import TrainingState
from tests.datasets import make_dataset
from tests.distributed import run_distributed
from tests.reporters import LocalReporter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offline")
    make_dataset(Storage(str(path / "store")))
    return path


@pytest.mark.parametrize(
    ("zero_stage", "precision", "text_mode", "loss"),
    [
        (0, "fp32", "off", "full"),
        (1, "bf16", "frozen", "full"),
        (2, "fp32", "full", "sampled"),
        pytest.param(3, "fp32", "lora", "full", marks=pytest.mark.slow),
        pytest.param(3, "bf16", "full", "full", marks=pytest.mark.slow),
    ],
)
def test_offline_equals_training(folder: Path, zero_stage: int, precision: str, text_mode: str, loss: str) -> None:
    values = {
        "storage.root": str(folder / "store"),
        "run.scratch": str(folder / "scratch"),
        "run.name": f"{zero_stage}-{precision}-{text_mode}",
        "data.dataset": str(folder / "store/datasets/tiny-60-40-0"),
        "data.max_history": 10,
        "model.width": 16,
        "model.dropout": 0.0,
        "model.text.mode": text_mode,
        "model.text.backbone": "tiny",
        "model.text.max_tokens": 16,
        "model.loss.kind": loss,
        "model.loss.num_negatives": 16,
        "optimizer.learning_rate": 1e-2,
        "training.num_workers": 2,
        "training.zero_stage": zero_stage,
        "training.precision": precision,
        "training.global_batch_size": 16,
        "training.micro_batch_size": 4,
        "training.epochs": 4,
    }
    config = load_config().with_values(values)
    state, losses = run_distributed(run, 2, config)[0]
    assert losses[-1] < losses[0]
    storage = Storage.from_config(config.storage)
    uri = CheckpointStore(storage, config, Dataset.open(storage, config.data.dataset)).uri(state.step)
    _, trained, dataset, recommender = load_trained(storage, uri, config.run.scratch)
    offline = evaluate(
        build_predictor(trained, dataset, recommender), dataset, config.evaluation.model_copy(update={"split": "validation"})
    )
    for name, metric in state.validation.items():
        # In bf16, training ranks with rounded weights, while the checkpoint holds the full-precision weights.
        assert offline["metrics"][name] == pytest.approx(metric, abs=1e-6 if precision == "fp32" else 0.06), name


def run(config: Config) -> tuple[TrainingState, list[float]]:
    reporter = LocalReporter()
    state = Trainer(config, Dataset.open(Storage.from_config(config.storage), config.data.dataset), reporter, NextItem).run()
    return state, [losses["retrieval"] for losses in reporter.losses]
