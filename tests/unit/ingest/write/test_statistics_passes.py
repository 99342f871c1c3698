"""Statistics of a prepared dataset: contents of its shards, their use in the catalogue, and statistics of appended versions."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys.config import load_config
from recsys.data.manifest import Dataset, Shard, last_rows
from recsys.ingest.prepare import prepare
from recsys.ingest.write.feature_statistics import TrainSpan, item_numbers, join_moments, read_histories, user_statistics
from recsys.report.pages import DATASET
from recsys.schema import ITEM_STATISTICS_SCHEMA
from recsys.store import Storage, join
from tests.without_ray import patch_run_tasks, run_once

Event = tuple[str, str, int, str, str]


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_run_tasks(monkeypatch, run_once)


def make_events(seed: int = 0, num_users: int = 30) -> list[Event]:
    generator = np.random.default_rng(seed)
    events = []
    for user in range(num_users):
        items = generator.permutation(20)[: generator.integers(4, 12)]
        times = 1000 + np.sort(generator.choice(100_000, len(items), replace=False))
        kinds, values = generator.integers(0, 2, len(items)), generator.integers(1, 6, len(items))
        for item, time, kind, value in zip(items.tolist(), times.tolist(), kinds.tolist(), values.tolist(), strict=True):
            events.append((f"u{user}", f"i{item}", time, ("view", "click")[kind], str(value) if value > 1 else ""))
    return events


def prepared(folder: Path, events: list[Event], *overrides: str, name: str = "events") -> Dataset:
    log = folder / f"{name}.csv"
    log.write_text("user_id,item_id,timestamp,event,value\n" + "".join(",".join(map(str, event)) + "\n" for event in events))
    config = load_config(None, [f"storage.root={folder / 'store'}", "data.num_shards=3", f"data.events={log}", *overrides])
    return prepare(config, Storage.from_config(config.storage))


def read_rows(dataset: Dataset, shards: tuple[Shard, ...], index: str) -> pa.Table:
    return last_rows(pa.concat_tables([dataset.read_shard(shard) for shard in shards]), index)


def users_of(dataset: Dataset) -> dict[str, dict[str, Any]]:
    names = {row["user_index"]: row["user_id"] for row in dataset.read_users(["user_index", "user_id"]).to_pylist()}
    rows = read_rows(dataset, dataset.manifest.user_statistics_shards, "user_index").to_pylist()
    return {names[row.pop("user_index")]: row for row in rows}


def items_of(dataset: Dataset) -> dict[str, dict[str, Any]]:
    rows = read_rows(dataset, dataset.manifest.item_statistics_shards, "item_index").to_pylist()
    names = dict(zip(dataset.catalogue["item_index"].to_pylist(), dataset.catalogue["item_id"].to_pylist(), strict=True))
    return {names[row.pop("item_index")]: row for row in rows}


def assert_close(first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]) -> None:
    assert first.keys() == second.keys()
    for name, row in first.items():
        for column, value in row.items():
            expected = second[name][column]
            assert value == (pytest.approx(expected, rel=1e-9, abs=1e-9) if isinstance(expected, float) else expected), (name, column)


def test_the_shards_hold_the_statistics_of_every_user_and_item(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, make_events())
    users = dataset.read_users()
    train = [time for row in users.to_pylist() for time in row["timestamps"][: row["num_train"]]]
    span = TrainSpan(min(train), max(train), max(train))
    found = read_rows(dataset, dataset.manifest.user_statistics_shards, "user_index")
    assert found.equals(user_statistics(read_histories(users), 2, span, dataset.manifest.data_config["session_gap_seconds"]))
    items = read_rows(dataset, dataset.manifest.item_statistics_shards, "item_index")
    assert items.schema == ITEM_STATISTICS_SCHEMA
    assert items["train_count"].to_pylist() == dataset.catalogue["train_count"].to_pylist()
    assert sum(sum(counts) for counts in items["period_counts"].to_pylist()) == len(train)


def test_a_split_by_time_ends_training_at_its_cut(tmp_path: Path) -> None:
    cut = ["data.split=time", "data.validation_from=60000", "data.test_from=80000"]
    dataset = prepared(tmp_path, make_events(), *cut)
    for user, row in users_of(dataset).items():
        times = [time for name, _, time, _, _ in make_events() if name == user and time < 60_000]
        assert row["num_interactions"] == len(times)
        assert row["recency_seconds"] == (60_000 - max(times) if times else None)


def test_statistics_become_standardised_numbers_of_the_catalogue_where_the_config_says_so(tmp_path: Path) -> None:
    assert prepared(tmp_path, make_events()).manifest.number_columns == ()
    dataset = prepared(tmp_path, make_events(), "data.item_features.statistics=true")
    manifest = dataset.manifest
    expected = item_numbers(read_rows(dataset, manifest.item_statistics_shards, "item_index"))
    assert manifest.number_columns == tuple(expected)
    assert {name.removeprefix("statistics.") for name in expected} == {"log_count", "mean_value", "recency", "trend"}
    numbers = np.array(dataset.catalogue["numbers"].to_pylist(), float)
    means, deviations = np.array(manifest.number_moments).T
    np.testing.assert_allclose(numbers * deviations + means, np.stack(list(expected.values()), axis=1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.nanstd(numbers, axis=0), 1, rtol=1e-5)


def test_a_version_appended_by_days_has_the_statistics_of_all_its_events(tmp_path: Path) -> None:
    events = sorted(make_events(), key=lambda event: event[2])
    days = events[:150], events[150:200], events[200:]
    (tmp_path / "days").mkdir()
    (tmp_path / "whole").mkdir()
    version = prepared(tmp_path / "days", days[0])
    for number, day in enumerate(days[1:]):
        version = prepared(tmp_path / "days", day, f"data.base={version.uri}", name=f"day-{number}")
    whole = prepared(tmp_path / "whole", events)
    assert version.manifest.version == 3
    assert_close(users_of(version), users_of(whole))
    assert_close(items_of(version), items_of(whole))
    assert "Version 3" in version.storage.read_bytes(join(version.uri, DATASET.page_name)).decode()


def test_moments_of_values_are_joined_over_partitions() -> None:
    assert join_moments([]) == (0, 0.0, 1.0)
    assert join_moments([[0, 0.0, 0.0], [2, 5.0, 0.0]]) == (2, 5.0, 1.0)
    values = np.random.default_rng(0).normal(1e8, 1e-2, 1000)
    parts = [[len(part), part.mean(), ((part - part.mean()) ** 2).sum()] for part in np.split(values, [10, 700])]
    number, mean, deviation = join_moments(parts)
    assert number == 1000
    assert mean == pytest.approx(values.mean(), rel=1e-15)
    assert deviation == pytest.approx(values.std(), rel=1e-6)
