"""Real-world files through a whole preparation: nothing fails silently, and the report names what is unusual."""

import json
import logging
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config import load_config
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.ingest.prepare import prepare
from recsys.report.pages import DATASET
from recsys.store import Storage, join
from tests.without_ray import patch_run_tasks, run_once

START = 1_700_000_000


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_run_tasks(monkeypatch, run_once)


def prepared(folder: Path, *overrides: str) -> Dataset:
    tables = [f"data.{role}={folder / role}" for role in ("events", "items", "users") if (folder / role).exists()]
    config = load_config(None, [f"storage.root={folder / 'store'}", "data.num_shards=2", *tables, *overrides])
    return prepare(config, Storage.from_config(config.storage))


def write(folder: Path, name: str, content: dict[str, Any] | str | bytes) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def histories(dataset: Dataset) -> dict[str, list[str]]:
    ids = dataset.catalogue["item_id"].to_pylist()
    return {row["user_id"]: [ids[index - 1] for index in row["items"]] for row in dataset.read_users().to_pylist()}


def titles(dataset: Dataset) -> dict[str, str]:
    return dict(zip(dataset.catalogue["item_id"].to_pylist(), dataset.catalogue["title"].to_pylist(), strict=True))


def report_of(dataset: Dataset) -> str:
    return dataset.storage.read_bytes(join(dataset.uri, DATASET.page_name)).decode()


def times(number: int) -> list[int]:
    return list(range(START, START + number))


@pytest.mark.parametrize("kind", [pa.decimal128(38, 0), pa.decimal128(38, 4), pa.decimal256(60, 0), pa.uint64(), pa.int64(), pa.string()])
def test_ids_that_differ_by_one_stay_two_whatever_carries_them(tmp_path: Path, kind: pa.DataType) -> None:
    low = 9_007_199_254_740_992
    users = pa.array([str(low)] * 5 + [str(low + 1)] * 5).cast(kind)
    write(tmp_path, "events/a.parquet", {"user_id": users, "item_id": [1, 2, 3, 4, 5, 5, 4, 3, 2, 1], "timestamp": times(10)})
    dataset = prepared(tmp_path)
    assert histories(dataset) == {str(low): ["1", "2", "3", "4", "5"], str(low + 1): ["5", "4", "3", "2", "1"]}
    assert (dataset.manifest.rejected, dataset.manifest.noticed) == ({}, {})


def test_codes_that_are_floats_in_some_files_are_those_of_the_catalogue(tmp_path: Path) -> None:
    codes = [4_006_381_330_001 + number for number in range(4)]
    write(tmp_path, "events/0.parquet", {"user_id": ["a"] * 5, "item_id": [*map(float, codes), None], "timestamp": times(5)})
    write(tmp_path, "events/1.parquet", {"user_id": ["b"] * 4, "item_id": codes, "timestamp": times(4)})
    rows = "".join(f"c,{code}.0,{START + place}\n" for place, code in enumerate(codes))
    write(tmp_path, "events/2.csv", f"user_id,item_id,timestamp\n{rows}")
    rows = "".join(
        json.dumps({"user_id": "d", "item_id": float(code), "timestamp": START + place}) + "\n" for place, code in enumerate(codes)
    )
    write(tmp_path, "events/3.jsonl", rows)
    write(tmp_path, "items/0.parquet", {"item_id": pa.array(codes, pa.int64()), "title": [f"Thing {code}" for code in codes]})
    dataset = prepared(tmp_path)
    assert histories(dataset) == {user: list(map(str, codes)) for user in "abcd"}
    assert titles(dataset) == {str(code): f"Thing {code}" for code in codes}
    assert (dataset.manifest.rejected, dataset.manifest.noticed, dataset.manifest.warnings) == ({"null_item": 1}, {}, ())
    example = dataset.manifest.rejected_examples["null_item"][0]
    assert (example.file, example.row, example.value) == (str(tmp_path / "events/0.parquet"), 5, "null")


def test_the_night_when_clocks_go_back_and_text_that_ends_with_utc(tmp_path: Path) -> None:
    begin = 1_698_532_200
    moments = [datetime.fromtimestamp(begin + 3600 * hour, ZoneInfo("Europe/Berlin")) for hour in range(6)]
    stamps = pa.array([moment.timestamp() * 10**6 for moment in moments]).cast(pa.int64()).cast(pa.timestamp("us", "Europe/Berlin"))
    write(tmp_path, "events/0.parquet", {"user_id": ["a"] * 6, "item_id": list("uvwxyz"), "timestamp": stamps})
    rows = "".join(
        f"b,{item},{moment.astimezone(ZoneInfo('UTC')):%Y-%m-%d %H:%M:%S} UTC\n" for item, moment in zip("uvwxyz", moments, strict=True)
    )
    write(tmp_path, "events/1.csv", f"user_id,item_id,timestamp\n{rows}")
    dataset = prepared(tmp_path)
    found = {row["user_id"]: row["timestamps"] for row in dataset.read_users().to_pylist()}
    assert found == {user: [begin + 3600 * hour for hour in range(6)] for user in "ab"}
    assert (dataset.manifest.rejected, dataset.manifest.time_unit) == ({}, "")


@pytest.mark.parametrize(("unit", "factor"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_units_are_told_by_their_digits_and_said_so(tmp_path: Path, unit: str, factor: int) -> None:
    write(tmp_path, "events/a.parquet", {"user_id": ["a"] * 4, "item_id": [1, 2, 3, 4], "timestamp": [time * factor for time in times(4)]})
    dataset = prepared(tmp_path)
    assert dataset.read_users()["timestamps"].to_pylist() == [times(4)]
    assert dataset.manifest.time_unit == unit
    assert f"read as {dict(s='seconds', ms='milliseconds', us='microseconds', ns='nanoseconds')[unit]}" in report_of(dataset)


def test_rows_that_disagree_about_the_unit_are_one_line(tmp_path: Path) -> None:
    write(tmp_path, "events/0.parquet", {"user_id": ["a"] * 4, "item_id": [1, 2, 3, 4], "timestamp": times(4)})
    write(tmp_path, "events/1.parquet", {"user_id": ["b"] * 2, "item_id": [1, 2], "timestamp": [0, START * 1000]})
    with pytest.raises(UserError, match=rf"1\.parquet: row 2: the time {START}000 is not in seconds, .*set data\.time_unit"):
        prepared(tmp_path)
    assert prepared(tmp_path, "data.time_unit=s").manifest.rejected == {"future_time": 1}


def test_a_row_index_is_no_feature_and_the_names_in_structs_are_categories(tmp_path: Path) -> None:
    items = [f"i{number}" for number in range(6)]
    write(tmp_path, "events/a.parquet", {"user_id": ["a"] * 6, "item_id": items, "timestamp": times(6)})
    genres = [[{"id": number % 2, "name": "AB"[number % 2]}] for number in range(6)]
    catalogue = {"item_id": items, "about": [f"About {item}, at length" for item in items], "name": [f"Lamp {item}" for item in items]}
    maps = pa.array([[("k", 1)]] * 6, pa.map_(pa.string(), pa.int64()))
    write(tmp_path, "items/a.parquet", {**catalogue, "genres": genres, "__index_level_0__": [4, 2, 0, 1, 3, 5], "m": maps})
    dataset = prepared(tmp_path)
    assert titles(dataset) == {item: f"Lamp {item}" for item in items}
    assert dataset.manifest.category_vocabulary == ("genres=A", "genres=B")
    assert dataset.manifest.number_columns == ()
    named = {use.name: use.reason for use in dataset.manifest.columns if not use.use}
    assert named.keys() == {"__index_level_0__", "m"}
    report = report_of(dataset)
    assert "__index_level_0__" in report
    assert "map&lt;string, int64" in report


@pytest.mark.parametrize(
    ("content", "rejected"),
    [
        ('"User-ID";"ISBN";"Book-Rating";"n"\n"7";"000X";"0";"0"\n"7";"001X";"1";"1"\n"7";"002X";"2";"2"\n"7";"003X";"3";"3"\n', {}),
        ("User-ID\tISBN\tBook-Rating\tn\n7\t000X\t0\t0\n7\t001X\t1\t1\n7\t002X\t2\t2\n7\t003X\t3\t3\n", {}),
        ("User-ID|ISBN|Book-Rating|n\n7|000X|0|0\n7|001X|1|1\n7|002X|2|2\n7|003X|3|3\n7|004X|x|4\n", {"bad_value": 1}),
    ],
)
def test_dialects_are_read_without_configuration(tmp_path: Path, content: str, rejected: dict[str, int]) -> None:
    write(tmp_path, "events/a.csv", content)
    names = [f"data.columns.{name}" for name in ("user_id=User-ID", "item_id=ISBN", "value=Book-Rating", "position=n")]
    dataset = prepared(tmp_path, *names)
    assert histories(dataset) == {"7": ["000X", "001X", "002X", "003X"]}
    assert dataset.read_users()["values"].to_pylist() == [[0.0, 1.0, 2.0, 3.0]]
    assert dataset.manifest.rejected == rejected


def test_events_and_catalogue_that_speak_of_other_items_are_warned_of_with_examples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "events/a.parquet", {"user_id": ["a"] * 4, "item_id": ["sku-1", "sku-2", "sku-3", "x"], "timestamp": times(4)})
    write(tmp_path, "items/a.parquet", {"item_id": ["1", "2", "3", "x"], "title": list("pqrs")})
    write(tmp_path, "users/a.parquet", {"user_id": ["A"], "age": [1]})
    with caplog.at_level(logging.WARNING):
        dataset = prepared(tmp_path)
    of_items, of_users = dataset.manifest.warnings
    assert "3 of 4 items of the events are not in the items table, such as 'sku-1', 'sku-2', 'sku-3'" in of_items
    assert "the table has items such as '1', '2', '3'" in of_items
    assert "1 of 1 users of the events are not in the users table, such as 'a'; the table has users such as 'A'" in of_users
    assert of_items in caplog.text
    assert "sku-1" in report_of(dataset)


def test_a_catalogue_that_hardly_occurs_is_warned_of(tmp_path: Path) -> None:
    write(tmp_path, "events/a.parquet", {"user_id": ["a"] * 4, "item_id": ["1", "2", "3", "3"], "timestamp": times(4)})
    write(tmp_path, "items/a.parquet", {"item_id": [str(number) for number in range(1, 9)], "title": list("pqrstuvw")})
    assert "5 of 8 items of the items table are in no event, such as '4', '5', '6'" in prepared(tmp_path).manifest.warnings[0]


def test_refused_rows_are_shown_by_rule_with_file_row_and_value(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = "".join(f"a,{item},{START + place},3\n" for place, item in enumerate("uvwxyz"))
    bad = f"a,u,soon,3\n,u,{START},3\na,v,{START},many\na,w,later,1\na,x,never,1\na,y,9 pm,1\n{'i' * 600},u,{START},1\n"
    write(tmp_path, "events/a.csv", f"user_id,item_id,timestamp,value\n{good}{bad}")
    with caplog.at_level(logging.INFO):
        dataset = prepared(tmp_path)
    assert dataset.manifest.rejected == {"bad_time": 4, "bad_value": 1, "long_id": 1, "null_user": 1}
    shown = {rule: [(each.row, each.value) for each in found] for rule, found in dataset.manifest.rejected_examples.items()}
    assert shown == {
        "bad_time": [(7, "'soon'"), (10, "'later'"), (11, "'never'")],
        "bad_value": [(9, "'many'")],
        "long_id": [(13, f"'{'i' * 60}...' (600 characters)")],
        "null_user": [(8, "null")],
    }
    assert f"bad_time), such as {tmp_path / 'events/a.csv'} row 7: 'soon'; " in caplog.text
    for text in ("row 7", "soon", "never", "many"):
        assert text in report_of(dataset)


@pytest.mark.parametrize(
    ("content", "overrides", "remedy"),
    [
        ("user_id,item_id,timestamp\na,u,01.02.2020\nb,u,01.02.2020\n", [], "row 1: '01.02.2020'; row"),
        ("user_id,item_id,timestamp\na,u,01.02.2020\n", [], "write times as 2024-01-31T12:00:00Z"),
        (f"user_id,item_id,timestamp\na,u,{START}000\n", ["data.time_unit=s"], "data.time_unit says what times are counted in"),
        ("user_id,item_id,timestamp,value\na,u,1,good\n", [], "data.columns.value='' reads none"),
        ("user_id,item_id,timestamp,event\na,u,1,\n", [], "data.columns.event='' reads none"),
        ("user_id,item_id,timestamp\n,u,1\n", [], "data.columns.user_id names the column"),
    ],
)
def test_where_one_reason_refuses_all_rows_the_line_says_what_would_take_them(
    tmp_path: Path, content: str, overrides: list[str], remedy: str
) -> None:
    write(tmp_path, "events/a.csv", content)
    with pytest.raises(UserError) as error:
        prepared(tmp_path, *overrides)
    assert remedy.removesuffix("; row") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_with_many_oddities_at_once_is_read_and_its_report_names_all(tmp_path: Path) -> None:
    codes = [4_006_381_330_000 + number for number in range(8)]
    rows = "".join(f'"a";"{code}.0";"{(START + place) * 1000}";"{place}";"phone"\n' for place, code in enumerate(codes))
    bad = f'"a";"";"{START * 1000}";"1";"phone"\n"a";"{codes[0]}.0";"yesterday";"1";"phone"\n'
    write(tmp_path, "events.csv", f'"user_id";"item_id";"timestamp";"value";"device"\n{rows}{bad}')
    catalogue = {
        "item_id": pa.array(list(map(str, codes))).cast(pa.decimal128(38, 0)),
        "about": [f"All there is to say of {code}" for code in codes],
        "title": [f"Thing {code}" for code in codes],
        "genres": [[{"id": 1, "name": "A"}]] * 8,
        "picture": [b"\xff\xd8"] * 8,
        "__index_level_0__": codes[::-1],
    }
    write(tmp_path, "items.parquet", catalogue)
    write(tmp_path, "users.csv", ",user_id,age\n0,b,30\n")
    dataset = prepared(tmp_path, f"data.folder={tmp_path}")
    manifest = dataset.manifest
    assert histories(dataset) == {"a": list(map(str, codes))}
    assert titles(dataset)[str(codes[0])] == f"Thing {codes[0]}"
    assert (manifest.category_vocabulary, manifest.number_columns) == (("genres=A",), ())
    assert manifest.rejected == {"bad_time": 1, "null_item": 1}
    report = report_of(dataset)
    for named in (
        "milliseconds",
        "device",
        "picture",
        "__index_level_0__",
        "Unnamed: 0",
        "yesterday",
        "row 9",
        "are not in the users table",
    ):
        assert named in report, named


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_one_list_among_json_values_costs_its_own_row_alone(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"user_id": "a", "item_id": item, "timestamp": START + item, "value": 1} for item in range(6)]
    rows += [
        {"user_id": "a", "item_id": 9, "timestamp": START, "value": [1]},
        {"user_id": "a", "item_id": float("nan"), "timestamp": START},
    ]
    write(tmp_path, "events/a.jsonl", jsonl(rows))
    dataset = prepared(tmp_path)
    assert dataset.manifest.rejected == {"bad_value": 1, "null_item": 1}
    assert dataset.manifest.rejected_examples["bad_value"][0].value == "'[1]'"


def test_vectors_of_whole_numbers_in_one_file_are_vectors(tmp_path: Path) -> None:
    write(tmp_path, "events/a.parquet", {"user_id": ["a"] * 4, "item_id": ["1", "2", "3", "4"], "timestamp": times(4)})
    write(tmp_path, "items/0.jsonl", jsonl([{"item_id": item, "emb": [item, 2], "tags": [item]} for item in (1, 2)]))
    write(tmp_path, "items/1.jsonl", jsonl([{"item_id": item, "emb": [0.5, item], "tags": [item]} for item in (3, 4)]))
    dataset = prepared(tmp_path)
    assert dataset.manifest.vector_size == 2
    assert dataset.catalogue["vector"].to_pylist() == [[1.0, 2.0], [2.0, 2.0], [0.5, 3.0], [0.5, 4.0]]
    assert dataset.manifest.category_vocabulary == ("tags=1", "tags=2", "tags=3", "tags=4")


def test_keys_that_come_late_in_a_catalogue_are_columns(tmp_path: Path) -> None:
    write(tmp_path, "events/a.parquet", {"user_id": ["a"] * 4, "item_id": [1, 2, 3, 4], "timestamp": times(4)})
    write(tmp_path, "items/a.jsonl", jsonl([{"item_id": item, "brand": "b" if item == 1001 else None} for item in range(1, 1002)]))
    assert [use.use for use in prepared(tmp_path).manifest.columns if use.name == "brand"] == ["text"]


def test_columns_that_are_named_like_ours(tmp_path: Path) -> None:
    write(tmp_path, "events/a.parquet", {"user_id": ["a"] * 4, "sku": [1, 2, 3, 4], "timestamp": times(4)})
    write(tmp_path, "items/a.parquet", {"sku": [1, 2, 3, 4], "item_id": [9, 9, 9, 9], "input_order": [1, 2, 3, 4], "title": list("wxyz")})
    write(tmp_path, "users/a.parquet", {"user_id": ["a"], "input_order": [5], "age": [3]})
    dataset = prepared(tmp_path, "data.columns.item_id=sku")
    assert titles(dataset) == {"1": "w", "2": "x", "3": "y", "4": "z"}
    assert {use.name for use in dataset.manifest.columns if not use.use} == {"item_id", "input_order"}
    events = [f"data.events={tmp_path / 'items'}", "data.columns.user_id=item_id", "data.columns.timestamp=input_order"]
    with pytest.raises(UserError, match="reserved for the row number; rename it"):
        prepared(tmp_path, "data.columns.item_id=sku", *events)


@pytest.mark.parametrize(
    ("column", "overrides", "message"),
    [
        (["$1.50", "$2"], ["data.item_features.numbers=['it']"], r"column 'it' has no number in any row; it has values such as '\$1\.50'"),
        ([[("k", "v")], []], ["data.item_features.text=['it']"], r"data\.item_features\.text: column 'it' \(map<.*cannot be read as text"),
    ],
)
def test_a_kind_that_a_column_cannot_have_is_one_line(tmp_path: Path, column: list[Any], overrides: list[str], message: str) -> None:
    write(tmp_path, "events/a.parquet", {"user_id": ["a"] * 4, "item_id": [1, 2, 1, 2], "timestamp": times(4)})
    kind = pa.map_(pa.string(), pa.string()) if isinstance(column[0], list) else pa.string()
    write(tmp_path, "items/a.parquet", {"item_id": [1, 2], "it": pa.array(column, kind)})
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, *overrides)
    write(tmp_path, "items/a.parquet", {"item_id": pa.array([[], []], pa.list_(pa.int64())), "it": ["x", "y"]})
    with pytest.raises(UserError, match=r"column 'item_id': list<.*cannot be read as text"):
        prepared(tmp_path)


def test_where_too_little_is_left_the_line_tells_what_went(tmp_path: Path) -> None:
    rows = "".join(f"a,{item},{item}.2.2020\n" for item in range(3, 9))
    write(tmp_path, "events/a.csv", f"user_id,item_id,timestamp\n{rows}a,1,2020-02-03\n")
    with pytest.raises(UserError, match=r"no user has two training interactions.*rejected 6 rows: .*bad_time.*'3\.2\.2020'"):
        prepared(tmp_path)


def test_examples_show_what_the_file_has(tmp_path: Path) -> None:
    rows = "".join(f"a,{item},{START + item},1\n" for item in range(5))
    write(tmp_path, "events/a.csv", f"user_id,item_id,timestamp,value\n{rows}a,7,2150-01-01,1\na,8,{START},4.7\n")
    examples = prepared(tmp_path, "data.cleaning.max_value=4").manifest.rejected_examples
    assert {rule: found[0].value for rule, found in examples.items()} == {"future_time": "'2150-01-01'", "outlier_value": "'4.7'"}


def test_the_density_is_that_of_distinct_pairs(tmp_path: Path) -> None:
    write(tmp_path, "events/a.parquet", {"user_id": ["a"] * 6, "item_id": ["x", "y", "x", "x", "x", "z"], "timestamp": times(6)})
    assert ">100.00%<" in report_of(prepared(tmp_path))  # one user has had all three items; six interactions are no 200 %


def test_values_and_kinds_need_not_be_read(tmp_path: Path) -> None:
    write(tmp_path, "events/a.csv", "user_id,item_id,timestamp,value,event\n" + "".join(f"a,{item},{START},good,\n" for item in "uvwx"))
    dataset = prepared(tmp_path, "data.columns.value=", "data.columns.event=")
    assert (dataset.manifest.num_interactions, dataset.manifest.rejected) == (4, {})
    assert {use.name for use in dataset.manifest.columns if not use.use} == {"value", "event"}


def test_pseudonymous_users_are_in_no_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "k" * 32)
    secret = "secret-" * 100
    rows = "".join(f"a,{item},{START + place}\n" for place, item in enumerate("uvwx"))
    write(tmp_path, "events/a.csv", f"user_id,item_id,timestamp\n{rows}{secret},u,{START}\n")
    dataset = prepared(tmp_path, "data.pseudonym_key_env=TEST_KEY")
    assert dataset.manifest.rejected == {"long_id": 1}
    assert "secret" not in dataset.manifest.model_dump_json()
