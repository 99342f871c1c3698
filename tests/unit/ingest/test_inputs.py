"""The number of partitions of an input: at least four, chosen from its size."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config.data import DataConfig
from recsys.ingest.inputs import choose_num_shards
from recsys.store import ObjectInfo, Storage


def parquet_files(folder: Path, num_files: int, num_rows: int) -> list[ObjectInfo]:
    for number in range(num_files):
        pq.write_table(pa.table({"item_id": pa.array(range(num_rows), pa.int32())}), folder / f"{number}.parquet")
    return Storage(str(folder)).list(str(folder))


@pytest.mark.parametrize(("num_files", "num_rows", "expected"), [(1, 10, 4), (1, 2_100_000, 6), (1, 2_100_001, 7), (21, 100_000, 6)])
def test_rows_of_parquet_files_are_what_counts(tmp_path: Path, num_files: int, num_rows: int, expected: int) -> None:
    files = parquet_files(tmp_path, num_files, num_rows)
    assert choose_num_shards(Storage(str(tmp_path)), files, DataConfig()) == expected


@pytest.mark.parametrize(
    ("name", "num_bytes", "expected"),
    [("a.csv", 10**9, 90), ("a.inter", 10**9, 90), ("a.csv.gz", 10**9, 318), ("a.jsonl", 10**9, 29), ("a.jsonl", 10**13, 65_536)],
)
def test_other_formats_are_guessed_from_their_bytes(name: str, num_bytes: int, expected: int) -> None:
    assert choose_num_shards(Storage("/store"), [ObjectInfo(f"/{name}", num_bytes, "etag")], DataConfig()) == expected
