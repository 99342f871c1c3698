"""Logs with a row per page: MIND's files, and list columns with flags; counted exactly."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config import Config, load_config
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.evaluation.exposures import ExposedTargets
from recsys.ingest.prepare import prepare
from recsys.store import Storage
from tests.without_ray import patch_run_tasks, run_once

BEHAVIORS = """1\tU1\t11/11/2019 9:05:58 AM\tN1 N2 N3\tN4-0 N5-1 N6-0
2\tU2\t11/11/2019 6:11:30 PM\tN2\tN5-0 N4-1
3\tU1\t11/12/2019 12:00:01 PM\tN1 N2 N3\tN7-0 N4-1 N8-1
4\tU3\t11/12/2019 3:25:58 PM\t\tN7-0 N8-0 N1-1
5\tU2\t11/13/2019 1:00:00 AM\tN2\tN1-1 N6-0
6\tU2\t11/14/2019 1:00:00 AM\tN2\tN3-1 N7-0
"""
NEWS = "".join(
    f'N{number}\tsports\tfootball\tTitle {number} says "so"\tAbstract of {number}\thttps://x/{number}\t[]\t[]\n' for number in range(1, 10)
)


def prepared(root: Path, **data: Any) -> tuple[Config, Dataset]:
    values = {"storage.root": str(root / "store"), "run.scratch": str(root / "scratch"), "data.max_history": 10}
    config = load_config().with_values(values | {f"data.{key}": value for key, value in data.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch_run_tasks(patch, run_once)
        return config, prepare(config, Storage.from_config(config.storage))


@pytest.fixture
def mind(tmp_path: Path) -> Path:
    folder = tmp_path / "mind"
    folder.mkdir()
    (folder / "behaviors.tsv").write_text(BEHAVIORS)
    (folder / "news.tsv").write_text(NEWS)
    return folder


def test_mind_is_imported_as_it_is(tmp_path: Path, mind: Path) -> None:
    _, dataset = prepared(tmp_path, folder=str(mind), split="time", validation_from="2019-11-13", test_from="2019-11-14")
    manifest = dataset.manifest
    assert (manifest.num_users, manifest.num_items) == (3, 9)
    assert manifest.event_kinds == ("impression", "click")
    # 4 clicks before, of which each of a user's later rows repeats its own: U1 3 twice, U2 1 three times; 7 clicks of slates
    assert manifest.num_interactions == 4 + 7
    assert manifest.rejected == {"duplicate": 3 + 2}
    assert manifest.num_exposures == 3 + 2 + 3 + 3
    assert [len(ExposedTargets.read(dataset, split).labels) for split in ("validation", "test")] == [2, 2]
    users = {row["user_id"]: row for row in dataset.read_users().to_pylist()}
    items = ["", *dataset.catalogue["item_id"].to_pylist()]
    assert [items[item] for item in users["U1"]["items"]] == ["N1", "N2", "N3", "N5", "N4", "N8"]
    assert [items[item] for item in users["U2"]["items"]] == ["N2", "N4", "N1", "N3"]
    assert users["U1"]["timestamps"][3:] == [1573463158, 1573560001, 1573560001]
    samples = [row for shard in manifest.train_shards for row in dataset.read_shard(shard).to_pylist()]
    shown = Counter(
        (items[item], label, display)
        for row in samples
        for item, label, display in zip(row["exposed_items"], row["exposed_labels"], row["exposed_displays"], strict=True)
    )
    assert shown[("N5", 1, 2)] == shown[("N4", 1, 2)] - 1 == 1  # row 1; rows 2 and 3
    assert shown[("N7", 0, 1)] == 2
    assert dataset.catalogue["title"].to_pylist()[0] == 'Title 1 says "so"'
    assert all(len(categories) == 2 for categories in dataset.catalogue["categories"].to_pylist())
    uses = {use.name: use.use for use in manifest.columns if use.table == "events"}
    assert uses == {
        "impression_id": "impression_id",
        "user_id": "user_id",
        "time": "timestamp",
        "history": "history",
        "impressions": "slate",
    }


def test_lists_with_flags(tmp_path: Path) -> None:
    table = pa.table(
        {
            "user_id": ["a", "b", "a"],
            "timestamp": [10, 20, 30],
            "shown": [["i1", "i2"], ["i2", "i3", "i4"], ["i1"]],
            "taken": [[0, 1], [True, False, False], [1]],
        }
        | {"taken": pa.array([[0, 1], [1, 0, 0], [1]])}
    )
    pq.write_table(table, tmp_path / "events.parquet")
    _, dataset = prepared(tmp_path, events=str(tmp_path / "events.parquet"), columns={"slate": "shown", "slate_flags": "taken"})
    assert dataset.manifest.num_interactions == 3
    rows = [row for shard in dataset.manifest.train_shards for row in dataset.read_shard(shard).to_pylist()]
    assert sum(sum(row["exposed_labels"]) for row in rows) == 3
    assert sum(len(row["exposed_items"]) for row in rows) == 6


def test_a_slate_that_does_not_fit_its_flags_is_refused_with_its_row(tmp_path: Path, mind: Path) -> None:
    pq.write_table(
        pa.table({"user_id": ["a"] * 2, "timestamp": [1, 2], "s": [["x"], ["x", "y"]], "f": [[1], [1]]}), tmp_path / "events.parquet"
    )
    with pytest.raises(UserError, match="row 2: has 2 items and 1 flags"):
        prepared(tmp_path, events=str(tmp_path / "events.parquet"), columns={"slate": "s", "slate_flags": "f"})
    with pytest.raises(UserError, match="has no column 'nothing'"):
        prepared(tmp_path, events=str(tmp_path / "events.parquet"), columns={"slate": "nothing"})
    (mind / "behaviors.tsv").write_text(BEHAVIORS + "7\tU1\tmissing fields\n")
    with pytest.raises(UserError, match="line 7 has 3 fields; impression_id user_id time history impressions has 5"):
        prepared(tmp_path, folder=str(mind))
