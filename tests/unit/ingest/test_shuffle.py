"""The external shuffle: every row reaches its partition once, in input order, also if a task runs twice."""

from pathlib import Path

import pyarrow as pa
import pytest

from recsys.ingest import shuffle
from recsys.ingest.shuffle import partition_of, read_partition, write_pieces
from recsys.store import Storage

SCHEMA = pa.schema([("user_id", pa.string()), ("number", pa.int64()), ("pairs", pa.map_(pa.string(), pa.string()))])


def rows(first: int, count: int) -> pa.Table:
    numbers = range(first, first + count)
    return pa.Table.from_pylist([{"user_id": f"u{n % 13}", "number": n, "pairs": [("n", str(n))]} for n in numbers], schema=SCHEMA)


def test_partitions_are_fixed_for_ever() -> None:
    assert partition_of(pa.array(["u1", "u2", "ü", "u1"]), 1000).to_pylist() == [422, 764, 789, 422]


def test_rows_reach_their_partition_in_input_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "_PIECE_ROWS", 30)
    storage = Storage(str(tmp_path))
    folder = storage.uri("pieces")
    tasks = [[rows(0, 20), rows(20, 20), rows(40, 5)], [], [rows(45, 10), rows(55, 0)]]
    numbers = [write_pieces(storage, folder, number, tables, "user_id", 5) for number, tables in enumerate(tasks)]
    assert write_pieces(storage, folder, 0, tasks[0], "user_id", 5) == numbers[0] == 2
    assert len(storage.list(folder)) == sum(numbers) == 3
    expected = rows(0, 55)
    partitions = partition_of(expected["user_id"], 5).to_numpy()
    for partition in range(5):
        assert read_partition(storage, folder, partition, SCHEMA).equals(expected.filter(pa.array(partitions == partition)))


def test_a_partition_without_rows_in_a_piece_is_empty(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    write_pieces(storage, storage.uri("pieces"), 0, [rows(0, 1)], "user_id", 1000)
    own = partition_of(rows(0, 1)["user_id"], 1000)[0].as_py()
    assert [read_partition(storage, storage.uri("pieces"), number, SCHEMA).num_rows for number in (own - 1, own, own + 1)] == [0, 1, 0]
    assert read_partition(storage, storage.uri("nothing"), 0, SCHEMA).equals(SCHEMA.empty_table())
