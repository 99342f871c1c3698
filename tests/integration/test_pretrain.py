"""jobs.pretrain on a real Ray: trained, killed and started again, and used by `jobs.train`; in a folder and on S3."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recsys.config.model import TextConfig
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.model.text.catalogue_text import VectorsManifest, frozen_vectors
from recsys.model.text.encoder import locate_backbone
from recsys.store import Storage
from tests.conftest import S3Server, kill_descendants
from tests.datasets import make_dataset

ROOT = Path(__file__).parents[2]
EPOCHS = 3

pytestmark = pytest.mark.ray


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    yield
    kill_descendants("jobs.")


def start(verb: str, dataset: Dataset, folder: Path, log: str, **values: Any) -> "subprocess.Popen[str]":
    settings = {
        "storage.root": dataset.storage.root,
        "run.scratch": str(folder / "scratch"),
        "run.name": "texts",
        "data.dataset": dataset.uri,
        "model.width": 16,
        "model.text.backbone": "tiny",
        "training.global_batch_size": 16,
        "training.micro_batch_size": 8,
        "training.epochs": EPOCHS,
        "checkpoint.every_steps": 5,
        **({"storage.endpoint": dataset.storage.endpoint} if dataset.storage.endpoint else {}),
        **{key.replace("__", "."): value for key, value in values.items()},
    }
    command = [sys.executable, "-m", verb, *(f"--set={key}={value}" for key, value in settings.items())]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=(folder / log).open("w"), text=True)


def finish(process: "subprocess.Popen[str]", log: Path) -> dict[str, Any]:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, log.read_text()[-4000:]
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def wait_for_checkpoint(dataset: Dataset, process: "subprocess.Popen[str]", log: Path) -> None:
    deadline = time.monotonic() + 240
    uri = dataset.storage.uri("runs", "texts", "pretraining", "checkpoints")
    while time.monotonic() < deadline and process.poll() is None:
        if any(found.uri.endswith("manifest.json") for found in dataset.storage.list(uri)):
            return
        time.sleep(0.1)
    pytest.fail(f"no checkpoint in time; exit status {process.poll()}; {log.read_text()[-4000:]}")


def stored_vectors(dataset: Dataset) -> dict[str, bytes]:
    """Return the stored text vectors by backbone."""
    manifests = [found.uri for found in dataset.storage.list(f"{dataset.uri}/text_vectors") if found.uri.endswith("manifest.json")]
    read = dataset.storage.read_bytes
    return {VectorsManifest.model_validate_json(read(uri)).backbone: read(uri.replace("manifest.json", "00000.arrow")) for uri in manifests}


@pytest.mark.slow
def test_a_killed_pretraining_goes_on_and_training_starts_from_what_it_made(tmp_path: Path) -> None:
    dataset = make_dataset(Storage(str(tmp_path / "store")), num_users=150, num_items=200)
    killed = start("jobs.pretrain", dataset, tmp_path, "killed")
    wait_for_checkpoint(dataset, killed, tmp_path / "killed")
    killed.kill()
    killed.wait()
    result = finish(start("jobs.pretrain", dataset, tmp_path, "again"), tmp_path / "again")
    assert "resuming run texts/pretraining from step" in (tmp_path / "again").read_text()
    assert result["run"] == "texts"
    assert result["steps"] == EPOCHS * -(-160 // 16)
    assert result["samples_seen"] == EPOCHS * 160
    assert {"masked_loss", "recall@1"} < result["validation"].keys()
    assert {"seconds", "samples_per_second"} < result.keys()
    assert finish(start("jobs.pretrain", dataset, tmp_path, "third"), tmp_path / "third")["backbone"] == result["backbone"]

    trained = start("jobs.train", dataset, tmp_path, "train", model__text__backbone=result["backbone"], training__epochs=1)
    assert finish(trained, tmp_path / "train")["steps"] > 0
    text, catalogue, scratch = TextConfig(backbone="tiny"), ItemFeatures.read(dataset), tmp_path / "scratch"
    frozen_vectors(locate_backbone(text, dataset, scratch), text, catalogue.texts, dataset, scratch, torch.device("cpu"))
    vectors = stored_vectors(dataset)
    assert vectors.keys() == {result["backbone"], "tiny"}
    assert vectors["tiny"] != vectors[result["backbone"]]


@pytest.mark.slow
def test_on_s3_training_starts_from_the_address_that_was_printed(moto_server: S3Server, tmp_path: Path) -> None:
    dataset = make_dataset(moto_server.fresh_storage(), num_users=60, num_items=100)
    result = finish(start("jobs.pretrain", dataset, tmp_path, "pretrain", training__epochs=1), tmp_path / "pretrain")
    assert result["backbone"].startswith("s3://")
    trained = start("jobs.train", dataset, tmp_path, "train", model__text__backbone=result["backbone"], training__epochs=1)
    assert finish(trained, tmp_path / "train")["steps"] > 0
    assert stored_vectors(dataset).keys() == {result["backbone"]}
