"""The use of each catalogue column, or the reason why it is not used."""

import json
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config.data import ColumnsConfig, DataConfig, ItemFeaturesConfig
from recsys.errors import UserError
from recsys.ingest.sources.column_mapping import Items, import_events, import_items, import_users
from recsys.ingest.sources.formats import plan_parts
from recsys.ingest.sources.input_files import find_files
from recsys.ingest.sources.item_columns import is_index_name, title_column
from recsys.store import Storage

IDS = ["a", "b", "c"]


def catalogue(folder: Path, columns: dict[str, Any], **features: Any) -> Items:
    pq.write_table(pa.table({"item_id": IDS, **columns}), folder / "items.parquet")
    return read_items(folder, **features)


def read_items(folder: Path, **features: Any) -> Items:
    storage = Storage(str(folder))
    data = DataConfig(item_features=ItemFeaturesConfig(**features))
    return import_items(storage, find_files(storage, "items", str(folder)), data)


def unused(items: Items) -> dict[str, str]:
    return {use.name: use.reason for use in items.uses if not use.use}


@pytest.mark.parametrize(
    ("column", "kind", "values"),
    [
        (pa.array(["x y", "y z", "z x"], pa.large_string()), "text", ["x y", "y z", "z x"]),
        (pa.array([b"x", b"y", b"z"]), "text", ["x", "y", "z"]),
        (pa.array(["x", "x", None]), "categories", [["x"], ["x"], None]),
        (pa.array([True, False, None]), "categories", [["true"], ["false"], None]),
        (pa.array([1, 2, 3], pa.uint8()), "numbers", [1.0, 2.0, 3.0]),
        (pa.array([1.5, None, 3.0], pa.float32()), "numbers", [1.5, None, 3.0]),
        (pa.array([Decimal("1.50"), None, Decimal("3.00")]), "numbers", [1.5, None, 3.0]),
        (pa.array([date(1970, 1, 2), None, date(1970, 1, 3)]), "numbers", [1.0, None, 2.0]),
        (pa.array([datetime(1970, 1, 1, 1, tzinfo=UTC)] * 3), "numbers", [3600.0] * 3),
        (pa.array([time(1), time(2), None]), "numbers", [3600.0, 7200.0, None]),
        (pa.array([timedelta(minutes=1)] * 3), "numbers", [60.0] * 3),
        (pa.array([["p", "q"], [], None]), "categories", [["p", "q"], [], None]),
        (pa.array([[1, 2], [3], None], pa.large_list(pa.int64())), "categories", [["1", "2"], ["3"], None]),
        (pa.array([[b"p"], [b"q"], None]), "categories", [["p"], ["q"], None]),
        (pa.array([[["p"], ["q"]], [], None]), "categories", [["p", "q"], [], None]),
        (pa.array([[{"id": 1, "name": "p"}], [], None]), "categories", [["p"], [], None]),
        (pa.array([[0.5, 1.0], [], None]), "vectors", [[0.5, 1.0], None, None]),
        (pa.array([[0.5, 1.0]] * 3, pa.list_(pa.float32(), 2)), "vectors", [[0.5, 1.0]] * 3),
        (pa.array([[Decimal("0.5")]] * 3), "vectors", [[0.5]] * 3),
        (pa.array(['["p", "q"]', "[]", None]), "categories", [["p", "q"], [], None]),
        (pa.array(["[{'id': 28, 'name': 'Action'}]", "[]", ""]), "categories", [["Action"], [], None]),
    ],
)
def test_every_type_has_a_kind(tmp_path: Path, column: pa.Array, kind: str, values: list[Any]) -> None:
    items = catalogue(tmp_path, {"it": column})
    assert items.kinds == {"it": kind}
    assert items.rows["it"].to_pylist() == values


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.nulls(3), "it has no value"),
        (pa.array([None, None, None], pa.string()), "it has no value"),
        (pa.array([b"\xff", b"\x00", b"ok"]), "not text in UTF-8"),
        (pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())), "neither text nor numbers"),
        (pa.array([[date(2024, 1, 1)], [], None]), "lists of values that are neither text nor numbers"),
        (pa.array([[[("k", 1)]], [], None], pa.list_(pa.map_(pa.string(), pa.int64()))), "lists of values"),
    ],
)
def test_what_is_not_used_is_named_with_its_type(tmp_path: Path, column: pa.Array, reason: str) -> None:
    items = catalogue(tmp_path, {"it": column, "title": ["x", "y", "z"]})
    assert items.kinds == {"title": "text"}
    assert reason in unused(items)["it"]
    assert next(use.type for use in items.uses if use.name == "it").partition("<")[0] == str(column.type).partition("<")[0]


def test_fields_of_structs_are_columns(tmp_path: Path) -> None:
    prices = [{"amount": 1.5, "currency": "EUR", "of": {"shop": "s"}}, None, {"amount": 2.0, "currency": "EUR", "of": None}]
    items = catalogue(tmp_path, {"price": prices})
    assert items.kinds == {"price.amount": "numbers", "price.currency": "categories", "price.of.shop": "text"}
    assert items.rows["price.amount"].to_pylist() == [1.5, None, 2.0]


def test_objects_in_json_are_columns_unless_they_have_too_many_kinds_of_keys(tmp_path: Path) -> None:
    rows = [
        {"item_id": name, "price": {"amount": number}, "details": {f"key {name} {n}": n for n in range(20)}}
        for number, name in enumerate(IDS)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items = read_items(tmp_path)
    assert items.kinds == {"price.amount": "numbers"}
    assert "too many kinds of keys" in unused(items)["details"]


def test_lists_of_numbers_in_json_are_vectors_and_lists_of_objects_are_their_names(tmp_path: Path) -> None:
    rows = [
        {"item_id": name, "v": [0.5, 1, number], "g": [{"id": number, "name": "p"}], "n": [["p"], ["q"]], "codes": [number]}
        for number, name in enumerate(IDS)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    items = read_items(tmp_path)
    assert items.kinds == {"v": "vectors", "g": "categories", "n": "categories", "codes": "categories"}
    assert items.rows["v"].to_pylist()[1] == [0.5, 1.0, 1.0]
    assert items.rows["g"].to_pylist() == [["p"]] * 3
    assert items.rows["n"].to_pylist() == [["p", "q"]] * 3


def test_an_index_that_pandas_left_is_no_feature(tmp_path: Path) -> None:
    items = catalogue(tmp_path, {"title": ["x", "y", "z"], "__index_level_0__": [2, 0, 1], "index": [0, 1, 2]})
    assert items.kinds == {"title": "text"}
    assert unused(items) == {"__index_level_0__": "an index column written by pandas", "index": "an index column written by pandas"}
    (tmp_path / "items.parquet").unlink()
    (tmp_path / "items.csv").write_text(",item_id,title,index\n0,a,x,7\n1,b,y,9\n")
    items = read_items(tmp_path)
    assert items.kinds == {"title": "text", "index": "numbers"}
    assert unused(items) == {"Unnamed: 0": "an index column written by pandas"}
    assert [is_index_name(name) for name in ("", "Unnamed: 3", "__index_level_1__", "index", "unnamed")] == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("names", "title"),
    [
        (["description", "Title"], "Title"),
        (["name", "title"], "title"),
        (["brand", "Product Name"], "Product Name"),
        (["Book-Title", "brand_name"], "Book-Title"),
        (["description", "brand_name"], None),
        ([], None),
    ],
)
def test_the_column_of_titles_is_told_by_its_name(names: list[str], title: str | None) -> None:
    assert title_column(names) == title


def test_titles_are_text_though_they_repeat_or_read_as_numbers(tmp_path: Path) -> None:
    assert catalogue(tmp_path, {"title": ["x", "x", "x"]}).kinds == {"title": "text"}
    (tmp_path / "items.parquet").unlink()
    (tmp_path / "items.csv").write_text("item_id,year,title\na,1984,1984\nb,2012,2012\n")
    items = read_items(tmp_path)
    assert items.kinds == {"year": "numbers", "title": "text"}
    assert items.rows["title"].to_pylist() == ["1984", "2012"]


def test_vectors_of_unequal_length_are_one_line_with_column_and_row(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"items\.parquet: row 2: column 'v' has a vector of 1 numbers, where most rows have 2; .*ignored=\['v'\]"
    ):
        catalogue(tmp_path, {"v": [[0.5, 1.0], [2.0], [0.5, 1.0]]})
    items = catalogue(tmp_path, {"v": [[0.5, 1.0], [2.0], [0.5, 1.0]]}, ignored=("v",))
    assert unused(items) == {"v": "data.item_features.ignored names it"}
    with pytest.raises(UserError, match="column 'title' is not lists of numbers"):
        catalogue(tmp_path, {"title": ["x", "y", "z"]}, vectors=("title",))


def test_vectors_may_be_text(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text('item_id,v,w\na,"[0.5, 1]",1|2\nb,"[2,3]",3|4\nc,,\n')
    items = read_items(tmp_path, vectors=("v", "w"))
    assert items.rows["v"].to_pylist() == [[0.5, 1.0], [2.0, 3.0], None]
    assert items.rows["w"].to_pylist() == [[1.0, 2.0], [3.0, 4.0], None]


def test_ids_of_a_catalogue_are_alike_in_files_of_unlike_types(tmp_path: Path) -> None:
    pq.write_table(pa.table({"item_id": [4006381330001], "title": ["x"]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"item_id": [4006381330002.0, None], "title": ["y", "z"]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"item_id": ["4006381330003"], "title": ["z"], "price": [1.0]}), tmp_path / "2.parquet")
    items = read_items(tmp_path)
    assert items.rows["item_id"].to_pylist() == ["4006381330001", "4006381330002", None, "4006381330003"]
    assert items.kinds == {"title": "text", "price": "numbers"}
    assert next(use.reason for use in items.uses if use.name == "price") == "1 of 3 files have it"


def test_configured_columns_leave_the_others_named(tmp_path: Path) -> None:
    items = catalogue(tmp_path, {"title": ["x", "y", "z"], "price": [1, 2, 3]}, text=("title",))
    assert unused(items) == {"price": "data.item_features names the columns that are used, and not this one"}
    assert [use.reason for use in items.uses if use.use] == ["", ""]
    flags = catalogue(tmp_path, {"is_new": [True, False, None]}, numbers=("is_new",))
    assert flags.rows["is_new"].to_pylist() == [1.0, 0.0, None]


def test_columns_of_events_and_users_are_named_too(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    (tmp_path / "events").mkdir()
    (tmp_path / "users").mkdir()
    table = {"user_id": ["u"], "item_id": ["i"], "timestamp": [1], "position": [1], "device": ["x"], "__index_level_0__": [0]}
    pq.write_table(pa.table(table), tmp_path / "events" / "a.parquet")
    users = {
        "user_id": ["u"],
        "age": [Decimal("3.0")],
        "tags": [["p", "q"]],
        "photo": [b"\xff"],
        "map": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())),
        "home": [{"city": "Oslo"}],
        "__index_level_0__": [0],
    }
    pq.write_table(pa.table(users), tmp_path / "users" / "a.parquet")

    def parts(role: str) -> Any:
        return plan_parts(storage, find_files(storage, role, str(tmp_path / role)))

    events = import_events(storage, parts("events")[0], DataConfig(), "timestamp")
    assert {use.name: use.use or use.reason for use in events.uses} == {
        "user_id": "user_id",
        "item_id": "item_id",
        "timestamp": "timestamp",
        "position": "the order comes from the time",
        "device": "events do not use it",
        "__index_level_0__": "an index column written by pandas",
    }
    read = import_users(storage, parts("users")[0], DataConfig(columns=ColumnsConfig()))
    assert {use.name: use.use or use.reason for use in read.uses} == {
        "user_id": "user_id",
        "age": "attribute",
        "tags": "attribute",
        "photo": "attribute",
        "map": "values of this type cannot be read as text",
        "home.city": "attribute",
        "__index_level_0__": "an index column written by pandas",
    }
    assert next(read.tables).to_pylist() == [
        {"user_id": "u", "age": "3", "tags": "p|q", "photo": "0xff", "home.city": "Oslo", "input_order": 0}
    ]


def test_a_column_that_is_twice_there_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(IDS), pa.array(["x"] * 3), pa.array(["y"] * 3)], ["item_id", "title", "title"])
    pq.write_table(table, tmp_path / "items.parquet")
    with pytest.raises(UserError, match="has two columns named 'title'"):
        read_items(tmp_path)
