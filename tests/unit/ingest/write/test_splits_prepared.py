"""Datasets with each split and with withheld items, without Ray: rows compared with a plain reference, prepared at once and by days."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys.config import load_config
from recsys.config.data import DataConfig
from recsys.data.manifest import MANIFEST_NAME, Dataset
from recsys.errors import UserError
from recsys.ingest.prepare import prepare
from recsys.ingest.write.splits import split_events, withheld
from recsys.report.pages import DATASET
from recsys.schema import DEFAULT_EVENT, EVENTS_SCHEMA
from recsys.store import Storage, join
from tests.without_ray import patch_run_tasks, run_once

Event = tuple[str, str, int]  # user, item, time
Rows = dict[str, tuple[list[Event], int, int]]
RANDOM = ("data.split=random", "data.test_fraction=0.3", "data.validation_fraction=0.2")
TIME = ("data.split=time", "data.validation_from=700", "data.test_from=850")
SPLITS = {"leave_one_out": (), "time": TIME, "random": RANDOM}
COLD = ("data.withheld_items=0.3",)


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_run_tasks(monkeypatch, run_once)


def make_events(num_users: int = 25, least: int = 3) -> list[Event]:
    """Return events with distinct timestamps, so that the log can be cut anywhere; some users repeat an item."""
    generator = np.random.default_rng(0)
    rows = [(f"u{user}", int(generator.integers(30))) for user in range(num_users) for _ in range(generator.integers(least, 25))]
    times = generator.permutation(1000)[: len(rows)]
    return sorted(((user, f"i{item}", int(time)) for (user, item), time in zip(rows, times, strict=True)), key=lambda row: row[2])


def prepared(folder: Path, events: Sequence[Event], *overrides: str, name: str = "events") -> Dataset:
    log = folder / f"{name}.csv"
    log.write_text("user_id,item_id,timestamp\n" + "".join(f"{user},{item},{time}\n" for user, item, time in events))
    config = load_config(None, [f"storage.root={folder / 'store'}", f"data.events={log}", *overrides])
    return prepare(config, Storage.from_config(config.storage))


def rows_of(dataset: Dataset) -> Rows:
    ids = dataset.catalogue["item_id"].to_pylist()
    users = dataset.read_users().to_pylist()
    assert [row["user_index"] for row in users] == list(range(dataset.manifest.num_users))
    return {
        row["user_id"]: (
            [(row["user_id"], ids[item - 1], time) for item, time in zip(row["items"], row["timestamps"], strict=True)],
            row["num_train"],
            row["num_validation"],
        )
        for row in users
    }


def expected_rows(events: Sequence[Event], data: DataConfig) -> Rows:
    """Return the expected rows by the split rules, user by user."""
    rows = {}
    for user in {event[0] for event in events}:
        own = sorted((event for event in events if event[0] == user), key=lambda event: event[2])
        if data.split == "leave_one_out":
            parts = [0] * (len(own) - 2) + [1, 2] if len(own) >= 3 else [0] * len(own)
        elif data.split == "time":
            parts = [(time >= data.validation_from) + (time >= data.test_from) for _, _, time in own]
        else:
            table = pa.table(
                [*zip(*own, strict=True), *([value] * len(own) for value in (DEFAULT_EVENT, None, None, 0))], schema=EVENTS_SCHEMA
            )
            parts = split_events(table, np.array([0, len(own)]), data).tolist()
        by_part: dict[int, list[Event]] = defaultdict(list)
        for event, part in zip(own, parts, strict=True):
            if part or not withheld(pa.array([event[1]]), data)[0]:
                by_part[part].append(event)
        rows[user] = (by_part[0] + by_part[1] + by_part[2], len(by_part[0]), len(by_part[1]))
    return rows


def check_manifest(dataset: Dataset, events: Sequence[Event]) -> None:
    """Check that totals, item counts and training samples follow from the rows, and that no sample contains a withheld item."""
    manifest, rows, ids = dataset.manifest, rows_of(dataset), dataset.catalogue["item_id"]
    assert manifest.num_interactions == sum(len(row) for row, _, _ in rows.values())
    training = Counter(item for row, num_train, _ in rows.values() for _, item, _ in row[:num_train])
    counts = dict(zip(ids.to_pylist(), dataset.catalogue["train_count"].to_pylist(), strict=True))
    assert {item: count for item, count in counts.items() if count} == training
    assert counts.keys() == {event[1] for event in events}
    cold = set(ids.filter(pa.array(withheld(ids, DataConfig.model_validate(manifest.data_config)))).to_pylist())
    samples = [row for shard in manifest.train_shards for row in dataset.read_shard(shard).to_pylist()]
    assert not {ids[item - 1].as_py() for row in samples for item in row["items"]} & cold
    num_targets = sum(len(row["items"]) - row["first_target"] for row in samples)
    assert num_targets == manifest.num_targets
    if manifest.version == 1:
        assert num_targets == sum(max(0, num_train - 1) for _, num_train, _ in rows.values())
        assert manifest.rejected.get("withheld", 0) == len(events) - manifest.num_interactions
        assert manifest.noticed.get("withheld_item", 0) == len(cold)


@pytest.mark.parametrize("is_cold", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_what_the_rules_say_for_any_number_of_partitions_and_order_of_the_file(tmp_path: Path, split: str, is_cold: bool) -> None:
    events = make_events(least=1)
    overrides = (*SPLITS[split], *(COLD if is_cold else ()))
    dataset = prepared(tmp_path, events, *overrides, "data.num_shards=1")
    expected = expected_rows(events, DataConfig.model_validate(dataset.manifest.data_config))
    assert rows_of(dataset) == expected
    check_manifest(dataset, events)
    assert ("withheld" in dataset.manifest.rejected) == is_cold
    assert rows_of(prepared(tmp_path, events[::-1], *overrides, "data.num_shards=3", name="backwards")) == expected


def test_some_held_out_items_are_cold_and_the_report_says_so(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, make_events(), *COLD, "data.num_shards=2")
    cold = set(dataset.catalogue.filter(pa.compute.equal(dataset.catalogue["train_count"], 0))["item_id"].to_pylist())
    rows = rows_of(dataset).values()
    assert 0 < sum(row[-1][1] in cold for row, _, _ in rows) < len(rows)
    assert 0 < sum(row[-2][1] in cold for row, _, _ in rows) < len(rows)
    report = dataset.storage.read_bytes(join(dataset.uri, DATASET.page_name)).decode()
    assert "training samples have 0 interactions with them" in report
    assert "a training interaction with an item that data.withheld_items keeps out" in report


def test_a_user_of_whom_nothing_is_left_stays_a_row_and_may_come_back(tmp_path: Path) -> None:
    data = DataConfig(withheld_items=0.3)
    names = pa.array([f"i{number}" for number in range(30)])
    cold, warm = (names.filter(pa.array(mask)).to_pylist() for mask in (withheld(names, data), ~withheld(names, data)))
    events = [("ann", cold[0], 1), ("ann", cold[1], 2), *(("bob", warm[place], place) for place in range(4))]
    base = prepared(tmp_path, events, *COLD, "data.num_shards=1")
    assert rows_of(base)["ann"] == ([], 0, 0)
    assert base.manifest.num_users == 2
    again = prepared(tmp_path, [*events[:2], ("ann", warm[0], 3)], f"data.base={base.uri}", name="again")
    assert rows_of(again)["ann"] == ([("ann", cold[1], 2), ("ann", warm[0], 3)], 0, 1)
    assert again.manifest.noticed == {}


def test_k_core_counts_before_items_are_withheld(tmp_path: Path) -> None:
    events = make_events()
    plain = prepared(tmp_path, events, "data.k_core=8", "data.num_shards=2")
    cold = prepared(tmp_path, events, "data.k_core=8", "data.num_shards=2", *COLD)
    assert cold.catalogue["item_id"].equals(plain.catalogue["item_id"])
    assert rows_of(cold).keys() == rows_of(plain).keys()
    kept = [event for row, _, _ in rows_of(plain).values() for event in row]
    assert rows_of(cold) == expected_rows(kept, DataConfig.model_validate(cold.manifest.data_config))


@pytest.mark.parametrize("overrides", [(*SPLITS[split], *COLD) for split in SPLITS], ids=list(SPLITS))
def test_days_add_up_to_one_preparation(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    events = make_events()
    # The first day has at least three events per user, since leave_one_out counts events; each later day repeats all earlier events.
    position: Counter[str] = Counter()
    early, later = [], []
    for event in events:
        position[event[0]] += 1
        (early if position[event[0]] <= 4 else later).append(event)
    version = prepared(tmp_path, early, *overrides, "data.num_shards=2")
    for number in range(3):
        day = later[number * len(later) // 3 : (number + 1) * len(later) // 3]
        version = prepared(tmp_path, [*early, *day], f"data.base={version.uri}", name=f"day{number}")
        early += day
    whole = prepared(tmp_path, events, *overrides, "data.num_shards=2", name="whole")
    assert rows_of(version) == rows_of(whole)
    assert version.manifest.version == 4
    check_manifest(version, events)
    report = version.storage.read_bytes(join(version.uri, DATASET.page_name)).decode()
    assert "training samples have 0 interactions with them" in report


def test_a_base_from_before_there_were_such_keys_refuses_them(tmp_path: Path) -> None:
    base = prepared(tmp_path, make_events(), "data.num_shards=2")
    old: dict[str, Any] = base.manifest.model_dump(mode="json")
    del old["data_config"]["withheld_items"]
    text = type(base.manifest).model_validate(old).model_dump_json()
    base.storage.write_bytes(join(base.uri, MANIFEST_NAME), text.encode())
    with pytest.raises(UserError, match=r"data\.withheld_items = 0\.3: the base dataset was made with 0\.0"):
        prepared(tmp_path, [("u1", "i1", 2000)], f"data.base={base.uri}", *COLD, name="day")
