"""The files of each table: patterns, folders, hidden and stray files, and known names in a folder with several tables."""

import json
from pathlib import Path

import pytest

from recsys.config.data import DataConfig
from recsys.errors import UserError
from recsys.ingest.sources.formats import FilePart, group_parts
from recsys.ingest.sources.input_files import event_columns, find_files, find_in_folder, plan_tasks, read_items
from recsys.store import Storage

HEADER = "user_id,item_id,timestamp\n"


def fill(folder: Path, *names: str, text: str = HEADER) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def names_of(folder: Path, pattern: str, role: str = "events") -> list[str]:
    found = find_files(Storage(str(folder)), role, str(folder / pattern) if pattern else str(folder))
    return [file.uri.removeprefix(f"{folder}/") for file in found]


def folder_names(folder: Path, role: str) -> list[str]:
    return [file.uri.removeprefix(f"{folder}/") for file in find_in_folder(Storage(str(folder)), role, str(folder))]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["2024-01/part-0.csv", "2024-01/part-1.csv", "2024-02/part-0.csv", "2024-11/deep/part-0.csv", "other.csv"]),
        ("2024-0*/part-*.csv", ["2024-01/part-0.csv", "2024-01/part-1.csv", "2024-02/part-0.csv"]),
        ("2024-0[2-9]/*", ["2024-02/part-0.csv"]),
        ("2024-1?", ["2024-11/deep/part-0.csv"]),
        ("*.csv", ["other.csv"]),
        ("**/part-0.csv", ["2024-01/part-0.csv", "2024-02/part-0.csv", "2024-11/deep/part-0.csv"]),
        ("2024-11/**", ["2024-11/deep/part-0.csv"]),
        ("**/deep/**/*.csv", ["2024-11/deep/part-0.csv"]),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    fill(tmp_path, "2024-01/part-0.csv", "2024-01/part-1.csv", "2024-02/part-0.csv", "2024-11/deep/part-0.csv", "other.csv")
    assert names_of(tmp_path, pattern) == expected


def test_patterns_on_s3(s3_storage: Storage) -> None:
    for name in ("2024-01/part-0.csv", "2024-02/part-0.csv", "2024-02/_SUCCESS", "2025-01/part-0.csv"):
        s3_storage.write_bytes(s3_storage.uri("events", name), HEADER.encode())
    found = find_files(s3_storage, "events", s3_storage.uri("events") + "/2024-*/part-*.csv")
    assert [file.uri for file in found] == [s3_storage.uri("events", f"2024-0{month}", "part-0.csv") for month in (1, 2)]


def test_a_pattern_that_nothing_fits_and_a_name_with_brackets(tmp_path: Path) -> None:
    fill(tmp_path, "a[1].csv")
    assert names_of(tmp_path, "a[1].csv") == ["a[1].csv"]
    with pytest.raises(UserError, match=r"b\*\.csv: no such file"):
        names_of(tmp_path, "b*.csv")


def test_stray_files_make_no_difference(tmp_path: Path) -> None:
    fill(tmp_path, "b.csv", "a.csv", "date=1/c.csv")
    before = find_files(Storage(str(tmp_path)), "events", str(tmp_path))
    fill(tmp_path, "_SUCCESS", ".a.csv.crc", "notes.txt", "_temporary/0/d.csv", ".hidden/e.csv", "date=1/.f.csv", "g_$folder$")
    fill(tmp_path, "part-7.csv", "empty.jsonl", text="")
    assert find_files(Storage(str(tmp_path)), "events", str(tmp_path)) == before
    assert [file.uri for file in before] == [f"{tmp_path}/{name}" for name in ("a.csv", "b.csv", "date=1/c.csv")]


def test_a_folder_below_a_hidden_one_is_seen(tmp_path: Path) -> None:
    fill(tmp_path, ".cache/_events/a.csv")
    assert names_of(tmp_path, ".cache/_events") == [".cache/_events/a.csv"]
    assert names_of(tmp_path, ".cache/_events/*.csv") == [".cache/_events/a.csv"]


def test_parquet_without_a_byte_is_a_fault_and_so_are_empty_files_alone(tmp_path: Path) -> None:
    fill(tmp_path, "a.csv")
    fill(tmp_path, "b.parquet", text="")
    with pytest.raises(UserError, match=r"b\.parquet: is empty"):
        names_of(tmp_path, "")
    fill(tmp_path, "only/c.csv", text="")
    with pytest.raises(UserError, match=r"c\.csv: is empty"):
        names_of(tmp_path, "only")


@pytest.mark.parametrize(
    ("names", "events", "items", "users"),
    [
        (["x.inter", "x.item", "x.user", "README.md"], ["x.inter"], ["x.item"], ["x.user"]),
        (["events.csv", "items.jsonl", "users.parquet"], ["events.csv"], ["items.jsonl"], ["users.parquet"]),
        (["events-1.csv", "events-2.csv"], ["events-1.csv", "events-2.csv"], [], []),
        (["events/date=1/p.csv", "items/p.csv", "users/p.csv"], ["events/date=1/p.csv"], ["items/p.csv"], ["users/p.csv"]),
        (["ratings.dat", "movies.dat", "users.dat", "tags.dat"], ["ratings.dat"], ["movies.dat"], ["users.dat"]),
        (["ratings.csv", "movies.csv", "links.csv", "tags.csv"], ["ratings.csv"], ["movies.csv"], []),
        (["events.csv", "ratings.csv", "reviews.csv"], ["events.csv"], [], []),
        (["All_Beauty.jsonl.gz", "meta_All_Beauty.jsonl"], ["All_Beauty.jsonl.gz"], ["meta_All_Beauty.jsonl"], []),
        (["reviews_X.jsonl", "meta_X.jsonl"], ["reviews_X.jsonl"], ["meta_X.jsonl"], []),
    ],
)
def test_tables_are_known_by_their_names(tmp_path: Path, names: list[str], events: list[str], items: list[str], users: list[str]) -> None:
    fill(tmp_path, *names)
    assert [folder_names(tmp_path, role) for role in ("events", "items", "users")] == [events, items, users]


def test_a_folder_without_events(tmp_path: Path) -> None:
    fill(tmp_path, "items.csv", "Toys.jsonl")
    assert find_in_folder(Storage(str(tmp_path)), "events", "") == []
    with pytest.raises(UserError, match=r"has no file \*\.inter and none like events\.parquet"):
        folder_names(tmp_path, "events")


def test_small_files_share_a_task_and_keep_their_numbers(tmp_path: Path) -> None:
    fill(tmp_path, *(f"{number:05d}.csv" for number in range(300)))
    storage = Storage(str(tmp_path))
    tasks = plan_tasks(storage, find_files(storage, "events", str(tmp_path)), DataConfig())
    assert [[part.file_number for part in parts] for parts in tasks] == [list(range(300))]


def test_groups_hold_64_mebibytes_in_order() -> None:
    sizes = [40, 20, 10, 100, 1, 63, 1]
    parts = [FilePart(f"/{number}", number, num_bytes=size << 20) for number, size in enumerate(sizes)]
    assert [[part.file_number for part in group] for group in group_parts(parts)] == [[0, 1], [2], [3], [4, 5], [6]]
    assert group_parts([]) == []


def test_what_the_child_answers_is_what_the_functions_say(tmp_path: Path) -> None:
    fill(tmp_path, "a.csv")
    storage = Storage(str(tmp_path))
    columns = event_columns(storage, str(tmp_path / "a.csv"), DataConfig())
    assert columns == {"user_id": "user_id", "item_id": "item_id", "timestamp": "timestamp"}
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps({"item_id": n, "tags": ["x"], "name": f"n{n}"}) for n in range(3)))
    items = read_items(storage, find_files(storage, "items", str(tmp_path / "items.jsonl")), DataConfig())
    assert items.kinds == {"tags": "categories", "name": "text"}
    assert items.rows.drop_columns(["input_order"]).to_pylist()[2] == {"item_id": "2", "tags": ["x"], "name": "n2"}
