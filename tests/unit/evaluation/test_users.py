"""Users to evaluate: those with a new target in the split, with the history before it."""

from pathlib import Path

import numpy as np
import pytest

from recsys.config import load_config
from recsys.data import manifest as module
from recsys.data.manifest import Dataset
from recsys.data.text.queries import read_queries
from recsys.evaluation.users import groups_of, read_evaluation_users, rectangle, target_items
from recsys.ingest.prepare import prepare
from recsys.store import Storage
from tests.datasets import make_dataset
from tests.without_ray import patch_run_tasks, run_once


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("store"))))


@pytest.mark.parametrize(("split", "back"), [("validation", 2), ("test", 1)])
@pytest.mark.parametrize("rows_at_once", [7, 1000])
def test_leave_one_out_targets(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, split: str, back: int, rows_at_once: int) -> None:
    monkeypatch.setattr(module, "READ_ROWS", rows_at_once)
    rows = dataset.read_users().to_pylist()
    found = {user.user_index: user for user in read_evaluation_users(dataset, split)}
    assert found.keys() == {row["user_index"] for row in rows if row["items"][-back] not in row["items"][:-back]}
    for index, user in found.items():
        for name in ("items", "events", "timestamps", "values"):
            assert getattr(user.history, name).tolist() == rows[index][name][:-back]
            assert getattr(user.targets, name).tolist() == [rows[index][name][-back]]
        assert user.attributes == dict(rows[index]["attributes"])


def test_the_query_is_that_of_the_first_new_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's first target of each split is already in the history."""
    patch_run_tasks(monkeypatch, run_once)
    (tmp_path / "events.csv").write_text(
        "user_id,item_id,timestamp,query\n"
        + "".join(f"ann,{item},{time},{query}\n" for time, (item, query) in enumerate(zip("abacdbef", "stuvwxyz", strict=True)))
    )
    split = ["data.split=time", "data.validation_from=2", "data.test_from=5"]
    config = load_config(None, [f"storage.root={tmp_path / 'store'}", f"data.events={tmp_path / 'events.csv'}", *split])
    dataset = prepare(config, Storage.from_config(config.storage))
    texts = read_queries(dataset, tmp_path / "scratch")
    ids = dataset.catalogue["item_id"].to_pylist()
    for name, items, query in (("validation", "cd", "v"), ("test", "ef", "y")):
        (user,) = read_evaluation_users(dataset, name)
        assert [ids[item - 1] for item in user.targets.items] == list(items)
        assert texts[user.query - 1] == query


def test_targets_and_groups_in_the_order_of_the_users(dataset: Dataset) -> None:
    users = read_evaluation_users(dataset, "test")
    assert target_items(users)[:, 0].tolist() == [user.targets.items[0] for user in users]
    assert groups_of(users)["group"].tolist() == ["odd" if user.user_index % 2 else "even" for user in users]


def test_rows_of_unlike_length() -> None:
    assert rectangle([np.array([1, 2]), np.array([3]), np.array([], np.int64)]).tolist() == [[1, 2], [3, 0], [0, 0]]
