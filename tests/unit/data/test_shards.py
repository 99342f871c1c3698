"""Row groups from the store: only the needed bytes are fetched, the cache saves requests, and damage in it is detected."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config import Config, load_config
from recsys.data import reader as reader_module
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset, Shard
from recsys.data.node_files import DiskCache
from recsys.data.reader import Reader, Share
from recsys.data.shards import RowGroupSource
from recsys.schema import TRAIN_SCHEMA
from recsys.store import Storage, join, sha256_of
from tests.conftest import S3Server
from tests.datasets import make_dataset

COLUMNS = ("items", "first_target")
NUM_GROUPS = 60
GROUP_ROWS = 1000
LENGTH = 8


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Record the size of every fetched range."""
    sizes: list[int] = []
    read_range = Storage.read_range

    def noted(storage: Storage, uri: str, start: int, num_bytes: int, etag: str = "") -> bytes:
        sizes.append(num_bytes)
        return read_range(storage, uri, start, num_bytes, etag)

    monkeypatch.setattr(Storage, "read_range", noted)
    return sizes


@pytest.fixture
def groups_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Record every decoded row group."""
    groups: list[int] = []
    read = RowGroupSource.read

    def noted(source: RowGroupSource, group: int) -> pa.Table:
        groups.append(group)
        return read(source, group)

    monkeypatch.setattr(RowGroupSource, "read", noted)
    return groups


@pytest.fixture
def dataset(moto_server: S3Server, tmp_path: Path) -> Dataset:
    """Return a dataset on S3 with one shard of many row groups."""
    small = make_dataset(moto_server.fresh_storage())
    random = np.random.default_rng(0)
    num_rows = NUM_GROUPS * GROUP_ROWS
    offsets = pa.array(np.arange(num_rows + 1) * LENGTH, pa.int32())
    values = {
        "items": random.integers(1, 40, num_rows * LENGTH).astype(np.int32),
        "events": np.zeros(num_rows * LENGTH, np.int8),
        "timestamps": random.integers(0, 2**40, num_rows * LENGTH),
        "values": random.random(num_rows * LENGTH).astype(np.float32),
        "queries": np.zeros(num_rows * LENGTH, np.int32),
    }
    lists = [pa.ListArray.from_arrays(offsets, pa.array(column)) for column in values.values()]
    rows = pa.table([pa.array(np.arange(num_rows)), *lists, pa.array(np.ones(num_rows, np.int32))], schema=TRAIN_SCHEMA)
    path = tmp_path / "shard.parquet"
    pq.write_table(rows, path, row_group_size=GROUP_ROWS, write_page_checksum=True, use_dictionary=False)
    uri = join(small.uri, "train/large.parquet")
    small.storage.upload(path, uri)
    found = small.storage.stat(uri)
    assert found
    shard = Shard(
        path="train/large.parquet",
        row_groups=(GROUP_ROWS,) * NUM_GROUPS,
        num_bytes=found.num_bytes,
        sha256=sha256_of(path),
        etag=found.etag,
    )
    manifest = small.manifest.model_copy(update={"train_shards": (shard,), "num_streams": 12})
    return Dataset(small.storage, small.uri, manifest)


@pytest.fixture(scope="module")
def local_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("store"))), num_users=300, max_history=4)


def settings(scratch: Path, **values: object) -> Config:
    base = {
        "run.scratch": str(scratch),
        "training.global_batch_size": 48,
        "training.micro_batch_size": 24,
        "training.num_workers": 1,
        "training.shuffle_row_groups": 1,
        "training.prefetch_bytes": 0,
    }
    return load_config().with_values({**base, **{key.replace("__", "."): value for key, value in values.items()}})


def test_only_the_wanted_columns_are_fetched(dataset: Dataset, fetched: list[int]) -> None:
    whole = dataset.read_shard(dataset.manifest.train_shards[0])
    fetched.clear()
    source = RowGroupSource(dataset, COLUMNS)
    tables = [source.read(group) for group in range(NUM_GROUPS)]
    assert pa.concat_tables(tables).equals(whole.select(COLUMNS))
    assert sum(fetched) < 0.5 * dataset.manifest.train_shards[0].num_bytes


def test_what_is_cached_is_not_fetched_again(dataset: Dataset, fetched: list[int], tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 1 << 30)
    first = RowGroupSource(dataset, COLUMNS, cache).read(3)
    assert len(fetched) > 1
    fetched.clear()
    again = RowGroupSource(dataset, COLUMNS, DiskCache(tmp_path / "cache", 1 << 30)).read(3)
    assert again.equals(first)
    assert len(fetched) == 1  # only the footer


def test_a_damaged_cache_is_found_by_the_pages_checksums(dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = DiskCache(tmp_path / "cache", 1 << 30)
    first = RowGroupSource(dataset, COLUMNS, cache).read(3)
    for path in (tmp_path / "cache").glob("??/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert RowGroupSource(dataset, COLUMNS, cache).read(3).equals(first)
    assert "is damaged" in caplog.text
    caplog.clear()
    assert RowGroupSource(dataset, COLUMNS, cache).read(3).equals(first)
    assert not caplog.records


def test_going_on_late_reads_as_much_as_starting_and_nothing_of_what_was_passed(
    dataset: Dataset, groups_read: list[int], tmp_path: Path
) -> None:
    reader = Reader(dataset, ItemFeatures.read(dataset), settings(tmp_path), Share(0, 1, 2))
    plan = reader.plan(0)
    counts = []
    for step in (plan.num_steps // 100, plan.num_steps * 9 // 10):
        groups_read.clear()
        rows = next(reader.rows(0, step))
        assert rows.scalars["sample_id"].tolist() == plan.step_ids(step).tolist()
        counts.append(len(groups_read))
        passed = {group for stream in range(12) for window in plan.windows(stream) for group, *_ in window.spans if window.end <= step * 4}
        needed = {group for stream in range(12) for window in plan.windows(stream) for group, *_ in window.spans if window.end > step * 4}
        assert not set(groups_read) & (passed - needed)
    assert counts[1] <= counts[0] + 1


@pytest.mark.parametrize("world_size", [2, 4, 6])
def test_ranks_divide_the_row_groups_but_for_those_that_a_cut_divides(
    dataset: Dataset, groups_read: list[int], world_size: int, tmp_path: Path
) -> None:
    config = settings(tmp_path, training__micro_batch_size=48 // world_size)
    for rank in range(world_size):
        reader = Reader(dataset, ItemFeatures.read(dataset), config, Share(rank, world_size, 1))
        for _ in reader.rows(0):
            pass
    assert NUM_GROUPS <= len(groups_read) <= NUM_GROUPS + 12


def test_nothing_is_read_ahead_beyond_the_limit(dataset: Dataset, groups_read: list[int], tmp_path: Path) -> None:
    few = Reader(dataset, ItemFeatures.read(dataset), settings(tmp_path), Share(0, 1, 2))
    next(few.rows(0))
    without_limit = len(groups_read)
    groups_read.clear()
    many = Reader(dataset, ItemFeatures.read(dataset), settings(tmp_path, training__prefetch_bytes=1 << 20), Share(0, 1, 2))
    rows = many.rows(0)
    next(rows)
    deadline = time.monotonic() + 20
    while len(groups_read) <= without_limit and time.monotonic() < deadline:  # threads read ahead
        time.sleep(0.01)
    rows.close()
    assert without_limit < len(groups_read) <= NUM_GROUPS


@pytest.mark.parametrize("world_size", [1, 2, 5, 7, 9, 11, 13, 14, 16])
@pytest.mark.parametrize("window", [0, 1, 3])
def test_any_number_of_ranks_reads_the_plan_also_where_it_does_not_divide_the_streams(
    local_dataset: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, world_size: int, window: int
) -> None:
    monkeypatch.setattr(reader_module, "_SPAN_ROWS", 3)
    content = [row for shard in local_dataset.manifest.train_shards for row in local_dataset.read_shard(shard)["items"].to_pylist()]
    features = ItemFeatures.read(local_dataset)
    for share in (1, 3):
        sizes = {"training__micro_batch_size": 1, "training__global_batch_size": share * world_size}
        config = settings(tmp_path, training__shuffle_row_groups=window, **sizes)
        for rank in range(world_size):
            reader = Reader(local_dataset, features, config, Share(rank, world_size, share))
            plan = reader.plan(0)
            first_step = 3 * rank
            for step, rows in enumerate(reader.rows(0, first_step), start=first_step):
                assert rows.scalars["sample_id"].tolist() == plan.step_ids(step, rank, world_size).tolist()
                spans = zip(rows.starts, rows.starts + rows.lengths, strict=True)
                assert [rows.columns["items"][slice(*span)].tolist() for span in spans] == [
                    content[sample] for sample in rows.scalars["sample_id"]
                ]
