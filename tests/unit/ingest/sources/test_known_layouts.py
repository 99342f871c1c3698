"""MovieLens and Amazon files in their original formats, hive folders, time units: all give the same standard columns."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config.data import ColumnsConfig, DataConfig, ItemFeaturesConfig
from recsys.errors import UserError
from recsys.ingest.clean.cleaning import cast_events
from recsys.ingest.clean.times import guess_unit
from recsys.ingest.sources.column_mapping import find_event_columns, import_events, import_items, import_users
from recsys.ingest.sources.formats import plan_parts
from recsys.ingest.sources.input_files import find_files, find_in_folder
from recsys.ingest.sources.known_layouts import path_columns
from recsys.store import ObjectInfo, Storage

REAL = Path(__file__).parents[5] / "shared" / "data"
REVIEW = {
    "rating": 5.0,
    "title": "Such a lovely scent",
    "text": "It smells good.",
    "images": [],
    "asin": "B00YQ6X8EO",
    "parent_asin": "B00YQ6X8E0",
    "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ",
    "timestamp": 1588687728923,
    "helpful_vote": 0,
    "verified_purchase": True,
}
META = {
    "main_category": "All Beauty",
    "title": "Howard Leather Cream",
    "average_rating": 4.8,
    "rating_number": 10,
    "features": ["Soft", "Made in USA"],
    "description": [],
    "price": None,
    "images": [{"thumb": "https://x"}],
    "videos": [],
    "store": "Howard | Products",
    "categories": ["Beauty", "Skin Care"],
    "details": {"Package": "8 oz"},
    "parent_asin": "B00YQ6X8E0",
    "bought_together": None,
}


def events_of(storage: Storage, files: list[ObjectInfo], data: DataConfig | None = None) -> list[dict[str, Any]]:
    data = data or DataConfig()
    time_column = "timestamp" if "timestamp" in find_event_columns(storage, files[0].uri, data) else "position"
    raws = [raw for part in plan_parts(storage, files) for raw in import_events(storage, part, data, time_column)]
    columns = [raw[time_column] for raw in raws]
    unit = (data.time_unit if data.time_unit != "auto" else guess_unit(columns[0])) or "s"
    return [row for raw in raws for row in cast_events(raw, unit)[0].drop_columns(["input_order", "event", "query"]).to_pylist()]


def items_of(storage: Storage, files: list[ObjectInfo], **features: Any) -> tuple[list[dict[str, Any]], dict[str, str]]:
    items = import_items(storage, files, DataConfig(item_features=ItemFeaturesConfig(**features)))
    table, kinds = items.rows, items.kinds
    return table.drop_columns(["input_order"]).to_pylist(), kinds


def test_movielens_dat(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("1::1193::5::978300760\n1::661::3::978302109\n")
    (tmp_path / "movies.dat").write_bytes(
        "1::Toy Story (1995)::Animation|Children's\n2::Misérables, Les: Part 1 (1995)::Drama\n".encode("latin-1")
        + "3::Amélie (2001)::Comedy\n4::Nameless (2002)::\n".encode()
    )
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n")
    storage = Storage(str(tmp_path))
    tables = {role: find_in_folder(storage, role, str(tmp_path)) for role in ("events", "items", "users")}
    assert events_of(storage, tables["events"]) == [
        {"user_id": "1", "item_id": "1193", "timestamp": 978300760, "value": 5.0},
        {"user_id": "1", "item_id": "661", "timestamp": 978302109, "value": 3.0},
    ]
    rows, kinds = items_of(storage, tables["items"])
    assert kinds == {"Title": "text", "Genres": "categories"}
    assert [row["Title"] for row in rows] == ["Toy Story (1995)", "Misérables, Les: Part 1 (1995)", "Amélie (2001)", "Nameless (2002)"]
    assert [row["Genres"] for row in rows] == [["Animation", "Children's"], ["Drama"], ["Comedy"], None]
    users = list(import_users(storage, plan_parts(storage, tables["users"])[0], DataConfig()))
    expected = {"user_id": "1", "Gender": "F", "Age": "1", "Occupation": "10", "Zip-code": "48067", "input_order": 0}
    assert users[0].to_pylist() == [expected]


def test_a_movielens_line_with_another_number_of_fields(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("1::1193::5::978300760\n1::661::3\n")
    storage = Storage(str(tmp_path))
    with pytest.raises(UserError, match=r"ratings\.dat: line 2 has 3 fields; UserID::MovieID::Rating::Timestamp has 4"):
        events_of(storage, find_files(storage, "events", str(tmp_path / "ratings.dat")))


def test_movielens_csv(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n")
    (tmp_path / "movies.csv").write_text('movieId,title,genres\n296,"Pulp, Fiction (1994)",Comedy|Crime\n297,Nine,Crime\n')
    storage = Storage(str(tmp_path))
    assert events_of(storage, find_in_folder(storage, "events", str(tmp_path))) == [
        {"user_id": "1", "item_id": "296", "timestamp": 1147880044, "value": 5.0}
    ]
    rows, kinds = items_of(storage, find_in_folder(storage, "items", str(tmp_path)))
    assert kinds == {"title": "text", "genres": "categories"}
    assert rows[0] == {"item_id": "296", "title": "Pulp, Fiction (1994)", "genres": ["Comedy", "Crime"]}


def test_amazon_reviews_and_their_catalogue(tmp_path: Path) -> None:
    (tmp_path / "All_Beauty.jsonl.gz").write_bytes(gzip.compress(json.dumps(REVIEW).encode()))
    other = {**META, "parent_asin": "B2", "price": "12.5", "description": ["Long", "text"], "store": None}
    (tmp_path / "meta_All_Beauty.jsonl").write_text("\n".join(json.dumps(row) for row in (META, other)))
    storage = Storage(str(tmp_path))
    assert events_of(storage, find_in_folder(storage, "events", str(tmp_path))) == [
        {"user_id": REVIEW["user_id"], "item_id": "B00YQ6X8E0", "timestamp": 1588687728, "value": 5.0}
    ]
    rows, kinds = items_of(storage, find_in_folder(storage, "items", str(tmp_path)))
    assert kinds == {
        "title": "text",
        "features": "text",
        "description": "text",
        "main_category": "categories",
        "store": "categories",
        "categories": "categories",
        "price": "numbers",
    }
    assert rows[0] == {
        "item_id": "B00YQ6X8E0",
        "title": "Howard Leather Cream",
        "features": ["Soft", "Made in USA"],
        "description": [],
        "main_category": ["All Beauty"],
        "store": ["Howard ", " Products"],
        "categories": ["Beauty", "Skin Care"],
        "price": None,
    }
    assert (rows[1]["price"], rows[1]["store"]) == (12.5, None)


def test_reviews_are_no_catalogue(tmp_path: Path) -> None:
    (tmp_path / "reviews.jsonl").write_text(json.dumps(REVIEW))
    storage = Storage(str(tmp_path))
    with pytest.raises(UserError, match=r"reviews\.jsonl: holds reviews, whose text is not the items'"):
        items_of(storage, find_files(storage, "items", str(tmp_path)))


def test_a_house_name_that_is_there_goes_before_an_alias(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("userId,user_id,asin,item_id,rating,value,timestamp\nx,u,y,i,1,2,3\n")
    storage = Storage(str(tmp_path))
    files = find_files(storage, "events", str(tmp_path))
    assert events_of(storage, files) == [{"user_id": "u", "item_id": "i", "timestamp": 3, "value": 2.0}]
    mapped = DataConfig(columns=ColumnsConfig(user_id="userId", item_id="asin", value="rating"))
    assert events_of(storage, files, mapped) == [{"user_id": "x", "item_id": "y", "timestamp": 3, "value": 1.0}]
    with pytest.raises(UserError, match="has no column 'who'"):
        events_of(storage, files, DataConfig(columns=ColumnsConfig(user_id="who")))


@pytest.mark.parametrize(
    ("unit", "values", "expected"),
    [
        ("ms", pa.array([1588687728923, -1, None]), [1588687728, -1, None]),
        ("ns", pa.array([1588687728999999999]), [1588687728]),
        ("us", pa.array([2**63 + 1_000_000], pa.uint64()), [9223372036855]),
        ("ms", pa.array([-(2**63), -1000, -1001, 999]), [-9223372036854776, -1, -2, 0]),
        ("ms", pa.array([1, 127], pa.int8()), [0, 0]),
        ("ms", pa.array([1999.5, -0.5]), [1, -1]),
        ("ms", pa.array(["1588687728923", " +1999 ", "-1", "1.5e3", "2020-01-01", "never"]), [1588687728, 1, -1, 1, 1577836800, None]),
        ("ms", pa.array([1588687728923], pa.timestamp("ms")), [1588687728]),
        ("auto", pa.array([1588687728923]), [1588687728]),
        ("s", pa.array(["1588687728923"]), [1588687728923]),
    ],
)
def test_times_become_seconds(tmp_path: Path, unit: Any, values: pa.Array, expected: list[int | None]) -> None:
    pq.write_table(pa.table({"user_id": ["u"] * len(values), "item_id": ["i"] * len(values), "timestamp": values}), tmp_path / "a.parquet")
    storage = Storage(str(tmp_path))
    rows = events_of(storage, find_files(storage, "events", str(tmp_path)), DataConfig(time_unit=unit))
    assert [row["timestamp"] for row in rows] == [seconds for seconds in expected if seconds is not None]


def test_positions_have_no_unit(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user_id,item_id,position\nu,i,5000\n")
    storage = Storage(str(tmp_path))
    assert events_of(storage, find_files(storage, "events", str(tmp_path)), DataConfig(time_unit="ms"))[0]["timestamp"] == 5000


def test_a_path_gives_columns_that_the_file_lacks(tmp_path: Path) -> None:
    for day, event in (("2024-01-01", "view"), ("2024-01-02", "click")):
        folder = tmp_path / f"date={day}" / f"event={event}"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i"]}), folder / "a.parquet")
        (folder / "b.csv").write_text("user_id,item_id,event\nu,i,own\n")
    storage = Storage(str(tmp_path))
    data = DataConfig(columns=ColumnsConfig(timestamp="date"))
    files = find_files(storage, "events", str(tmp_path / "date=*"))
    raws = [raw for part in plan_parts(storage, files) for raw in import_events(storage, part, data, "timestamp")]
    rows = [row for raw in raws for row in cast_events(raw)[0].to_pylist()]
    assert [(row["timestamp"], row["event"]) for row in rows] == [
        (1704067200, "view"),
        (1704067200, "own"),
        (1704153600, "click"),
        (1704153600, "own"),
    ]
    assert [row["input_order"] for row in rows] == [number << 40 for number in range(4)]


def test_path_columns_are_unescaped() -> None:
    assert path_columns("s3://b/a=1/kind=a%2Fb%20c/x=__HIVE_DEFAULT_PARTITION__/1=2/=3/k=v.csv") == {"a": "1", "kind": "a/b c", "x": None}


def test_category_text_is_split_at_the_configured_separator(tmp_path: Path) -> None:
    pq.write_table(pa.table({"item_id": [1, 2, 3], "kind": ["a b|c", "a b|c", None]}), tmp_path / "a.parquet")
    storage = Storage(str(tmp_path))
    files = find_files(storage, "items", str(tmp_path))
    for separator, expected in (("|", ["a b", "c"]), (" ", ["a", "b|c"]), ("", "a b|c")):
        rows, _ = items_of(storage, files, categories=("kind",), separator=separator)
        assert [row["kind"] for row in rows] == [expected, expected, None]


def test_words_for_a_missing_number_do_not_make_text_of_a_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("item_id,price,none\n1,None,None\n2,3.5,None\n3,,None\n4,n/a,\n")
    storage = Storage(str(tmp_path))
    _, kinds = items_of(storage, find_files(storage, "items", str(tmp_path)))
    assert kinds == {"price": "numbers", "none": "categories"}


def test_a_json_column_may_have_lists_in_one_file_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"item_id": 1, "tags": null}\n{"item_id": 2, "tags": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"item_id": 3, "tags": ["y", "z"]}\n')
    storage = Storage(str(tmp_path))
    rows, kinds = items_of(storage, find_files(storage, "items", str(tmp_path)))
    assert kinds == {"tags": "categories"}
    assert [row["tags"] for row in rows] == [None, ["x"], ["y", "z"]]


def test_the_real_movielens_genres_are_lists() -> None:
    if not (REAL / "ml-1m").exists():
        pytest.skip(f"{REAL / 'ml-1m'} is absent")
    storage = Storage(str(REAL))
    rows, kinds = items_of(storage, find_files(storage, "items", str(REAL / "ml-1m" / "items.parquet")))
    assert kinds == {"title": "text", "year": "numbers", "genres": "categories"}
    assert len({genre for row in rows for genre in row["genres"]}) == 18
