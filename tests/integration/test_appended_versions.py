"""A day appended on a real Ray, in a folder and on S3; runs on the base and on the new version."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from recsys.config import load_config
from recsys.data.manifest import Dataset
from recsys.ingest.prepare import prepare
from recsys.store import Storage
from tests.conftest import local_ray

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
RUN = {
    "model.width": 16,
    "model.text.mode": "off",
    "training.num_workers": 1,
    "training.global_batch_size": 32,
    "training.micro_batch_size": 32,
    "training.max_steps": 12,
    "checkpoint.every_steps": 4,
}


@pytest.fixture(scope="module", autouse=True)
def _ray(aws_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with local_ray(tmp_path_factory.mktemp("ray")):
        yield


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic log, cut in two by time."""
    folder = tmp_path_factory.mktemp("logs")
    config = load_config(
        None, [f"storage.root={folder}/store", "data.source=synthetic", "data.synthetic.num_users=150", "data.num_shards=2"]
    )
    prepare(config, Storage.from_config(config.storage))
    raw = next(folder.glob("store/raw/*"))
    events = pq.read_table(raw / "events").sort_by("timestamp")
    pq.write_table(events.slice(0, events.num_rows * 4 // 5), folder / "before.parquet")
    pq.write_table(events.slice(events.num_rows * 4 // 5), folder / "day.parquet")
    pq.write_table(pq.read_table(raw / "items"), folder / "items.parquet")
    return folder


def prepared(storage: Storage, **data: str) -> Dataset:
    values = {"storage.root": storage.root, "data.max_history": 20, **{f"data.{key}": value for key, value in data.items()}}
    values |= {"storage.endpoint": storage.endpoint} if storage.endpoint else {}
    return prepare(load_config().with_values(values), storage)


@pytest.mark.parametrize("any_storage", ["local", "moto", pytest.param("rclone", marks=pytest.mark.slow)], indirect=True)
def test_the_version_has_all_events_and_the_base_is_untouched(any_storage: Storage, logs: Path) -> None:
    base = prepared(any_storage, events=f"{logs}/before.parquet", items=f"{logs}/items.parquet")
    before = {found.uri: found.etag for found in any_storage.list(base.uri)}
    day = prepared(any_storage, base=base.uri, events=f"{logs}/day.parquet")
    assert {found.uri: found.etag for found in any_storage.list(base.uri)} == before
    assert day.manifest.version == 2
    whole = pq.read_metadata(logs / "before.parquet").num_rows + pq.read_metadata(logs / "day.parquet").num_rows
    assert sum(map(len, day.read_users(["items"])["items"].to_pylist())) == day.manifest.num_interactions == whole
    assert sum(day.catalogue["train_count"].to_pylist()) == sum(day.read_users(["num_train"])["num_train"].to_pylist())


def train(dataset: Dataset, folder: Path, name: str, **more: Any) -> tuple[dict[str, Any], str]:
    values = {"storage.root": dataset.storage.root, "run.scratch": folder / "scratch", "run.name": name, "data.dataset": dataset.uri}
    settings = [f"--set={key}={value}" for key, value in (values | RUN | more).items()]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "RECSYS_"))}
    finished = subprocess.run(
        [sys.executable, "-m", "jobs.train", *settings], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1]), finished.stderr


@pytest.mark.slow
def test_a_run_goes_on_on_its_base_and_another_trains_on_the_version(tmp_path: Path, logs: Path) -> None:
    storage = Storage(str(tmp_path / "store"))
    base = prepared(storage, events=f"{logs}/before.parquet", items=f"{logs}/items.parquet")
    assert train(base, tmp_path, "run", **{"training.max_steps": 6})[0]["steps"] == 6
    day = prepared(storage, base=base.uri, events=f"{logs}/day.parquet")
    again, log = train(base, tmp_path, "run")
    assert again["steps"] == 12
    assert "resuming run run from step 6" in log
    of_version, _ = train(day, tmp_path, "next")
    assert of_version["steps"] == 12
    assert Dataset.open(storage, base.uri).manifest == base.manifest
