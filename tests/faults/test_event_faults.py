"""Odd events and texts through a whole preparation: each is dropped or kept by a documented rule, and counted."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config import load_config
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.ingest.clean.rejects import NOTICED, REJECTED
from recsys.ingest.prepare import find_dataset, prepare
from recsys.ingest.write.catalogue import MAX_TEXT_CHARACTERS
from recsys.report.pages import DATASET
from recsys.store import Storage, join
from tests.without_ray import patch_run_tasks, run_once

KEY_VARIABLE = "TEST_PSEUDONYM_KEY"
KEY = "a key that is not in any artifact 8f1d"
Event = tuple[Any, ...]
PLAIN: list[Event] = [
    (f"user-{user}", f"item-{(user + place) % 6}", 1000 + 100 * place, 1.0 + place) for user in range(4) for place in range(4)
]


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_run_tasks(monkeypatch, run_once)


def prepared(folder: Path, events: list[Event], *overrides: str, order: str = "timestamp") -> Dataset:
    names = ("user_id", "item_id", order, "value")
    pq.write_table(
        pa.table({name: list(column) for name, column in zip(names, zip(*events, strict=True), strict=True)}), folder / "log.parquet"
    )
    config = load_config(
        None, [f"storage.root={folder / 'store'}", "data.num_shards=2", f"data.events={folder / 'log.parquet'}", *overrides]
    )
    return prepare(config, Storage.from_config(config.storage))


def users_of(dataset: Dataset) -> set[str]:
    return set(dataset.read_users(["user_id"])["user_id"].to_pylist())


def report_of(dataset: Dataset) -> str:
    return dataset.storage.read_bytes(join(dataset.uri, DATASET.page_name)).decode()


def assert_told(dataset: Dataset) -> None:
    """Check that every counted rule is documented, and that the report shows count and rule."""
    manifest, report = dataset.manifest, report_of(dataset)
    assert manifest.rejected.keys() <= REJECTED.keys()
    assert manifest.noticed.keys() <= NOTICED.keys()
    for name in (*manifest.rejected, *manifest.noticed):
        assert f"<code>{name}</code>" in report


def test_negative_ids_are_ids_and_counted_unless_the_config_rejects_them(tmp_path: Path) -> None:
    events = [*PLAIN, ("-5", "item-1", 1000, 1.0), ("-5", "item-2", 1100, 1.0), ("user-0", "-9", 2000, 1.0)]
    kept = prepared(tmp_path, events)
    assert "-5" in users_of(kept)
    assert kept.manifest.noticed == {"negative_id": 3}
    assert kept.manifest.rejected == {}
    assert_told(kept)
    dropped = prepared(tmp_path, events, "data.cleaning.reject_negative_ids=true")
    assert "-5" not in users_of(dropped)
    assert "-9" not in dropped.catalogue["item_id"].to_pylist()
    assert (dropped.manifest.rejected, dropped.manifest.noticed) == ({"negative_id": 3}, {})
    assert_told(dropped)


def test_items_that_the_catalogue_does_not_list_are_kept_bare_and_counted(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("item_id,title\nitem-0,Zero\nitem-1,One\n")
    dataset = prepared(tmp_path, PLAIN, f"data.items={tmp_path / 'items.csv'}")
    assert dataset.manifest.num_items == 6
    assert dataset.manifest.noticed == {"unknown_item": 4}
    assert dataset.catalogue["title"].to_pylist() == ["Zero", "One", "", "", "", ""]
    assert_told(dataset)


def test_times_out_of_order_are_sorted_and_those_out_of_range_go(tmp_path: Path) -> None:
    events = [*reversed(PLAIN), ("user-0", "item-5", -1, 1.0), ("user-0", "item-5", 5_000_000_000, 1.0), ("user-1", "item-5", 1300, 2.0)]
    dataset = prepared(tmp_path, events)
    for times in dataset.read_users(["timestamps"])["timestamps"].to_pylist():
        assert times == sorted(times)
    assert dataset.manifest.rejected == {"early_time": 1, "future_time": 1}
    assert dataset.manifest.noticed == {"equal_time": 1, "out_of_order": 12}
    assert_told(dataset)


def test_positions_have_no_range_and_no_minutes(tmp_path: Path) -> None:
    events = [(user, item, time // 100 - 5000, value) for user, item, time, value in PLAIN]
    rules = ["data.cleaning.min_time=0", "data.cleaning.max_time=10", "data.cleaning.max_events_per_minute=1"]
    dataset = prepared(tmp_path, events, *rules, order="position")
    assert dataset.manifest.num_interactions == len(PLAIN)
    assert dataset.manifest.rejected == {}


def test_bots_and_outliers_go_before_the_core_is_taken(tmp_path: Path) -> None:
    bot = [("bot", f"item-{place % 6}", 6000 + place, 1.0) for place in range(50)]
    events = [*PLAIN, *bot, ("bot", "item-0", 90_000, 1.0), ("user-0", "item-5", 2000, 99.0)]
    rules = ["data.cleaning.max_events_per_minute=10", "data.cleaning.max_value=5", "data.k_core=2"]
    dataset = prepared(tmp_path, events, *rules)
    assert users_of(dataset) == {f"user-{number}" for number in range(4)}
    assert dataset.manifest.rejected["bot"] == 51
    assert dataset.manifest.rejected["outlier_value"] == 1
    assert_told(dataset)


def test_long_broken_and_unprintable_texts_are_mended_and_counted(tmp_path: Path) -> None:
    titles = ["x" * 1_000_000, "be\x07ll", "half \ud800 a pair", "fine", "tab\tand\nline", None]
    lines = [json.dumps({"item_id": f"item-{number}", "title": title}) for number, title in enumerate(titles)]
    (tmp_path / "items.jsonl").write_text("\n".join(lines) + "\n")
    features = ['data.item_features.text=["title"]', f"data.items={tmp_path / 'items.jsonl'}"]
    dataset = prepared(tmp_path, PLAIN, *features)
    assert dataset.catalogue["text"].to_pylist() == ["x" * MAX_TEXT_CHARACTERS, "bell", "half a pair", "fine", "tab and line", ""]
    assert dataset.manifest.noticed == {"text_cut": 1, "text_unprintable": 2}
    assert_told(dataset)


def test_odd_ids_are_kept_and_counted(tmp_path: Path) -> None:
    raw = pa.array([b"a\xed\xa0\x80", b"b\x00c", b"plain"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    users = pa.chunked_array([broken.take(pa.array([0, 0, 1, 1, 2, 2]))])
    log = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": users, "item_id": ["i", "j"] * 3, "timestamp": [1, 2] * 3}), log)
    config = load_config(None, [f"storage.root={tmp_path / 'store'}", f"data.events={log}", "data.num_shards=2"])
    dataset = prepare(config, Storage.from_config(config.storage))
    assert users_of(dataset) == {r"a\xed\xa0\x80", "b\x00c", "plain"}
    assert dataset.manifest.noticed == {"odd_id": 4}
    assert_told(dataset)


def stored_bytes(root: Path) -> bytes:
    """Return all bytes of a store, and the decoded content of Parquet files, since they are compressed."""
    parts = []
    for path in sorted(root.rglob("*")):
        if path.is_file():
            parts += [str(path).encode(), path.read_bytes()]
            if path.suffix == ".parquet":
                parts.append(json.dumps(pq.read_table(path, partitioning=None).to_pylist(), default=str).encode())
    return b"\n".join(parts)


def test_no_user_id_and_no_key_is_in_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users.csv").write_text("user_id,group\nuser-0,north\nuser-1,south\n")
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    kept: list[bytes] = []
    delete_tree = Storage.delete_tree
    monkeypatch.setattr(Storage, "delete_tree", lambda *arguments: kept.append(stored_bytes(tmp_path / "store")) or delete_tree(*arguments))
    inputs = [f"data.users={tmp_path / 'users.csv'}"]
    dataset = prepared(tmp_path, PLAIN, *inputs, f"data.pseudonym_key_env={KEY_VARIABLE}")
    everything = [*kept, stored_bytes(tmp_path / "store")]
    assert any(b"staging" in content for content in kept)
    for content in everything:
        assert KEY.encode() not in content
        assert not [user for user in range(4) if f"user-{user}".encode() in content]
    assert b"item-1" in everything[-1]
    users = dataset.read_users(["user_id", "attributes"]).to_pylist()
    assert sorted(dict(user["attributes"]).get("group", "") for user in users) == ["", "", "north", "south"]
    assert {len(user["user_id"]) for user in users} == {32}
    plain = prepared(tmp_path, PLAIN, *inputs)
    assert b"user-0" in stored_bytes(Path(plain.uri))


def test_the_key_decides_the_dataset_and_is_needed_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    option = f"data.pseudonym_key_env={KEY_VARIABLE}"
    made = []
    for folder, key in (("one", KEY), ("two", KEY), ("one", KEY + "!")):
        monkeypatch.setenv(KEY_VARIABLE, key)
        (tmp_path / folder).mkdir(exist_ok=True)
        made.append(prepared(tmp_path / folder, PLAIN, option))
    fingerprints = [dataset.manifest.fingerprint for dataset in made]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert made[0].uri != made[2].uri
    monkeypatch.delenv(KEY_VARIABLE)
    config = load_config(None, [f"storage.root={tmp_path / 'none'}", f"data.events={tmp_path / 'one' / 'log.parquet'}", option])
    storage = Storage.from_config(config.storage)
    for step in (find_dataset, prepare):
        with pytest.raises(UserError, match=f"{KEY_VARIABLE}: the environment variable is not set"):
            step(config, storage)
    assert not (tmp_path / "none").exists()


def test_a_version_is_appended_under_the_same_key_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    option = f"data.pseudonym_key_env={KEY_VARIABLE}"
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    base = prepared(tmp_path, PLAIN, option)
    day = [("user-0", "item-0", 5000, 1.0), ("user-9", "item-1", 5000, 1.0)]
    version = prepared(tmp_path, day, option, f"data.base={base.uri}")
    assert version.manifest.num_users == 5
    monkeypatch.setenv(KEY_VARIABLE, KEY + "!")
    with pytest.raises(UserError, match="holds another key than the base dataset"):
        prepared(tmp_path, day, option, f"data.base={base.uri}")
