"""Users' queries from the events to the shards, without Ray: rows compared with a plain reference, prepared at once and by days."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from recsys.config import load_config
from recsys.data.manifest import Dataset
from recsys.data.text.queries import read_queries
from recsys.errors import UserError
from recsys.ingest.prepare import prepare
from recsys.store import Storage
from tests.without_ray import patch_run_tasks, run_once

Event = tuple[str, str, int, str]  # user, item, time, query
QueryTargets = dict[tuple[str, int], str | None]  # (user, time) -> query


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_run_tasks(monkeypatch, run_once)


def make_events() -> list[Event]:
    """Return events with distinct timestamps; users share some queries, and some events have none."""
    generator = np.random.default_rng(0)
    rows = [(f"u{user}", f"i{generator.integers(12)}") for user in range(20) for _ in range(generator.integers(2, 15))]
    words = ["", "red shoes", "green tea", "tent", "", *(f"word {number}" for number in range(40))]
    queries = generator.choice(words, len(rows)).tolist()
    times = generator.permutation(1000)[: len(rows)].tolist()
    return [(*row, time, query) for row, time, query in zip(rows, times, queries, strict=True)]


def prepared(folder: Path, events: Sequence[Event], *overrides: str, name: str = "events", column: str = "query") -> Dataset:
    log = folder / f"{name}.csv"
    with log.open("w", newline="") as file:
        csv.writer(file).writerows([("user_id", "item_id", "timestamp", column), *events])
    config = load_config(None, [f"storage.root={folder / 'store'}", f"data.events={log}", *overrides])
    return prepare(config, Storage.from_config(config.storage))


def asked(dataset: Dataset, scratch: Path) -> QueryTargets:
    """Return the queries in the users' rows, and check that the training rows agree."""
    texts = [None, *read_queries(dataset, scratch)]
    users = dataset.read_users().to_pylist()
    ids = {row["user_index"]: row["user_id"] for row in users}

    def of(rows: list[dict]) -> QueryTargets:
        return {
            (ids[row["user_index"]], time): texts[query]
            for row in rows
            for time, query in zip(row["timestamps"], row["queries"], strict=True)
        }

    found = of(users)
    assert of([row for shard in dataset.manifest.train_shards for row in dataset.read_shard(shard).to_pylist()]).items() <= found.items()
    rows = [row for shard in dataset.manifest.query_shards for row in dataset.read_shard(shard).to_pylist()]
    assert [row["query_index"] for row in rows] == list(range(1, dataset.manifest.num_queries + 1))
    return found


@pytest.mark.parametrize("overrides", [(), ("data.split=random", "data.withheld_items=0.2"), ("data.k_core=3",)], ids=str)
def test_each_interaction_keeps_its_query_for_any_number_of_partitions(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    events = make_events()
    found = [asked(prepared(tmp_path, events, *overrides, f"data.num_shards={number}"), tmp_path / str(number)) for number in (1, 3)]
    expected = {(user, time): query or None for user, _, time, query in events}
    assert found[0] == found[1] == {key: expected[key] for key in found[0]}
    assert len(found[0]) == len(expected) or overrides
    assert len(set(found[0].values())) > 20


def test_a_partition_holds_each_text_once(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, [("ann", f"i{number}", number, f"q{number % 2}") for number in range(6)], "data.num_shards=1")
    assert list(read_queries(dataset, tmp_path / "scratch")) == ["q0", "q1"]
    assert dataset.read_users()["queries"].to_pylist() == [[1, 2, 1, 2, 1, 2]]


def test_days_add_queries_and_renumber_none(tmp_path: Path) -> None:
    events = sorted(make_events(), key=lambda event: event[2])
    whole = asked(prepared(tmp_path, events, "data.num_shards=2", name="whole"), tmp_path / "whole")
    days = [events[: len(events) // 2], events[len(events) // 2 : -20], events[-20:]]
    version = prepared(tmp_path, days[0], "data.num_shards=2", name="day0")
    texts: list[str] = []
    for number, day in enumerate(days[1:], start=1):
        before = list(read_queries(version, tmp_path / f"v{number}"))
        assert before[: len(texts)] == texts
        version, texts = prepared(tmp_path, day, f"data.base={version.uri}", name=f"day{number}"), before
    assert asked(version, tmp_path / "last") == whole
    assert list(read_queries(version, tmp_path / "last"))[: len(texts)] == texts


def test_a_base_without_queries_takes_a_day_with_some(tmp_path: Path) -> None:
    base = prepared(tmp_path, [("ann", "i1", 1, ""), ("ann", "i2", 2, ""), ("bob", "i1", 1, "")], "data.num_shards=1")
    assert (base.manifest.num_queries, base.manifest.query_shards) == (0, ())
    assert list(read_queries(base, tmp_path / "scratch")) == []
    day = prepared(tmp_path, [("ann", "i3", 3, "tent"), ("bob", "i2", 4, "")], f"data.base={base.uri}", name="day")
    assert asked(day, tmp_path / "scratch") == {("ann", 1): None, ("ann", 2): None, ("ann", 3): "tent", ("bob", 1): None, ("bob", 4): None}


def test_queries_are_normalised_and_counted(tmp_path: Path) -> None:
    typed = ["  red \t shoes\x07 ", "\x00", " ", "x" * 3000, "tent"]
    dataset = prepared(
        tmp_path, [("ann", f"i{number}", number, query) for number, query in enumerate(typed)], 'data.columns.query="words"', column="words"
    )
    expected = ["red shoes", None, None, "x" * 2000, "tent"]
    assert asked(dataset, tmp_path / "scratch") == {("ann", number): query for number, query in enumerate(expected)}
    assert dataset.manifest.noticed == {"query_cut": 1}


def test_an_empty_name_leaves_queries_out(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, make_events(), 'data.columns.query=""')
    assert dataset.manifest.num_queries == 0
    assert read_queries(dataset, tmp_path / "scratch") == ()


def test_a_json_key_may_first_occur_far_behind_the_beginning(tmp_path: Path) -> None:
    rows = [{"user_id": f"u{number % 50}", "item_id": f"i{number % 70}", "timestamp": number} for number in range(1500)]
    rows[-1]["query"] = "tent"
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = load_config(None, [f"storage.root={tmp_path / 'store'}", f"data.events={tmp_path / 'events.jsonl'}"])
    dataset = prepare(config, Storage.from_config(config.storage))
    assert {key: query for key, query in asked(dataset, tmp_path / "scratch").items() if query} == {("u49", 1499): "tent"}


def test_a_column_that_the_config_names_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no column 'words' \(query\)"):
        prepared(tmp_path, make_events(), 'data.columns.query="words"')
