"""Small published exports for tests: models with random weights on a small dataset, without training."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from recsys import __version__
from recsys.config import Config, load_config
from recsys.data.manifest import Dataset
from recsys.data.sequences import Sequences
from recsys.exports.files import Export, write_export
from recsys.exports.profiles import ArrowProfiles
from recsys.exports.registry import Registry
from recsys.model.recommender import build_recommender
from recsys.store import Storage
from recsys.train.checkpoints.load_recommender import build_predictor
from tests.datasets import make_dataset

METRICS = {"ndcg@10": 0.25}


def publish_export(config: Config, version: str, seed: int = 0, values: Mapping[str, Any] | None = None) -> Export:
    """Publish a version of `service.export`, point `service.alias` to it, and return its predictor and users."""
    storage = Storage.from_config(config.storage)
    dataset = make_dataset(storage, num_users=120, num_items=60)
    trained = config.with_values(
        {
            "data.max_history": 10,
            "model.width": 16,
            "model.text.mode": "off",
            "training.seed": seed,
            "export.num_golden": 4,
            **(values or {}),
        }
    )
    recommender = build_recommender(trained, dataset, torch.device("cpu")).eval()
    predictor = build_predictor(trained, dataset, recommender)
    registry = Registry(storage, config.served_export)
    with TemporaryDirectory() as folder:
        write_export(predictor, recommender.state_dict(), dataset, Path(folder), num_golden=16)
        registry.publish(Path(folder), version, {"metrics": METRICS, "code_version": __version__})
    registry.promote(config.service.alias, version, "for a test")
    return Export(predictor, ArrowProfiles.of_users(dataset.read_users()))


def publish_damaged_export(config: Config, version: str, source: str) -> None:
    """Publish a version whose golden answers differ from its model's answers, and point `service.alias` to it."""
    registry = Registry(Storage.from_config(config.storage), config.served_export)
    with TemporaryDirectory() as folder:
        files = registry.fetch(source, Path(folder))
        golden = json.loads((files / "golden.json").read_text())
        golden[0]["scores"] = [score + 1 for score in golden[0]["scores"]]
        (files / "golden.json").write_text(json.dumps(golden))
        registry.publish(files, version, {"metrics": METRICS})
    registry.promote(config.service.alias, version, "for a test")


def service_config(folder: Path, **service: object) -> Config:
    """Return a config whose store and scratch are in `folder`."""
    values = {f"service.{key}": value for key, value in service.items()}
    return load_config().with_values({"storage.root": str(folder / "store"), "run.scratch": str(folder / "scratch"), **values})


def users_of(dataset: Dataset) -> dict[str, Sequences]:
    """Return the interactions of each user of a dataset."""
    columns = (dataset.read_users()[name].to_pylist() for name in ("user_id", "items", "events", "timestamps", "values"))
    return {user_id: Sequences.of(*sequence) for user_id, *sequence in zip(*columns, strict=True)}
