"""Real MLflow with a folder as its store, and Weights & Biases offline."""

import importlib.util
import logging
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from mlflow import MlflowClient
from wandb.proto.wandb_internal_pb2 import Record

from recsys.config import Config, load_config
from recsys.errors import UserError
from recsys.train.monitoring.trackers import Trackers

BLOCK, FULL, LAST = 1 << 15, 1, 4


def config_of(folder: Path, *trackers: str) -> Config:
    values = {"run.scratch": str(folder), "run.name": "shop/second", "run.trackers": trackers, "run.project": "shop"}
    return load_config().with_values(values | {"storage.root": str(folder / "store")})


def test_mlflow_has_one_record_of_a_run_that_was_started_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for step, loss in ((5, 2.0), (9, 1.5)):
        trackers = Trackers(config_of(tmp_path, "mlflow"))
        trackers.send({"loss/retrieval": loss, "validation/ndcg@10": 0.1 * step}, step)
        trackers.close()
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("shop").experiment_id])
    assert (run.info.run_name, run.info.status) == ("shop/second", "FINISHED")
    assert run.data.params["training.global_batch_size"] == "128"
    history = {name: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
    assert history == {"loss/retrieval": [(5, 2.0), (9, 1.5)], "validation/ndcg_at_10": [(5, 0.5), (9, 0.9)]}


def records_of(log: bytes) -> Iterator[bytes]:
    """Yield the records of the offline log, in LevelDB's format: blocks of 32 KiB with parts of records, after a header of 7 bytes."""
    position, record = 7, b""
    while position + 7 <= len(log):
        if (room := BLOCK - position % BLOCK) < 7:
            position += room
            continue
        size, kind = struct.unpack_from("<HB", log, position + 4)
        record += log[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (FULL, LAST):
            yield record
            record = b""


def test_weights_and_biases_gets_values_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = Trackers(config_of(tmp_path, "wandb"))
    for step in (5, 9):
        trackers.send({"loss/retrieval": 10.0 / step}, step)
    trackers.close()
    wandb.teardown()  # its own process finishes the log a little after the run
    (file,) = (tmp_path / "wandb").rglob("*.wandb")
    found: dict[int, float] = {}
    for data in records_of(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        if "loss/retrieval" in items:
            found[int(items["_step"])] = float(items["loss/retrieval"])
    assert found == {5: 2.0, 9: 10.0 / 9}


def test_a_server_that_is_not_there_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    trackers = Trackers(config_of(tmp_path, "mlflow"))
    begin = time.monotonic()
    trackers.send({"loss/retrieval": 1.0}, 1)
    assert time.monotonic() - begin < 1
    with caplog.at_level(logging.WARNING):
        trackers.close()
    assert [line for line in caplog.messages if line.startswith("run.trackers = mlflow: disabled for the rest of the run (")]


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run\.trackers = wandb: is not installed; pip install 'recsys\[trackers\]'"):
        Trackers(config_of(tmp_path, "wandb"))
