"""Reading a dataset from a store that fails, is slow, or whose shards are replaced: the same batches, or a one-line error."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from botocore.retries.standard import ExponentialBackoff

from recsys.config import Config, load_config
from recsys.data import reader as reader_module
from recsys.data.batch import Batch, map_tensors
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.reader import Reader, Share
from recsys.data.shards import RowGroupSource
from recsys.errors import UserError
from recsys.objectives.next_item import NextItem
from recsys.store import Storage, backends
from recsys.train.loop import Trainer
from tests.datasets import make_dataset
from tests.distributed import run_distributed
from tests.proxy import CODES, FAULTS, Fault, FaultProxy, Faults
from tests.reporters import LocalReporter

NUM_USERS = 800
LIMIT_SECONDS = 15.0
MAX_EPOCHS = 40


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten timeouts and pauses, not the attempts; request this fixture first, since clients keep the values from their creation."""
    monkeypatch.setattr(backends, "READ_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(backends, "LONGEST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("store"))), num_users=NUM_USERS)


@pytest.fixture
def stored(faulty_storage: Storage) -> Dataset:
    return make_dataset(faulty_storage, num_users=NUM_USERS)


def config(scratch: Path, **values: object) -> Config:
    base = {
        "run.scratch": str(scratch),
        "training.global_batch_size": 32,
        "training.micro_batch_size": 16,
        "training.num_workers": 1,
        "training.cache_bytes": 0,
    }
    return load_config().with_values({**base, **{key.replace("__", "."): value for key, value in values.items()}})


@pytest.fixture
def near_sighted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the reader fetch only what a few steps need, so the first step does not read the whole small dataset."""
    monkeypatch.setattr(reader_module, "_SPAN_ROWS", 32)


def unhurried(scratch: Path) -> Config:
    """Read nothing ahead."""
    return config(scratch, training__prefetch_bytes=0, training__shuffle_row_groups=1)


def make_reader(dataset: Dataset, settings: Config) -> Reader:
    return Reader(dataset, ItemFeatures.read(dataset), settings, Share(0, 1, 2))


def assert_equal(left: Iterator[list[Batch]], right: Iterator[list[Batch]]) -> None:
    """Compare steps batch by batch, tensor by tensor, bit by bit."""
    for batches, others in zip(left, right, strict=True):
        for batch, other in zip(batches, others, strict=True):
            for one, two in zip(tensors(batch), tensors(other), strict=True):
                torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
            assert batch.histories.groups == other.histories.groups


def tensors(batch: Batch) -> list[torch.Tensor]:
    """List the batch's tensors, including those of its histories."""
    found: list[torch.Tensor] = []
    map_tensors(batch, lambda tensor: found.append(tensor) or tensor)
    return found


@pytest.mark.parametrize("rate", [pytest.param(0.01, marks=pytest.mark.slow), pytest.param(0.1, marks=pytest.mark.slow), 0.3])
@pytest.mark.parametrize("fault", FAULTS)
def test_batches_are_those_of_an_undisturbed_run(
    hasty: None, stored: Dataset, undisturbed: Dataset, s3_proxy: FaultProxy, tmp_path: Path, fault: Fault, rate: float
) -> None:
    settings = config(tmp_path)
    faulty, clean = make_reader(stored, settings), make_reader(undisturbed, settings)
    s3_proxy.faults = Faults({fault: rate}, stall_seconds=1)
    for epoch in range(MAX_EPOCHS):
        assert_equal(faulty.steps(epoch), clean.steps(epoch))
        if s3_proxy.num_faults >= 2:
            break
    assert stored.storage.num_retries >= s3_proxy.num_faults >= 2  # a busy machine may run into a time limit more often


def test_all_faults_at_once(hasty: None, stored: Dataset, undisturbed: Dataset, s3_proxy: FaultProxy, tmp_path: Path) -> None:
    settings = config(tmp_path, training__cache_bytes=1 << 24)
    s3_proxy.faults = Faults(dict.fromkeys(FAULTS, 0.04), stall_seconds=1)
    for epoch in range(2):  # the second epoch comes from the cache
        assert_equal(make_reader(stored, settings).steps(epoch), make_reader(undisturbed, settings).steps(epoch))
    assert stored.storage.num_retries > 0


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "wrong_etag"])
def test_a_store_that_stays_out_of_order_stops_the_reader_in_one_line(
    hasty: None, near_sighted: None, stored: Dataset, s3_proxy: FaultProxy, tmp_path: Path, fault: Fault
) -> None:
    steps = make_reader(stored, unhurried(tmp_path)).steps(0)
    next(steps)
    s3_proxy.faults = Faults({fault: 1}, stall_seconds=2)
    begin = time.monotonic()
    with pytest.raises(UserError) as error:
        list(steps)
    assert time.monotonic() - begin < LIMIT_SECONDS
    assert "\n" not in str(error.value)
    assert any(stored.address(shard) in str(error.value) for shard in stored.manifest.train_shards)
    assert CODES[fault] in str(error.value)


def test_a_wrong_etag_that_stays_costs_one_look_at_the_content(
    hasty: None, near_sighted: None, stored: Dataset, undisturbed: Dataset, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    settings = unhurried(tmp_path)
    s3_proxy.faults = Faults({"wrong_etag": 1})
    assert_equal(make_reader(stored, settings).steps(0), make_reader(undisturbed, settings).steps(0))


@pytest.mark.slow
def test_stalls_of_half_a_minute_are_borne_with_the_timeouts_that_are_shipped(
    stored: Dataset, undisturbed: Dataset, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    settings = config(tmp_path)
    s3_proxy.faults = Faults({"stall": 0.05, "stall_in_body": 0.05}, stall_seconds=30)
    begin = time.monotonic()
    assert_equal(make_reader(stored, settings).steps(0), make_reader(undisturbed, settings).steps(0))
    assert stored.storage.num_retries >= s3_proxy.num_faults > 0
    patience = backends.READ_TIMEOUT_SECONDS + backends.LONGEST_PAUSE_SECONDS
    assert time.monotonic() - begin < 30 + s3_proxy.num_faults * patience


def test_a_slow_store_is_read_to_the_end(
    hasty: None, faulty_storage: Storage, s3_proxy: FaultProxy, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dataset = make_dataset(faulty_storage, num_users=3000)
    clean = make_dataset(Storage(str(tmp_path_factory.mktemp("store"))), num_users=3000)
    settings = config(tmp_path)
    s3_proxy.faults = Faults(bytes_per_second=1_000_000)
    num_bytes = sum(shard.num_bytes for shard in dataset.manifest.train_shards)
    begin = time.monotonic()
    assert_equal(make_reader(dataset, settings).steps(0), make_reader(clean, settings).steps(0))
    assert num_bytes / 4e6 < time.monotonic() - begin < num_bytes / 1e6 + LIMIT_SECONDS


def waited_seconds(settings: Config) -> float:
    """Train one epoch; return the time that the run reports as waiting for data."""
    dataset = Dataset.open(Storage.from_config(settings.storage), settings.data.dataset)
    return Trainer(dataset.complete(settings), dataset, LocalReporter(), NextItem).run().data_wait_seconds


def test_a_slow_store_shows_in_the_time_that_a_run_waits_for_data(
    hasty: None, faulty_storage: Storage, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    dataset = make_dataset(faulty_storage, num_users=3000)
    num_bytes = sum(shard.num_bytes for shard in dataset.manifest.train_shards)
    settings = config(
        tmp_path,
        storage__root=faulty_storage.root,
        storage__endpoint=faulty_storage.endpoint,
        data__dataset=dataset.uri,
        model__width=8,
        model__text__mode="off",
        training__epochs=1,
        training__zero_stage=0,
        training__prefetch_bytes=0,  # or all would be read while the first step's samples are looked at and the engine is built
    )
    quick = run_distributed(waited_seconds, 1, settings.with_values({"run.name": "quick"}))[0]
    s3_proxy.faults = Faults(bytes_per_second=200_000)
    slow = run_distributed(waited_seconds, 1, settings.with_values({"run.name": "slow"}))[0]
    assert slow > quick + 0.3 * num_bytes / 2e5


def test_a_reader_that_is_left_while_the_store_stalls_ends_soon(
    hasty: None, near_sighted: None, stored: Dataset, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    steps = make_reader(stored, unhurried(tmp_path)).steps(0)
    next(steps)
    s3_proxy.faults = Faults({"stall": 1}, stall_seconds=60)
    time.sleep(0.1)
    begin = time.monotonic()
    steps.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begin < LIMIT_SECONDS


def write_other_rows(dataset: Dataset, number: int, folder: Path) -> None:
    """Replace a shard by a Parquet file with the same schema, row groups and size but different items."""
    shard = dataset.manifest.train_shards[number]
    original = folder / "original.parquet"
    dataset.storage.download(dataset.address(shard), original)
    rows = pq.read_table(original)
    for shift in range(1000, 1200):  # a checksum may take a byte more or less, so several are tried
        others = rows.set_column(1, rows.schema.field(1), replace_items(rows["items"], shift))
        pq.write_table(others, folder / "other.parquet", row_group_size=16, write_page_checksum=True)
        other = (folder / "other.parquet").read_bytes()
        if len(other) == shard.num_bytes:
            break
    assert pq.read_metadata(folder / "other.parquet").schema.equals(pq.read_metadata(original).schema)
    assert len(other) == shard.num_bytes
    dataset.storage.write_bytes(dataset.address(shard), other)


def replace_items(column: pa.ChunkedArray, shift: int) -> pa.ChunkedArray:
    """Replace every item by a different one; no two become equal, so the file keeps its size."""
    return pa.chunked_array(
        [pa.ListArray.from_arrays(part.offsets, pa.array(shift + part.values.to_numpy(), pa.int32())) for part in column.chunks]
    )


@pytest.mark.parametrize("is_noted", [True, False])
def test_a_shard_replaced_while_it_is_read_stops_the_reader_before_one_of_its_rows(
    hasty: None, near_sighted: None, any_storage: Storage, tmp_path: Path, is_noted: bool
) -> None:
    dataset = make_dataset(any_storage, num_users=NUM_USERS)
    if not is_noted:
        shards = tuple(shard.model_copy(update={"etag": ""}) for shard in dataset.manifest.train_shards)
        dataset = dataclasses.replace(dataset, manifest=dataset.manifest.model_copy(update={"train_shards": shards}))
    steps = make_reader(dataset, unhurried(tmp_path)).steps(0)
    next(steps)
    write_other_rows(dataset, 1, tmp_path)
    handed_out: list[Batch] = []
    with pytest.raises(UserError, match="replaced") as error:
        handed_out.extend(batch for batches in steps for batch in batches)
    assert all(int(batch.items[batch.histories.items].max()) < 1000 for batch in handed_out)
    assert dataset.address(dataset.manifest.train_shards[1]) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_local_shard_replaced_just_before_it_is_opened_is_not_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, open_file = make_dataset(Storage(str(tmp_path / "store")), num_users=NUM_USERS), pq.ParquetFile
    source, first = RowGroupSource(dataset, ["items"]), len(dataset.manifest.train_shards[0].row_groups)
    before = source.read(first)

    def open_late(path: str, **options: Any) -> pq.ParquetFile:
        monkeypatch.undo()
        write_other_rows(dataset, 1, tmp_path)
        return open_file(path, **options)

    assert source.read(first).equals(before)
    monkeypatch.setattr(pq, "ParquetFile", open_late)
    with pytest.raises(UserError, match="replaced"):
        source.read(first)


@pytest.mark.parametrize("content", [b"", b"short", b"long" * 50_000])
def test_a_shard_replaced_by_something_else_is_named(
    hasty: None, near_sighted: None, any_storage: Storage, tmp_path: Path, content: bytes
) -> None:
    dataset = make_dataset(any_storage, num_users=NUM_USERS)
    steps = make_reader(dataset, unhurried(tmp_path)).steps(0)
    next(steps)
    any_storage.write_bytes(dataset.address(dataset.manifest.train_shards[1]), content)
    with pytest.raises(UserError, match="replaced") as error:
        list(steps)
    assert dataset.address(dataset.manifest.train_shards[1]) in str(error.value)


def test_a_shard_that_was_copied_is_hashed_and_read(hasty: None, near_sighted: None, any_storage: Storage, tmp_path: Path) -> None:
    dataset = make_dataset(any_storage, num_users=NUM_USERS)
    settings = unhurried(tmp_path)
    whole = list(make_reader(dataset, settings).steps(0))
    steps = make_reader(dataset, settings).steps(0)
    first = next(steps)
    shard = dataset.manifest.train_shards[1]
    any_storage.write_bytes(dataset.address(shard), any_storage.read_bytes(dataset.address(shard)))
    assert_equal(iter([first, *steps]), iter(whole))
