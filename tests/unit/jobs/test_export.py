"""When an export is promoted to production without a comparison; `test_daily_retrain` has those with one."""

import math
from pathlib import Path

import pytest

from jobs.export import PRODUCTION, promote
from recsys.config import load_config
from recsys.exports.registry import ExportManifest, Registry
from recsys.store import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "store"))


@pytest.fixture
def registry(storage: Storage) -> Registry:
    return Registry(storage, "shop")


def publish(registry: Registry, tmp_path: Path, version: str, ndcg: float, fingerprint: str = "same") -> ExportManifest:
    folder = tmp_path / version
    folder.mkdir()
    (folder / "weights").write_text(version)
    manifest, _ = registry.publish(folder, version, {"metrics": {"ndcg@10": ndcg}, "dataset_fingerprint": fingerprint})
    return manifest


@pytest.mark.parametrize(
    ("rule", "before", "after", "expected"),
    [
        ("if_no_worse", None, 0.1, "new"),
        ("if_no_worse", None, math.nan, None),
        ("if_better", None, 0.1, "new"),
        ("if_better", 0.2, math.nan, "old"),
        ("always", 0.2, 0.1, "new"),
        ("always", 0.2, math.nan, "new"),
        ("never", 0.1, 0.9, "old"),
        ("never", None, 0.9, None),
    ],
)
def test_what_is_in_production_without_a_comparison(
    registry: Registry, storage: Storage, tmp_path: Path, rule: str, before: float | None, after: float, expected: str | None
) -> None:
    config = load_config(None, [f"export.promote={rule}"])
    if before is not None:
        assert promote(load_config(), storage, registry, publish(registry, tmp_path, "old", before))[0] == PRODUCTION
    alias, reason = promote(config, storage, registry, publish(registry, tmp_path, "new", after))
    assert registry.resolve(PRODUCTION) == expected
    assert (alias == PRODUCTION) == (expected == "new")
    assert reason


def test_exporting_again_changes_nothing(registry: Registry, storage: Storage, tmp_path: Path) -> None:
    manifest = publish(registry, tmp_path, "one", 0.1)
    promote(load_config(), storage, registry, manifest)
    assert promote(load_config(), storage, registry, manifest) == (PRODUCTION, "in production already")
    assert len(registry.history(PRODUCTION)) == 1
