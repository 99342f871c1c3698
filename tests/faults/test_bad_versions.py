"""Versions that must not be served: each is turned back before it meets a replica, and the alias points to the good one again."""

import os
import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recsys.config import Config
from recsys.errors import UserError
from recsys.exports.registry import Registry
from recsys.store import Storage
from serve import rollout
from tests.exports import METRICS, publish_export, service_config

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = service_config(tmp_path_factory.mktemp("bad"), max_batch_seconds=5.0)
    publish_export(config, "good", seed=1)
    return config


def corrupt(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\0" * 100)


def wrong_shape(folder: Path) -> None:
    vectors = load_file(folder / "item_vectors.safetensors")
    save_file({name: tensor[:, :-1].contiguous() for name, tensor in vectors.items()}, folder / "item_vectors.safetensors")


def not_finite(folder: Path) -> None:
    vectors = load_file(folder / "item_vectors.safetensors")
    vectors["item_vectors"][5] = torch.nan
    save_file(vectors, folder / "item_vectors.safetensors")
    (folder / "golden.json").write_text("[]")


def incomplete(folder: Path) -> None:
    (folder / "catalogue.parquet").unlink()


def publish_bad(config: Config, version: str, damage: Any) -> Registry:
    registry = Registry(Storage.from_config(config.storage), config.served_export)
    with TemporaryDirectory() as folder:
        files = registry.fetch("good", Path(folder))
        damage(files)
        registry.publish(files, version, {"metrics": METRICS})
    registry.promote(config.service.alias, version, "for a test")
    return registry


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (corrupt, "cannot be served: "),
        (wrong_shape, "cannot be served: "),
        (not_finite, "gives numbers that are not finite"),
        (incomplete, "cannot be served: "),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_bad_version_is_turned_back(config: Config, damage: Any, reason: str) -> None:
    registry = publish_bad(config, damage.__name__, damage)
    with pytest.raises(UserError) as caught:
        rollout._try_out(config, damage.__name__)
    assert reason in str(caught.value)
    assert str(caught.value).endswith("production points to good again")
    assert registry.resolve("production") == "good"
    assert registry.history("production")[-1].action == "roll_back"
    assert registry.history("production")[-1].reason


def test_a_slow_version_is_turned_back(config: Config) -> None:
    slow = config.with_values({"service.max_batch_seconds": 1e-6})
    registry = publish_bad(config, "slow", lambda folder: None)
    with pytest.raises(UserError, match=r"takes .* s for a batch of 32 requests; at most 1e-06 s \(service.max_batch_seconds\)"):
        rollout._try_out(slow, "slow")
    assert registry.resolve("production") == "good"


@pytest.mark.parametrize("kind", ["crashing", "hanging"])
def test_only_the_process_that_tries_a_version_crashes_or_hangs(config: Config, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    registry = publish_bad(config, kind, lambda folder: None)
    monkeypatch.setattr(rollout, "_load_and_ask", {"crashing": crash, "hanging": hang}[kind])
    monkeypatch.setattr(rollout, "TRY_SECONDS", {"crashing": 60, "hanging": 3}[kind])
    with pytest.raises(UserError, match=r"its process ended with -11|does not answer within 3 s"):
        rollout._try_out(config, kind)
    assert registry.resolve("production") == "good"


def crash(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(*_: object) -> None:
    time.sleep(100)


def test_a_good_version_is_let_through(config: Config) -> None:
    rollout._try_out(config, "good")
