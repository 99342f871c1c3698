"""The passes of prepare_data run in this process, without Ray: exact tables of a small hand-made input."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from recsys.config import Config, load_config
from recsys.data.manifest import MANIFEST_NAME, Dataset
from recsys.errors import UserError
from recsys.ingest import prepare as prepare_module
from recsys.ingest.prepare import find_dataset, prepare
from recsys.report.pages import DATASET
from recsys.store import Storage, join, sha256_of
from tests.without_ray import patch_run_tasks

EVENTS = """user_id,item_id,timestamp,event,value
ann,10,100,view,
ann,9,100,click,4
ann,9,100,click,4
ann,7,50,view,2
ann,8,200,purchase,5
bob,9,10,view,
bob,10,20,view,
,10,20,view,
bob,,20,view,
bob,10,soon,view,
bob,10,30,view,much
"""
ITEMS = "item_id,title,kind\n10,Ten,a\n9,Nine,a\n100,Hundred,b\n10,Again,b\n7,Seven,a\n"
USERS = "user_id,age,city\nann,30,Oslo\nzoe,20,Rome\nann,99,Bonn\n"


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_run_tasks(monkeypatch)


def config_of(folder: Path, *overrides: str, events: str = EVENTS, store: str = "store") -> tuple[Config, Storage]:
    for name, text in (("events", events), ("items", ITEMS), ("users", USERS)):
        (folder / f"{name}.csv").write_text(text)
    inputs = [f"data.{name}={folder / name}.csv" for name in ("events", "items", "users")]
    config = load_config(None, [f"storage.root={folder / store}", "data.num_shards=2", *inputs, *overrides])
    return config, Storage.from_config(config.storage)


def users_by_id(dataset: Dataset) -> dict[str, dict[str, Any]]:
    return {row["user_id"]: row for row in dataset.read_users().to_pylist()}


def test_a_small_table_gives_exactly_this_dataset(tmp_path: Path) -> None:
    dataset = prepare(*config_of(tmp_path))
    manifest = dataset.manifest
    assert (manifest.num_users, manifest.num_items, manifest.num_interactions, manifest.num_targets) == (2, 5, 6, 2)
    assert manifest.rejected == {
        "bad_time": 1,
        "bad_value": 1,
        "catalogue_duplicate": 1,
        "duplicate": 1,
        "null_item": 1,
        "null_user": 1,
        "user_duplicate": 1,
    }
    assert manifest.event_kinds == ("view", "click", "purchase")
    assert [task.name for task in manifest.tasks] == ["click", "purchase", "rating", "like"]
    assert manifest.has_time
    assert manifest.items_without_catalogue_entry == 1
    assert (manifest.value_mean, manifest.value_std) == (2.0, 1.0)
    items = dataset.catalogue.to_pydict()
    assert items["item_id"] == ["7", "8", "9", "10", "100"]
    assert items["title"] == ["Seven", "", "Nine", "Ten", "Hundred"]
    assert items["train_count"] == [1, 0, 1, 2, 0]
    users = users_by_id(dataset)
    assert users["ann"]["items"] == [1, 4, 3, 2]
    assert users["ann"]["events"] == [0, 0, 1, 2]
    assert users["ann"]["timestamps"] == [50, 100, 100, 200]
    assert users["ann"]["values"][0::2] == [2.0, 4.0]
    assert (users["ann"]["num_train"], users["ann"]["num_validation"]) == (2, 1)
    assert users["ann"]["attributes"] == [("age", "30"), ("city", "Oslo")]
    assert (users["bob"]["num_train"], users["bob"]["num_validation"]) == (2, 0)
    assert users["bob"]["attributes"] == []
    train = [row for shard in manifest.train_shards for row in dataset.read_shard(shard).to_pylist()]
    assert {(row["user_index"], tuple(row["items"]), row["first_target"]) for row in train} == {
        (users["ann"]["user_index"], (1, 4), 1),
        (users["bob"]["user_index"], (3, 4), 1),
    }
    assert sorted(user["user_index"] for user in users.values()) == [0, 1]


def test_shards_are_what_the_manifest_says_and_nothing_else_is_left(tmp_path: Path) -> None:
    dataset = prepare(*config_of(tmp_path, "data.row_group_rows=1", "data.num_shards=1"))
    manifest = dataset.manifest
    shards = [*manifest.train_shards, *manifest.users_shards, *manifest.catalogue_shards]
    shards += [*manifest.user_statistics_shards, *manifest.item_statistics_shards, *manifest.listed_shards]
    assert manifest.listed_shards
    for shard in shards:
        path = Path(join(dataset.uri, shard.path))
        assert (path.stat().st_size, sha256_of(path)) == (shard.num_bytes, shard.sha256)
        assert shard.row_groups == (1,) * pq.read_metadata(path).num_rows
    left = {entry.uri for entry in dataset.storage.list(dataset.uri)}
    assert left == {
        join(dataset.uri, MANIFEST_NAME),
        join(dataset.uri, DATASET.page_name),
        join(dataset.uri, DATASET.json_name),
        *(join(dataset.uri, shard.path) for shard in shards),
    }


def test_equal_input_gives_an_equal_fingerprint_wherever_it_lies(tmp_path: Path) -> None:
    datasets = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        datasets.append(prepare(*config_of(tmp_path / name)))
    assert datasets[0].uri != datasets[1].uri
    assert datasets[0].manifest.fingerprint == datasets[1].manifest.fingerprint
    changed = prepare(*config_of(tmp_path / "one", events=EVENTS.replace("bob,10,20", "bob,10,21")))
    assert changed.manifest.fingerprint != datasets[0].manifest.fingerprint


def test_a_second_run_does_no_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, storage = config_of(tmp_path)
    assert find_dataset(config, storage) is None
    made = prepare(config, storage)
    monkeypatch.delattr(prepare_module, "_run_passes")
    assert prepare(config, storage).uri == made.uri
    found = find_dataset(config, storage)
    assert found is not None
    assert found.manifest == made.manifest


def test_the_next_call_removes_what_a_run_left_that_was_killed_after_it_had_published(tmp_path: Path) -> None:
    config, storage = config_of(tmp_path)
    made = prepare(config, storage)
    before = {entry.uri for entry in storage.list(made.uri)}
    for left in ("staging/pieces/000000-000000.parquet", "users/.partial-1-00000.parquet"):
        (Path(made.uri) / left).parent.mkdir(parents=True, exist_ok=True)
        (Path(made.uri) / left).write_bytes(b"half")
    assert find_dataset(config, storage) is not None
    assert {str(path) for path in Path(made.uri).rglob("*") if path.is_file()} == before


def test_the_number_of_partitions_is_chosen_and_recorded(tmp_path: Path) -> None:
    config, storage = config_of(tmp_path)
    chosen = prepare(config.with_values({"data.num_shards": None}), storage)
    assert chosen.manifest.data_config["num_shards"] == 4
    assert prepare(config.with_values({"data.num_shards": 4}), storage).manifest.fingerprint == chosen.manifest.fingerprint


def test_shards_carry_the_etag_of_the_store_and_the_features_their_kinds(tmp_path: Path) -> None:
    dataset = prepare(*config_of(tmp_path))
    etags = {entry.uri: entry.etag for entry in dataset.storage.list(dataset.uri)}
    assert all(shard.etag == etags[dataset.address(shard)] for shard in dataset.manifest.users_shards)
    assert dataset.manifest.data_config["item_features"]["text"] == ["title"]
    assert dataset.manifest.data_config["item_features"]["categories"] == ["kind"]


def test_k_core_goes_on_until_nothing_changes(tmp_path: Path) -> None:
    pairs = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"), ("c", "y"), ("c", "z"), ("d", "z"), ("e", "w")]
    events = "user_id,item_id,position\n" + "".join(f"{user},{item},{number}\n" for number, (user, item) in enumerate(pairs))
    dataset = prepare(*config_of(tmp_path, "data.k_core=2", events=events))
    assert users_by_id(dataset).keys() == {"a", "b"}
    assert dataset.catalogue["item_id"].to_pylist() == ["x", "y"]
    assert dataset.manifest.rejected == {"catalogue_duplicate": 1, "k_core_item": 2, "k_core_user": 2, "user_duplicate": 1}
    assert not dataset.manifest.has_time


def test_time_split_cuts_at_the_moments(tmp_path: Path) -> None:
    dataset = prepare(*config_of(tmp_path, "data.split=time", "data.validation_from=100", "data.test_from=150"))
    counts = {user: (row["num_train"], row["num_validation"]) for user, row in users_by_id(dataset).items()}
    assert counts == {"ann": (1, 2), "bob": (2, 0)}


@pytest.mark.parametrize(
    ("events", "overrides", "message"),
    [
        ("user_id,item_id,timestamp\n", [], "has no rows"),
        (
            "user_id,item_id,timestamp\n,1,1\n",
            [],
            r"no interaction is left; rejected 1 row: the user id .*row 1: null; data\.columns\.user_id names",
        ),
        ("user_id,item_id,timestamp\na,1,1\nb,1,1\n", [], "no user has two training interactions"),
        ("user_id,item_id,timestamp\na,1,1\na,2,2\n", ["data.k_core=3"], "no interaction is left"),
        ("user_id,item_id,position\na,1,1\n", ["data.split=time", "data.validation_from=1", "data.test_from=2"], "no column 'timestamp'"),
        (EVENTS, ["data.events="], "data.events: is empty"),
        (EVENTS, ["data.columns.event=kind"], "has no column 'kind'"),
    ],
)
def test_input_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, events: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(*config_of(tmp_path, *overrides, events=events))


def test_too_many_event_kinds_are_refused(tmp_path: Path) -> None:
    events = "user_id,item_id,timestamp,event\n" + "".join(f"a,{number},1,kind{number}\n" for number in range(128))
    with pytest.raises(UserError, match="128 kinds"):
        prepare(*config_of(tmp_path, events=events))


def test_a_file_without_the_time_column_of_the_first_is_refused(tmp_path: Path) -> None:
    config, storage = config_of(tmp_path)
    folder = tmp_path / "log"
    folder.mkdir()
    (folder / "a.csv").write_text("user_id,item_id,timestamp\na,1,1\na,2,2\n")
    (folder / "b.csv").write_text("user_id,item_id,position\na,3,1\n")
    with pytest.raises(UserError, match=r"b\.csv: has no column for timestamp"):
        prepare(config.with_values({"data.events": str(folder)}), storage)


def test_the_synthetic_source_is_written_once_and_imported(tmp_path: Path) -> None:
    overrides = [f"storage.root={tmp_path}", "data.source=synthetic", "data.synthetic.num_users=30", "data.synthetic.num_items=20"]
    config = load_config(None, overrides)
    storage = Storage.from_config(config.storage)
    dataset = prepare(config, storage)
    assert dataset.manifest.num_users == 30
    assert dataset.manifest.event_kinds == ("view", "click", "purchase")
    assert dataset.manifest.number_columns == ("price",)
    assert {"group", "age"} == {name for name, _ in dataset.read_users()["attributes"].to_pylist()[0]}
    raw = {entry.uri: entry.etag for entry in storage.list(storage.uri("raw"))}
    prepare(config.with_values({"data.num_shards": 3}), storage)
    assert {entry.uri: entry.etag for entry in storage.list(storage.uri("raw"))} == raw
