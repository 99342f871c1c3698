"""Importers: every format gives the same rows, and an unusable file gives a one-line error with the reason."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as arrow_csv
import pyarrow.parquet as pq
import pytest

from recsys.config.data import ColumnsConfig, DataConfig, ItemFeaturesConfig
from recsys.errors import UserError
from recsys.ingest.clean.cleaning import cast_events
from recsys.ingest.sources import formats, lines
from recsys.ingest.sources.column_mapping import find_event_columns, import_events, import_items, import_users
from recsys.ingest.sources.formats import plan_parts
from recsys.ingest.sources.input_files import find_files
from recsys.store import Storage

ROWS = [
    {"user_id": "u1", "item_id": "i1", "timestamp": 10, "value": 4.5},
    {"user_id": "u1", "item_id": "i2", "timestamp": 20, "value": None},
    {"user_id": "u2", "item_id": "i1", "timestamp": 15, "value": 1.0},
]
MAPPED = ColumnsConfig(user_id="who", item_id="what", timestamp="when", value="stars")


def write_events(folder: Path, name: str, rows: list[dict]) -> Path:
    path = folder / name
    table = pa.Table.from_pylist(rows)
    if name.endswith(".parquet"):
        pq.write_table(table, path, row_group_size=2)
    elif name.endswith(".csv"):
        arrow_csv.write_csv(table, path)
    elif name.endswith(".csv.gz"):
        sink = pa.BufferOutputStream()
        arrow_csv.write_csv(table, sink)
        path.write_bytes(gzip.compress(sink.getvalue().to_pybytes()))
    elif name.endswith(".inter"):
        lines = ["user_id:token\titem_id:token\ttimestamp:float\tvalue:float"]
        lines += ["\t".join("" if row[key] is None else str(row[key]) for key in ROWS[0]) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    else:
        text = "\n".join(json.dumps(row) for row in rows).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


def read_events(folder: Path, uri: Path, columns: ColumnsConfig | None = None) -> list[dict]:
    storage = Storage(str(folder))
    data = DataConfig(columns=columns or ColumnsConfig())
    files = find_files(storage, "events", str(uri))
    found = find_event_columns(storage, files[0].uri, data)
    time_column = "timestamp" if "timestamp" in found else "position"
    raws = [raw for part in plan_parts(storage, files) for raw in import_events(storage, part, data, time_column)]
    return [row for raw in raws for row in cast_events(raw)[0].to_pylist()]


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.csv.gz", "a.jsonl", "a.jsonl.gz", "a.inter"])
def test_every_format_gives_the_same_events(tmp_path: Path, name: str) -> None:
    expected = [{**row, "event": "interaction", "query": None, "input_order": number} for number, row in enumerate(ROWS)]
    assert read_events(tmp_path, write_events(tmp_path, name, ROWS)) == expected


def test_a_folder_is_numbered_file_by_file_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    write_events(tmp_path, "b.csv", ROWS[2:])
    write_events(tmp_path, "a.parquet", ROWS[:2])
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / "notes.txt").write_text("not a table")
    assert [row["input_order"] for row in read_events(tmp_path, tmp_path)] == [0, 1, 1 << 40]


def test_large_parquet_files_are_cut_by_row_group_and_keep_their_row_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_events(tmp_path, "a.parquet", ROWS)
    monkeypatch.setattr(formats, "_PART_BYTES", 1)
    parts = plan_parts(Storage(str(tmp_path)), find_files(Storage(str(tmp_path)), "events", str(path)))
    assert [(part.row_groups, part.first_row) for part in parts] == [((0,), 0), ((1,), 2)]
    assert [row["input_order"] for row in read_events(tmp_path, path)] == [0, 1, 2]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_row_numbers_go_on_from_batch_to_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in (formats, lines):
        monkeypatch.setattr(module, "BATCH_ROWS", 2)
    assert [row["input_order"] for row in read_events(tmp_path, write_events(tmp_path, name, ROWS))] == [0, 1, 2]


def test_columns_are_mapped(tmp_path: Path) -> None:
    rows = [{"what": 1, "who": 7, "when": 3, "stars": 2, "more": "x"}]
    for name in ("a.parquet", "a.csv", "a.jsonl"):
        found = read_events(tmp_path, write_events(tmp_path, name, rows), MAPPED)
        expected = {"user_id": "7", "item_id": "1", "timestamp": 3, "event": "interaction", "value": 2.0, "query": None, "input_order": 0}
        assert found == [expected]


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ({"item_id": 1, "timestamp": 1}, "'user_id'"),
        ({"user_id": 1, "timestamp": 1}, "'item_id'"),
        ({"user_id": 1, "item_id": 1}, "'timestamp' or 'position'"),
    ],
)
def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path, row: dict, missing: str) -> None:
    path = write_events(tmp_path, "a.parquet", [row])
    with pytest.raises(UserError) as error:
        read_events(tmp_path, path)
    assert f"{path}: has no column {missing}" in str(error.value)
    assert f"its columns are {', '.join(row)}" in str(error.value)


def test_a_renamed_optional_column_must_be_there(tmp_path: Path) -> None:
    path = write_events(tmp_path, "a.parquet", [{"user_id": 1, "item_id": 1, "position": 1}])
    assert find_event_columns(Storage(str(tmp_path)), str(path), DataConfig()).keys() == {"user_id", "item_id", "position"}
    with pytest.raises(UserError, match="'stars'"):
        find_event_columns(Storage(str(tmp_path)), str(path), DataConfig(columns=ColumnsConfig(value="stars")))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.parquet", b""),
        ("a.parquet", b"PAR1 but no footer"),
        ("a.csv", b""),
        ("a.csv", b"\n"),
        ("a.csv", b"user_id,item_id,timestamp\n1,2,3\n1,2\n"),
        ("a.csv", b"user_id,item_id,timestamp\n\xff\xfe,2,3\n"),
        ("a.csv.gz", b"not gzip"),
        ("a.jsonl", b'{"user_id": 1, "item_id": 2, "timestamp": 3}\n{"user_id": \n'),
        ("a.jsonl", b"[1, 2, 3]\n"),
        ("a.jsonl", b"[" * 100_000),
        ("a.jsonl.gz", gzip.compress(b'{"user_id": 1, "item_id": 2, "timestamp": 3}\n' * 1000, mtime=0)[:40]),
        ("a.inter", b"user_id\titem_id\n1\t2\n"),
        ("a.inter", b"user_id:token\titem_id:token\ttimestamp:float\n1\n"),
    ],
)
def test_a_broken_file_gives_one_line_with_file_and_reason(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_events(tmp_path, path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_parquet_file_with_a_cut_footer_or_damaged_pages(tmp_path: Path) -> None:
    path = write_events(tmp_path, "a.parquet", ROWS)
    whole = path.read_bytes()
    for damaged in (whole[:-7], whole[:10] + b"\xff" * 30 + whole[40:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            read_events(tmp_path, path)


def test_nothing_there_and_nothing_known_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        find_files(Storage(str(tmp_path)), "events", str(tmp_path / "nowhere"))
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(UserError, match=r"\.inter \.parquet"):
        find_files(Storage(str(tmp_path)), "events", str(tmp_path))


ITEM_LINES = """item_id:token\tname:token_seq\tkind:token_seq\tyear:float\tvector:float_seq
1\tThe First\tdrama comedy\t1990\t0.5 1
2\tA Second One\tdrama\t1995\t1 2
3\tThird\t\t\t3 4
4\tFourth\tdrama\t1990\t5 6
5\tFifth\tdrama\t1990\t5 6
"""


def items_of(folder: Path, name: str, features: ItemFeaturesConfig, columns: ColumnsConfig | None = None) -> tuple[pa.Table, dict]:
    storage = Storage(str(folder))
    data = DataConfig(columns=columns or ColumnsConfig(), item_features=features)
    items = import_items(storage, find_files(storage, "items", str(folder / name)), data)
    return items.rows, items.kinds


def test_recbole_item_features_are_inferred_from_types_and_distinct_values(tmp_path: Path) -> None:
    (tmp_path / "a.item").write_text(ITEM_LINES)
    table, kinds = items_of(tmp_path, "a.item", ItemFeaturesConfig())
    assert kinds == {"name": "text", "kind": "categories", "year": "numbers", "vector": "vectors"}
    assert table["name"].to_pylist()[:2] == ["The First", "A Second One"]
    assert table["kind"].to_pylist()[:3] == [["drama", "comedy"], ["drama"], None]
    assert table["vector"].to_pylist()[0] == [0.5, 1.0]


def test_configured_item_features_alone_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.item").write_text(ITEM_LINES)
    table, kinds = items_of(tmp_path, "a.item", ItemFeaturesConfig(text=("kind",), categories=("name",)))
    assert kinds == {"kind": "text", "name": "categories"}
    assert table.column_names == ["item_id", "kind", "name", "input_order"]
    assert table["kind"].to_pylist()[0] == "drama comedy"
    assert table["name"].to_pylist()[0] == ["The", "First"]


def test_csv_numbers_are_told_by_their_values_and_jsonl_lists_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('item_id,title,price,kind\n1,"One\nline",3.5,x\n2,Two,,x\n3,Three,1e3,x\n')
    table, kinds = items_of(tmp_path, "a.csv", ItemFeaturesConfig())
    assert kinds == {"title": "text", "price": "numbers", "kind": "categories"}
    assert table["title"].to_pylist()[0] == "One\nline"
    (tmp_path / "a.jsonl").write_text(
        '{"item_id": 5, "tags": ["a", 1], "deep": {"x": 1}, "name": "bad \\ud800 one"}\n{"item_id": 6, "tags": "b"}\n'
    )
    table, _ = items_of(tmp_path, "a.jsonl", ItemFeaturesConfig())
    assert table["tags"].to_pylist() == [["a", "1"], ["b"]]
    assert table["deep.x"].to_pylist() == [1.0, None]
    assert table["name"].to_pylist() == ["bad \ufffd\ufffd\ufffd one", None]


def test_parquet_types_tell_the_kinds(tmp_path: Path) -> None:
    table = pa.table(
        {
            "sku": pa.array([1, 2, 3, 4]),
            "codes": pa.array([[1, 2], [3], [], None]),
            "embedding": pa.array([[0.0, 1.0]] * 4),
            "title": pa.array(["a", "b", "c", "d"], pa.large_string()),
            "color": pa.array(["red", "red", "red", None]).dictionary_encode(),
            "is_new": pa.array([True, False, True, False]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    _, kinds = items_of(tmp_path, "a.parquet", ItemFeaturesConfig(), ColumnsConfig(item_id="sku"))
    assert kinds == {"codes": "categories", "embedding": "vectors", "title": "text", "color": "categories", "is_new": "categories"}


def test_item_errors(tmp_path: Path) -> None:
    pq.write_table(pa.table({"item_id": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="has no rows"):
        items_of(tmp_path, "empty.parquet", ItemFeaturesConfig())
    (tmp_path / "a.csv").write_text("item_id,title\n1,x\n")
    with pytest.raises(UserError, match=r"no column 'name' \(text\); its columns are item_id, title"):
        items_of(tmp_path, "a.csv", ItemFeaturesConfig(text=("name",)))


def test_users_keep_every_other_column(tmp_path: Path) -> None:
    (tmp_path / "a.user").write_text("who:token\tage:token\n7\t30\n")
    storage = Storage(str(tmp_path))
    parts = plan_parts(storage, find_files(storage, "users", str(tmp_path)))
    tables = list(import_users(storage, parts[0], DataConfig(columns=ColumnsConfig(user_id="who"))))
    assert tables[0].to_pylist() == [{"user_id": "7", "age": "30", "input_order": 0}]
