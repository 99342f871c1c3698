"""Pretraining in the training loop: equal results for any ranks and after resuming, progress on unseen texts, published weights."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig

from recsys.config import Config, load_config
from recsys.model.text.encoder import locate_backbone
from recsys.objectives.objective import MicroBatch
from recsys.objectives.text_pretraining import TextPretraining
from recsys.store import Storage
from recsys.train.checkpoints.backbone import BackboneManifest, publish_backbone
from recsys.train.checkpoints.checkpoint_store import CheckpointStore
from recsys.train.loop import Trainer
from recsys.train.monitoring.reporter import Metrics
from tests.datasets import make_dataset, open_dataset
from tests.distributed import RankError, run_distributed
from tests.reporters import LocalReporter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a dataset and the tiny backbone without dropout."""
    path = tmp_path_factory.mktemp("pretraining")
    dataset = make_dataset(Storage(str(path / "store")), num_users=200, num_items=200, max_history=30)
    tiny = load_config().with_values({"model.text.backbone": "tiny"}).model.text
    shutil.copytree(locate_backbone(tiny, dataset, path / "scratch"), path / "steady")
    BertConfig.from_pretrained(path / "steady", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(path / "steady")
    return path


def make_config(folder: Path, name: str, **values: Any) -> Config:
    base = {
        "storage.root": str(folder / "store"),
        "run.scratch": str(folder / "scratch"),
        "run.name": name,
        "data.dataset": str(folder / "store/datasets/tiny-200-200-0"),
        "model.text.backbone": str(folder / "steady"),
        "optimizer.backbone_learning_rate": 1e-3,
        "training.num_workers": 1,
        "training.global_batch_size": 32,
        "training.micro_batch_size": 32,
        "training.epochs": 2,
    }
    return load_config().with_values(base | {key.replace("__", "."): value for key, value in values.items()})


class DyingReporter(LocalReporter):
    """Raises an error at step 7, like a crash."""

    def step(self, step: int, losses: Metrics, batches: Sequence[MicroBatch]) -> None:
        super().step(step, losses, batches)
        if step == 7:
            raise RuntimeError("died at step 7")


def pretrain(config: Config, dies: bool = False) -> tuple[np.ndarray, list[Metrics]]:
    reporter = DyingReporter() if dies else LocalReporter()
    Trainer(config, open_dataset(config), reporter, TextPretraining).run()
    return np.array([list(losses.values()) for losses in reporter.losses]), reporter.history


def validate_before_and_after(config: Config) -> tuple[Metrics, Metrics]:
    trainer = Trainer(config, open_dataset(config), LocalReporter(), TextPretraining)
    before = trainer._validate()
    return before, trainer.run().validation


def publish(config: Config) -> Path:
    checkpoints = CheckpointStore(Storage.from_config(config.storage), config, open_dataset(config))
    return Path(publish_backbone(Storage.from_config(config.storage), checkpoints.uri(checkpoints.steps()[-1]), Path(config.run.scratch)))


def test_two_ranks_learn_as_one_with_a_doubled_micro_batch(folder: Path) -> None:
    one, validated = run_distributed(pretrain, 1, make_config(folder, "one", training__zero_stage=0))[0]
    values = {"training__num_workers": 2, "training__micro_batch_size": 16, "training__zero_stage": 3}
    two, validated_by_two = run_distributed(pretrain, 2, make_config(folder, "two", **values))[0]
    assert one.shape == (2 * -(-160 // 32), 2)
    np.testing.assert_allclose(two, one, rtol=1e-4)
    assert validated_by_two == [pytest.approx(metrics, rel=1e-3) for metrics in validated]


def test_a_run_that_died_goes_on_as_if_it_had_not(folder: Path) -> None:
    values = {"model__text__backbone": "tiny", "training__num_workers": 2, "training__micro_batch_size": 16, "checkpoint__every_steps": 3}
    whole, _ = run_distributed(pretrain, 2, make_config(folder, "whole", **values))[0]
    died = make_config(folder, "died", **values)
    with pytest.raises(RankError, match="died at step 7"):
        run_distributed(pretrain, 2, died, True)
    rest, _ = run_distributed(pretrain, 2, died)[0]
    assert len(rest) == len(whole) - 6, "the last checkpoint is that of step 6"
    assert rest.tolist() == whole[6:].tolist()
    assert (publish(died) / "model.safetensors").read_bytes() == (
        publish(make_config(folder, "whole", **values)) / "model.safetensors"
    ).read_bytes()


def test_what_is_published_is_the_trained_model_and_is_published_once(folder: Path) -> None:
    config = make_config(folder, "published", training__epochs=1)
    run_distributed(pretrain, 1, config)
    first = publish(config)
    manifest = BackboneManifest.model_validate_json((first / "manifest.json").read_text())
    assert {file.path for file in manifest.files} == {path.name for path in first.iterdir()} - {"manifest.json"}
    assert manifest.dataset_fingerprint == open_dataset(config).manifest.fingerprint
    assert {"masked_loss", "masked_accuracy", "contrastive_loss", "recall@1", "pair_auc"} == manifest.validation.keys()
    start, trained = load_file(folder / "steady/model.safetensors"), load_file(first / "model.safetensors")
    assert start.keys() == trained.keys()
    assert all(not torch.equal(start[name], trained[name]) for name in start if "weight" in name)
    written = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert publish(config) == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == written
    (first / "manifest.json").unlink()
    assert publish(config) == first
    assert (first / "manifest.json").exists()


def test_it_learns_which_unseen_texts_belong_together(folder: Path) -> None:
    values = {"model__text__backbone": "tiny", "training__epochs": 12, "training__early_stopping_patience": None}
    before, after = run_distributed(validate_before_and_after, 1, make_config(folder, "learns", **values))[0]
    assert after["contrastive_loss"] < 0.9 * before["contrastive_loss"]
    assert after["recall@1"] > before["recall@1"]
    assert after["pair_auc"] > before["pair_auc"] + 0.03
    assert after["masked_accuracy"] > before["masked_accuracy"] + 0.3
