"""Appended versions without Ray: exact tables by hand, properties of random logs split into days, and refusals."""

import json
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from recsys.config import load_config
from recsys.config.data import KindConfig
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.ingest.prepare import find_dataset, prepare
from recsys.store import Storage, sha256_of
from tests.without_ray import patch_run_tasks, run_once

Event = tuple[str, str, int, str, str]  # user, item, time, kind, value
FIRST: list[Event] = [
    ("ann", "i1", 10, "view", "1"),
    ("ann", "i2", 20, "click", "5"),
    ("ann", "i10", 30, "view", ""),
    ("ann", "i1", 40, "view", ""),
    ("bob", "i2", 10, "view", ""),
    ("bob", "i1", 20, "view", ""),
]
SECOND: list[Event] = [
    ("ann", "i9", 50, "click", "2"),
    ("ann", "i1", 10, "view", "1"),  # known
    ("ann", "i2", 35, "view", ""),  # late: before ann's newest known interaction
    ("ann", "i2", 60, "view", ""),
    ("cid", "i1", 5, "view", ""),
    ("cid", "i9", 6, "view", ""),
    ("bob", "i10", 30, "view", ""),
]
FEATURES = [f'data.item_features.{kind}=["{name}"]' for kind, name in (("text", "title"), ("categories", "kind"), ("numbers", "price"))]
ITEMS = "item_id,title,kind,price\ni1,One,a,1\ni2,Two,b,3\n"


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_run_tasks(monkeypatch, run_once)


def log(folder: Path, name: str, events: Sequence[Event]) -> str:
    path = folder / f"{name}.csv"
    path.write_text("user_id,item_id,timestamp,event,value\n" + "".join(",".join(map(str, event)) + "\n" for event in events))
    return str(path)


def made(folder: Path, *overrides: str) -> Dataset:
    config = load_config(None, [f"storage.root={folder / 'store'}", *overrides])
    return prepare(config, Storage.from_config(config.storage))


def first(folder: Path, *overrides: str, events: Sequence[Event] = FIRST, items: str = ITEMS) -> Dataset:
    (folder / "items.csv").write_text(items)
    inputs = [f"data.events={log(folder, 'first', events)}", f"data.items={folder / 'items.csv'}"]
    return made(folder, *inputs, "data.num_shards=2", "data.max_history=3", *FEATURES, *overrides)


def appended(base: Dataset, folder: Path, name: str, events: Sequence[Event], *overrides: str) -> Dataset:
    return made(folder, f"data.base={base.uri}", f"data.events={log(folder, name, events)}", *overrides)


def users_by_id(dataset: Dataset) -> dict[str, dict[str, Any]]:
    ids = dataset.catalogue["item_id"].to_pylist()
    rows = {row["user_id"]: row for row in dataset.read_users().to_pylist()}
    assert len(rows) == dataset.manifest.num_users
    assert [row["user_index"] for row in rows.values()] == list(range(len(rows)))
    return {user: {**row, "items": [ids[index - 1] for index in row["items"]]} for user, row in rows.items()}


def own_targets(dataset: Dataset) -> list[tuple[Any, ...]]:
    """Return the targets in the shards that this version wrote."""
    users = {row["user_index"]: user for user, row in users_by_id(dataset).items()}
    ids = dataset.catalogue["item_id"].to_pylist()
    rows = [row for shard in dataset.manifest.train_shards if not shard.dataset for row in dataset.read_shard(shard).to_pylist()]
    assert all(0 < row["first_target"] < len(row["items"]) <= dataset.manifest.data_config["max_history"] + 1 for row in rows)
    return [
        (users[row["user_index"]], ids[row["items"][place] - 1], row["timestamps"][place], row["events"][place])
        for row in rows
        for place in range(row["first_target"], len(row["items"]))
    ]


def content(dataset: Dataset) -> dict[str, tuple[str, str]]:
    return {found.uri: (found.etag, sha256_of(Path(found.uri))) for found in dataset.storage.list(dataset.uri)}


def test_a_day_gives_exactly_this_version_and_touches_nothing_of_its_base(tmp_path: Path) -> None:
    base = first(tmp_path)
    before = content(base)
    (tmp_path / "more.csv").write_text("item_id,title,kind,price\ni2,Two,b,3\ni1,Uno,c,2\ni9,Nine,a,\ni11,New,a,5\n")
    (tmp_path / "users.csv").write_text("user_id,age\nann,30\nzoe,9\n")
    day = appended(base, tmp_path, "second", SECOND, f"data.items={tmp_path}/more.csv", f"data.users={tmp_path}/users.csv")
    assert content(base) == before
    manifest = day.manifest
    assert (manifest.version, manifest.base) == (2, base.name)
    assert (manifest.num_users, manifest.num_items, manifest.num_interactions) == (3, 5, 12)
    assert manifest.rejected == {"known": 1}
    assert manifest.noticed["late"] == 1
    assert manifest.category_vocabulary == ("kind=a", "kind=b", "kind=c")
    assert (manifest.number_moments, manifest.value_mean) == (base.manifest.number_moments, base.manifest.value_mean)
    users = users_by_id(day)
    assert users["ann"]["items"] == ["i1", "i2", "i10", "i1", "i2", "i9", "i2"]
    assert users["ann"]["timestamps"] == [10, 20, 30, 40, 35, 50, 60]
    assert (users["ann"]["num_train"], users["ann"]["num_validation"]) == (5, 1)
    assert users["ann"]["attributes"] == [("age", "30")]
    assert (users["bob"]["num_train"], users["cid"]["num_train"]) == (2, 2)  # bob's second interaction was a training target already
    assert {user: users[user]["user_index"] for user in ("ann", "bob")} == {
        user: row["user_index"] for user, row in users_by_id(base).items()
    }
    assert sorted(own_targets(day)) == [("ann", "i2", 35, 0), ("cid", "i9", 6, 0)]
    assert manifest.num_targets == base.manifest.num_targets + 2
    items = {row["item_id"]: row for row in day.catalogue.to_pylist()}
    assert list(items) == ["i1", "i2", "i10", "i9", "i11"]
    assert [items[item]["title"] for item in ("i1", "i2", "i9", "i10")] == ["Uno", "Two", "Nine", ""]
    assert (items["i1"]["categories"], items["i1"]["numbers"], items["i11"]["numbers"]) == ([3], [0.0], [3.0])
    assert {item: row["train_count"] for item, row in items.items()} == {"i1": 4, "i2": 3, "i10": 1, "i9": 1, "i11": 0}
    changed = [row["item_id"] for shard in manifest.catalogue_shards if not shard.dataset for row in day.read_shard(shard).to_pylist()]
    assert changed == ["i1", "i9", "i11"]
    partial = day.read_users(["items"])
    assert partial.column_names == ["items"]
    assert partial["items"].to_pylist() == day.read_users()["items"].to_pylist()


def test_versions_form_a_tree_and_are_found_again(tmp_path: Path) -> None:
    base = first(tmp_path)
    second = appended(base, tmp_path, "second", SECOND)
    third = appended(second, tmp_path, "third", [("ann", "i77", 70, "view", "")])
    sibling = appended(base, tmp_path, "other", [("dan", "i1", 70, "view", ""), ("dan", "i2", 71, "view", "")])
    assert [dataset.manifest.version for dataset in (second, third, sibling)] == [2, 3, 2]
    assert len({dataset.manifest.fingerprint for dataset in (base, second, third, sibling)}) == 4
    assert users_by_id(third)["ann"]["items"][-1] == "i77"
    assert users_by_id(third)["bob"]["items"] == users_by_id(second)["bob"]["items"] == ["i2", "i1", "i10"]
    assert users_by_id(sibling).keys() == {"ann", "bob", "dan"}
    config = load_config(None, [f"storage.root={tmp_path}/store", f"data.base={base.uri}", f"data.events={tmp_path}/second.csv"])
    found = find_dataset(config, base.storage)
    assert found is not None
    assert found.manifest == prepare(config, base.storage).manifest == second.manifest
    assert all(Path(third.address(shard)).exists() for shard in (*third.manifest.users_shards, *third.manifest.train_shards))


def test_the_fingerprint_does_not_tell_where_versions_lie(tmp_path: Path) -> None:
    prints = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        prints.add(appended(first(tmp_path / name), tmp_path / name, "second", SECOND).manifest.fingerprint)
    assert len(prints) == 1


def test_under_a_time_split_what_comes_late_behind_held_out_interactions_is_held_out(tmp_path: Path) -> None:
    base = first(tmp_path, "data.split=time", "data.validation_from=25", "data.test_from=35")
    assert users_by_id(base)["ann"]["num_train"] == 2
    day = appended(base, tmp_path, "second", [("ann", "i9", 12, "view", ""), ("bob", "i9", 12, "view", "")])
    users = users_by_id(day)
    assert (users["ann"]["num_train"], users["bob"]["num_train"]) == (2, 3)
    assert own_targets(day) == [("bob", "i9", 12, 0)]


@pytest.mark.parametrize(
    ("overrides", "events", "message"),
    [
        (["data.max_history=7"], SECOND, r"data\.max_history = 7: the base dataset was made with 3"),
        (["data.cleaning.min_value=2"], SECOND, r"data\.cleaning\.min_value = 2\.0: the base dataset was made with None"),
        ([], [("ann", "i1", 90, "purchase", "")], "event kind 'purchase', which the base dataset does not have; it has view, click"),
        ([], FIRST, r"no interaction is left; rejected 6 rows: .*\(known\)"),
        (["data.base=/nowhere"], SECOND, "data.base = /nowhere: has no manifest.json"),
    ],
)
def test_what_a_base_does_not_allow_is_refused_in_one_line(tmp_path: Path, overrides: list[str], events: list[Event], message: str) -> None:
    base = first(tmp_path)
    with pytest.raises(UserError, match=message):
        appended(base, tmp_path, "second", events, *overrides)


def test_other_item_features_and_another_order_are_refused(tmp_path: Path) -> None:
    base = made(tmp_path, f"data.events={log(tmp_path, 'bare', FIRST)}")
    (tmp_path / "items.csv").write_text(ITEMS)
    with pytest.raises(UserError, match=r"data\.items: the base dataset was made without the item features title, kind, price"):
        appended(base, tmp_path, "second", SECOND, f"data.items={tmp_path}/items.csv")
    (tmp_path / "positions.csv").write_text("user_id,item_id,position\nann,i1,9\n")
    with pytest.raises(UserError, match="orders events by position; the base dataset orders them by timestamp"):
        made(tmp_path, f"data.base={base.uri}", f"data.events={tmp_path}/positions.csv")
    other = Storage(str(tmp_path / "elsewhere"))
    config = load_config(None, [f"storage.root={other.root}", f"data.base={base.uri}", f"data.events={tmp_path}/second.csv"])
    with pytest.raises(UserError, match="all versions are stored in one folder"):
        prepare(config, other)


KINDS = ("view", "click")
events_of_a_log = st.lists(
    st.tuples(st.sampled_from("abcde"), st.integers(0, 12), st.integers(0, 40), st.sampled_from(KINDS)), min_size=1, max_size=40
)


def cut(rows: list[tuple[str, int, int, str]], num_days: int, is_sorted: bool) -> Iterator[list[Event]]:
    rows = sorted(rows, key=lambda row: row[2]) if is_sorted else rows
    size = -(-len(rows) // num_days)
    for begin in range(0, len(rows), size):
        yield [(user, f"i{item}", time, kind, str(time % 5)) for user, item, time, kind in rows[begin : begin + size]]


def check_days_add_up(rows: list[tuple[str, int, int, str]], num_days: int, is_sorted: bool, split: str) -> None:
    folder = Path(tempfile.mkdtemp())
    everything: list[Event] = [("z", f"i{index}", index, KINDS[index % 2], "1") for index in range(4)]
    how = [f"data.split={split}", *(["data.validation_from=20", "data.test_from=30"] if split == "time" else [])]
    version = first(folder, *how, events=everything)
    trained: Counter[str] = Counter()
    targets = own_targets(version)
    assert sorted(targets) == sorted(targets_of({}, version))
    for number, day in enumerate(cut(rows, num_days, is_sorted)):
        known = users_by_id(version)
        trained |= Counter({user: row["num_train"] for user, row in known.items()})
        if not {event[:4] for event in day} - {event[:4] for event in everything}:
            continue
        version = appended(version, folder, f"day{number}", day)
        everything += day
        new = own_targets(version)
        assert sorted(new) == sorted(targets_of(known, version))
        targets += new
    assert len(targets) == len(set(targets)) == version.manifest.num_targets
    whole = first(folder, *how, events=everything)
    assert sequences(version, is_ordered=is_sorted) == sequences(whole, is_ordered=is_sorted)
    assert (version.manifest.num_interactions, version.manifest.num_users) == (whole.manifest.num_interactions, whole.manifest.num_users)
    users = users_by_id(version)
    trained_on = Counter(item for row in users.values() for item in row["items"][: row["num_train"]])
    assert {item: count for item, count in train_counts(version).items() if count} == trained_on
    for user, row in users_by_id(whole).items() if is_sorted else ():
        num_train = max(row["num_train"], trained[user])  # the split rule, except for interactions that an older version trained on
        assert (users[user]["num_train"], users[user]["num_train"] + users[user]["num_validation"]) == (
            num_train,
            row["num_train"] + row["num_validation"],
        )
    shutil.rmtree(folder)


on_drawn_days = given(
    rows=events_of_a_log, num_days=st.integers(1, 4), is_sorted=st.booleans(), split=st.sampled_from(["leave_one_out", "time", "random"])
)
phases = [Phase.explicit, Phase.reuse, Phase.generate]  # no shrinking of failing examples, since each attempt takes seconds


@settings(max_examples=4, phases=phases)
@on_drawn_days
def test_days_add_up_to_one_preparation_and_no_interaction_is_a_target_twice(
    rows: list[tuple[str, int, int, str]], num_days: int, is_sorted: bool, split: str
) -> None:
    check_days_add_up(rows, num_days, is_sorted, split)


@pytest.mark.slow
@settings(max_examples=20, phases=phases)
@on_drawn_days
def test_so_do_many_more_days(rows: list[tuple[str, int, int, str]], num_days: int, is_sorted: bool, split: str) -> None:
    check_days_add_up(rows, num_days, is_sorted, split)


def targets_of(known: dict[str, dict[str, Any]], version: Dataset) -> list[tuple[Any, ...]]:
    """Return the expected targets in a version's shards, from its users and those known before."""
    found = []
    for user, row in users_by_id(version).items():
        # In a random split, new training interactions follow the former training interactions; otherwise all known interactions.
        is_drawn = version.manifest.data_config["split"] == "random"
        begin = max(1, (known[user]["num_train"] if is_drawn else len(known[user]["items"])) if user in known else 0)
        found += [(user, row["items"][place], row["timestamps"][place], row["events"][place]) for place in range(begin, row["num_train"])]
    return found


def sequences(dataset: Dataset, is_ordered: bool) -> dict[str, list[tuple[Any, ...]]]:
    users = users_by_id(dataset)
    rows = {
        user: list(zip(*(row[name] for name in ("items", "timestamps", "events", "values")), strict=True)) for user, row in users.items()
    }
    return rows if is_ordered else {user: sorted(row) for user, row in rows.items()}


def train_counts(dataset: Dataset) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for row in dataset.catalogue.to_pylist():
        counts[row["item_id"]] = row["train_count"]
    return counts


def test_kinds_of_a_base_from_before_roles_stay_positive(tmp_path: Path) -> None:
    events = [(user, item, time, "impression", value) for user, item, time, _, value in FIRST]
    base = first(tmp_path, 'data.kinds={impression = {role = "positive"}}', events=events)
    address = f"{base.uri}/manifest.json"
    manifest = json.loads(base.storage.read_bytes(address))
    del manifest["data_config"]["kinds"]
    base.storage.write_bytes(address, json.dumps(manifest).encode())
    day = log(tmp_path, "day", [("ann", "i9", 50, "impression", ""), ("ann", "i2", 60, "impression", "")])
    dataset = made(tmp_path, f"data.base={base.uri}", f"data.events={day}")
    assert dataset.manifest.num_interactions == base.manifest.num_interactions + 2
    rows = dataset.read_users(["user_id", "items"]).to_pylist()
    assert len(next(row["items"] for row in rows if row["user_id"] == "ann")) == 6
    assert dataset.manifest.data_config["kinds"] == {"impression": KindConfig(role="positive").model_dump()}
