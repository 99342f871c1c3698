"""Hostile and broken input files through the real import, in the child with the memory limit: one line each, and nothing else happens."""

import gzip
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config.data import DataConfig
from recsys.errors import UserError
from recsys.ingest.input_tasks import stage_events
from recsys.ingest.job import Job
from recsys.ingest.sources.column_mapping import import_events
from recsys.ingest.sources.formats import FilePart
from recsys.ingest.sources.input_files import event_columns, find_files, plan_tasks, read_items
from recsys.ingest.sources.sandbox import run_limited
from recsys.store import Storage

ROOT = Path(__file__).parents[2]
MEBI = 1 << 20
LIMIT = 512 * MEBI


def data_of(limit: int = LIMIT) -> DataConfig:
    return DataConfig(num_shards=2, max_file_memory_bytes=limit)


def import_events_from(path: Path, data: DataConfig) -> dict[str, int]:
    """Process one events table as prepare_data does, without Ray: find, inspect, plan, read, cast, write pieces."""
    root = path.parent.parent / "store" if path.is_file() else path.parent / "store"
    storage = Storage(str(root))
    files = find_files(storage, "events", str(path))
    found = event_columns(storage, files[0].uri, data)
    job = Job(storage, storage.uri("datasets", "x"), data, "timestamp" if "timestamp" in found else "position")
    total = {"rows": 0}
    for number, parts in enumerate(plan_tasks(storage, files, data)):
        outcome = run_limited(data.max_file_memory_bytes, stage_events, job, number, parts)
        total["rows"] += outcome["rows"]
        for reason, count in outcome["rejected"].items():
            total[reason] = total.get(reason, 0) + count
    return total


def memory_of_child() -> dict[str, int]:
    """Return the child's process id, its peak physical memory and its current data segment, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return {"id": os.getpid(), "peak": int(values["VmHWM"]) << 10, "data": int(values["VmData"]) << 10}


def outcome_of(path: Path, data: DataConfig | None = None) -> dict[str, int] | str:
    """Import a table; return the counts, or the one-line error that refuses it."""
    try:
        return import_events_from(path, data or data_of())
    except UserError as error:
        text = str(error)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 600
    return text


def refusal_of(path: Path, data: DataConfig | None = None) -> str:
    outcome = outcome_of(path, data)
    assert isinstance(outcome, str)
    return outcome


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "input").mkdir()
    return tmp_path / "input"


def events_table(num_rows: int = 200) -> pa.Table:
    numbers = np.arange(num_rows)
    return pa.table(
        {
            "user_id": [f"user {number % 17}" for number in numbers],
            "item_id": numbers % 31,
            "timestamp": numbers * 60,
            "event": pa.array([("view", "click")[number % 2] for number in numbers]).dictionary_encode(),
            "value": pa.array(numbers % 5, pa.float32()),
        }
    )


def write(path: Path, table: pa.Table, **options: Any) -> Path:
    pq.write_table(table, path, **options)
    return path


def test_a_missing_column_and_a_wrong_type(folder: Path) -> None:
    table = events_table()
    assert "has no column 'user_id'" in refusal_of(write(folder / "a.parquet", table.drop_columns(["user_id"])))
    lists = table.set_column(0, "user_id", pa.array([[1]] * table.num_rows))
    assert "cannot be read" in refusal_of(write(folder / "a.parquet", lists))
    structs = table.set_column(2, "timestamp", pa.array([{"a": 1}] * table.num_rows))
    assert "has no column 'timestamp' or 'position'" in refusal_of(write(folder / "a.parquet", structs))


def test_null_ids_are_counted_and_zero_rows_are_none(folder: Path) -> None:
    table = events_table()
    table = table.set_column(0, "user_id", pa.array([None, *table["user_id"].to_pylist()[1:]]))
    assert import_events_from(write(folder / "a.parquet", table), data_of()) == {"rows": 200, "null_user": 1}
    assert import_events_from(write(folder / "a.parquet", table.slice(0, 0)), data_of()) == {"rows": 0}


def test_empty_files_and_cut_footers(folder: Path) -> None:
    path = folder / "a.parquet"
    path.write_bytes(b"")
    assert "is empty (0 bytes)" in refusal_of(path)
    whole = write(path, events_table()).read_bytes()
    for kept in (1, 4, 11, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        assert "cannot be read" in refusal_of(path)


def test_an_unknown_codec_and_absurd_counts(folder: Path) -> None:
    path = write(folder / "a.parquet", events_table(), compression="snappy")
    whole = path.read_bytes()
    footer_bytes = struct.unpack("<I", whole[-8:-4])[0]
    start = len(whole) - 8 - footer_bytes
    # Compact Thrift: field 4 of ColumnMetaData is the codec, an i32 after its header 0x15; 1 (snappy) is written as 2.
    footer = whole[start:-8]
    position = footer.index(b"user_id\x15\x02") + len(b"user_id\x15")
    path.write_bytes(whole[:start] + footer[:position] + b"\x7e" + footer[position + 1 :] + whole[-8:])
    assert "cannot be read" in refusal_of(path)
    # Its 200 rows are written as 0x90 0x03; five bytes of the largest varint claim four thousand million.
    absurd = footer.replace(b"\x90\x03", b"\xfe\xff\xff\xff\x1f")
    path.write_bytes(whole[:start] + absurd + struct.pack("<I", len(absurd)) + b"PAR1")
    refusal_of(path)
    path.write_bytes(whole[:-8] + struct.pack("<I", 0x7FFFFFFF) + b"PAR1")
    assert "cannot be read" in refusal_of(path)


def test_one_huge_row_group_is_streamed(folder: Path) -> None:
    """A row group of 400 MB is counted within 128 MiB."""
    numbers = np.random.default_rng(0).integers(0, 1 << 60, 12_000_000)
    table = pa.table({"user_id": numbers, "item_id": numbers, "timestamp": numbers, "unread": numbers})
    path = write(folder / "a.parquet", table, row_group_size=len(numbers), use_dictionary=False, compression="none")
    assert pq.read_metadata(path).num_row_groups == 1
    limit = 128 * MEBI
    num_rows, before, peak = run_limited(limit, count_rows, Storage(str(folder)), str(path), path.stat().st_size)
    assert num_rows == len(numbers)
    assert peak < before + limit


def count_rows(storage: Storage, uri: str, num_bytes: int) -> tuple[int, int, int]:
    """Count a file's rows; return also the memory before and the peak while counting."""
    before = memory_of_child()["data"]
    num_rows = sum(table.num_rows for table in import_events(storage, FilePart(uri, 0, num_bytes=num_bytes), DataConfig(), "timestamp"))
    return num_rows, before, memory_of_child()["peak"]


def dictionary_bomb(path: Path, keeps_type: bool) -> None:
    """A megabyte of text that a hundred thousand rows refer to: 100 GB in some kilobytes."""
    rows = 100_000
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * MEBI]))
    table = pa.table({"user_id": text, "item_id": np.zeros(rows, np.int8), "timestamp": np.zeros(rows, np.int8)})
    write(path, table, compression="zstd", store_schema=keeps_type)


def test_a_dictionary_bomb(folder: Path) -> None:
    for keeps_type in (True, False):
        path = folder / "a.parquet"
        dictionary_bomb(path, keeps_type)
        assert path.stat().st_size < 100_000
        before = run_limited(LIMIT, memory_of_child)
        refusal_of(path)
        after = run_limited(LIMIT, memory_of_child)
        assert after["peak"] < before["data"] + LIMIT


def test_a_page_bomb(folder: Path) -> None:
    """One page of a quarter of a gigabyte, compressed to almost nothing."""
    limit = 128 * MEBI
    table = pa.table({"user_id": ["x" * 2 * limit], "item_id": [1], "timestamp": [1]})
    path = write(folder / "a.parquet", table, compression="zstd", use_dictionary=False, write_statistics=False)
    assert path.stat().st_size < 100_000
    assert "data.max_file_memory_bytes" in refusal_of(path, data_of(limit))


def test_a_bomb_of_rows(folder: Path) -> None:
    """Eighty million equal rows in a few kilobytes are refused before they are read."""
    path = folder / "a.parquet"
    zeros = pa.array(np.zeros(10_000_000, np.int8))
    group = pa.table({"user_id": zeros, "item_id": zeros, "timestamp": zeros})
    with pq.ParquetWriter(path, group.schema) as writer:
        for _ in range(8):
            writer.write_table(group, row_group_size=group.num_rows)
    assert path.stat().st_size < MEBI
    assert "compression bomb" in refusal_of(path)


def gzip_of(path: Path, head: bytes, repeated: bytes, num_bytes: int = 400 * MEBI) -> Path:
    """Write a gzip file of members: the head, and one member that repeats the same content."""
    block = repeated * (16 * MEBI // len(repeated))
    path.write_bytes(gzip.compress(head) + gzip.compress(block) * (num_bytes // len(block)))
    return path


@pytest.mark.parametrize(
    ("name", "head", "repeated", "reason"),
    [
        ("a.jsonl.gz", b'{"user_id": "', b"x" * MEBI, "is longer than"),
        ("a.csv.gz", b"", b"x" * MEBI, "first line"),
        ("a.csv.gz", b"user_id,item_id,timestamp\n", b"x" * MEBI, "a line is longer than"),
        ("a.csv.gz", b'user_id,item_id,timestamp\n"', b"x\n" * MEBI, "begins in line 2: a quote is out of place or not closed"),
        ("a.jsonl.gz", b"", b'{"user_id": "%s", "item_id": 1, "timestamp": 1}\n' % (b"x" * MEBI), "compression bomb"),
        ("a.csv.gz", b"user_id,item_id,timestamp\n", b"%s,1,1\n" % (b"x" * MEBI), "compression bomb"),
    ],
)
def test_gzip_bombs(folder: Path, name: str, head: bytes, repeated: bytes, reason: str) -> None:
    path = gzip_of(folder / name, head, repeated)
    assert path.stat().st_size < MEBI
    assert reason in refusal_of(path, data_of(4 * LIMIT))
    refusal_of(path, data_of(64 * MEBI))


def test_dots_and_links_that_lead_out_are_refused(folder: Path, tmp_path: Path) -> None:
    outside = write(tmp_path / "secret.parquet", events_table())
    with pytest.raises(UserError, match=r"must not have a '\.\.' in it; .*secret\.parquet would work"):
        import_events_from(folder / ".." / "secret.parquet", data_of())
    write(folder / "a.parquet", events_table())
    (folder / "b.parquet").symlink_to(outside)
    with pytest.raises(UserError, match=r"b\.parquet: is a link to .*secret\.parquet, outside of data\.events"):
        import_events_from(folder, data_of())
    (folder / "b.parquet").unlink()
    (folder / "more").symlink_to(tmp_path)
    with pytest.raises(UserError, match="more: is a link to a folder"):
        import_events_from(folder, data_of())
    (folder / "more").unlink()
    (folder / "b.parquet").symlink_to(folder / "a.parquet")
    assert import_events_from(folder, data_of())["rows"] == 400


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"user_id,item_id,timestamp\na\x00b,1,1\n", {"rows": 1}),
        ("a.csv", b"user_id,item_id,timestamp\n%s,1,1\n" % (b"x" * MEBI), {"rows": 1, "long_id": 1}),
        ("a.csv", b"user_id,item_id,timestamp\ncaf\xe9,1,1\n", "line 2 is not UTF-8"),
        ("a.csv", "user_id,item_id,timestamp\nü,1,1\n".encode("utf-16"), {"rows": 1}),
        ("a.csv", b"\xef\xbb\xbfuser_id,item_id,timestamp\na,1,1\n", {"rows": 1}),
        ("a.jsonl", b'{"user_id": "a\\u0000b", "item_id": 1, "timestamp": 1}\n', {"rows": 1}),
        ("a.jsonl", b'{"user_id": "a\\ud800b", "item_id": 1, "timestamp": 1}\n', {"rows": 1}),
        ("a.jsonl", b'{"user_id": "%s", "item_id": 1, "timestamp": 1}\n' % (b"x" * MEBI), {"rows": 1, "long_id": 1}),
        ("a.jsonl", b'{"user_id": "caf\xe9", "item_id": 1, "timestamp": 1}\n', "line 1 is not valid JSON"),
        ("a.jsonl", b'{"user_id": "a", "item_id": 1, "timestamp": 1}\n{"user_id": "a\x00"', "line 2 is not valid JSON"),
        ("a.jsonl", b'{"user_id": %s, "item_id": 1, "timestamp": 1}\n' % (b"9" * 5000), "line 1 is not valid JSON"),
        ("a.inter", b"user_id:token\titem_id:token\ttimestamp:float\na\x00\t1\t1\n", {"rows": 1}),
    ],
)
def test_hostile_text(folder: Path, name: str, content: bytes, expected: dict[str, int] | str) -> None:
    path = folder / name
    path.write_bytes(content)
    if isinstance(expected, str):
        assert expected in refusal_of(path)
    else:
        assert import_events_from(path, data_of()) == expected


def test_a_catalogue_bomb_is_refused_too(folder: Path) -> None:
    path = gzip_of(folder / "a.jsonl.gz", b"", b'{"item_id": 1, "title": "%s"}\n' % (b"x" * MEBI))
    storage = Storage(str(folder))
    with pytest.raises(UserError, match=rf"{path}: its \d+ bytes expand to"):
        read_items(storage, find_files(storage, "items", str(path)), data_of(4 * LIMIT))


def flip_bits(content: bytearray, chance: random.Random) -> bytearray:
    for _ in range(chance.randint(1, 24)):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return content


def flip_in_footer(content: bytearray, chance: random.Random) -> bytearray:
    footer_bytes = struct.unpack("<I", content[-8:-4])[0]
    for _ in range(chance.randint(1, 3)):
        content[-8 - chance.randrange(1, footer_bytes)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    return content


def cut(content: bytearray, chance: random.Random) -> bytearray:
    start = chance.randrange(len(content))
    return content[:start] + content[start + chance.randint(1, 200) :]


def insert(content: bytearray, chance: random.Random) -> bytearray:
    start = chance.randrange(len(content))
    return content[:start] + chance.randbytes(chance.randint(1, 200)) + content[start:]


MUTATIONS: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (flip_bits, flip_in_footer, flip_in_footer, cut, insert)


def test_a_thousand_mutated_parquet_files_are_read_or_refused_in_one_line(folder: Path) -> None:
    originals = [
        write(folder / f"{codec}.parquet", events_table(), compression=codec, row_group_size=60).read_bytes()
        for codec in ("none", "snappy", "zstd", "gzip")
    ]
    for path in folder.iterdir():
        path.unlink()
    chance = random.Random(0)
    path = folder / "mutated.parquet"
    num_refused = num_children = last_child = 0
    for _ in range(1000):
        path.write_bytes(chance.choice(MUTATIONS)(bytearray(chance.choice(originals)), chance))
        num_refused += isinstance(outcome_of(path), str)
        child = run_limited(LIMIT, memory_of_child)
        num_children += child["id"] != last_child
        last_child = child["id"]
        assert child["peak"] < child["data"] + LIMIT
    assert 300 < num_refused < 1000
    assert num_children < 250


@pytest.mark.ray
def test_the_verb_refuses_a_bomb_in_one_line(folder: Path, tmp_path: Path) -> None:
    """The header is valid, so the bomb is found by a task on a worker."""
    write(folder / "a.parquet", events_table())
    dictionary_bomb(folder / "b.parquet", keeps_type=False)
    values = {"storage.root": tmp_path / "store", "run.scratch": tmp_path / "scratch", "data.events": folder, "data.num_shards": 2}
    options = [option for key, value in values.items() for option in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "jobs.prepare_data", *options, "--set", f"data.max_file_memory_bytes={LIMIT}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"{folder / 'b.parquet'}: " in done.stderr.strip().splitlines()[-1]
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
