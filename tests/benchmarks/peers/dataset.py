"""The dataset that all peers read: long sequences, several shards, one row per user; and an S3 server with a copy of it."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.manifest import MANIFEST_NAME, Dataset, Shard
from recsys.launch.head import free_port
from recsys.schema import TRAIN_SCHEMA
from recsys.store import Storage, join, sha256_of
from tests.datasets import make_dataset
from tests.servers import answers

NUM_ITEMS = 2000
NUM_SHARDS = 8
BUCKET = "bench"
KEYS = {"AWS_ACCESS_KEY_ID": "AKIDBENCHBENCH", "AWS_SECRET_ACCESS_KEY": "secret-of-the-bench", "AWS_EC2_METADATA_DISABLED": "true"}


def generate(folder: Path, num_rows: int, row_group_rows: int) -> Dataset:
    """Write a dataset of `num_rows` rows with 10 to 50 interactions, 30 on average."""
    storage = Storage(str(folder / "store"))
    small = make_dataset(storage, num_users=50, num_items=NUM_ITEMS, max_history=50)
    uri = storage.uri("datasets", "bench")
    generator = np.random.default_rng(0)
    shards = []
    for number, ids in enumerate(np.array_split(np.arange(num_rows), NUM_SHARDS)):
        path = Path(join(uri, f"train/{number}.parquet"))
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_rows(generator, ids), path, row_group_size=row_group_rows, write_page_checksum=True)
        metadata = pq.read_metadata(path)
        groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        shards.append(Shard(path=f"train/{number}.parquet", row_groups=groups, num_bytes=path.stat().st_size, sha256=sha256_of(path)))
    for part in ("catalogue", "users"):
        shutil.copytree(join(small.uri, part), join(uri, part))
    dataset = Dataset(storage, uri, small.manifest.model_copy(update={"train_shards": tuple(shards), "num_streams": 12}))
    return _note_etags(dataset)


def _rows(generator: np.random.Generator, ids: np.ndarray) -> pa.Table:
    lengths = generator.integers(10, 51, len(ids))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    total = int(lengths.sum())
    columns = (
        generator.integers(1, NUM_ITEMS + 1, total).astype(np.int32),
        generator.integers(0, 2, total).astype(np.int8),
        1_600_000_000 + np.arange(total) * 60,
        generator.integers(1, 6, total).astype(np.float32),
        np.zeros(total, np.int32),
    )
    lists = [pa.ListArray.from_arrays(offsets, pa.array(column)) for column in columns]
    return pa.table([pa.array(ids), *lists, pa.array(np.ones(len(ids), np.int32))], schema=TRAIN_SCHEMA)


def _note_etags(dataset: Dataset) -> Dataset:
    """Write the manifest with the current ETags of the shards."""
    found = {entry.uri: entry.etag for entry in dataset.storage.list(dataset.uri)}

    def noted(shards: tuple[Shard, ...]) -> tuple[Shard, ...]:
        return tuple(shard.model_copy(update={"etag": found[join(dataset.uri, shard.path)]}) for shard in shards)

    old = dataset.manifest
    shards = {name: noted(getattr(old, name)) for name in ("train_shards", "catalogue_shards", "users_shards")}
    manifest = old.model_copy(update=shards)
    dataset.storage.write_bytes(join(dataset.uri, MANIFEST_NAME), manifest.model_dump_json().encode())
    return Dataset(dataset.storage, dataset.uri, manifest)


@contextmanager
def served_copy(dataset: Dataset, folder: Path) -> Iterator[Dataset]:
    """Serve a copy of the dataset with rclone on loopback."""
    os.environ.update(KEYS)
    copy = folder / "buckets" / BUCKET / "store" / "datasets" / "bench"
    if not copy.exists():
        shutil.copytree(dataset.uri, copy)
    port = free_port()
    arguments = ["serve", "s3", "--config", os.devnull, "--addr", f"127.0.0.1:{port}", "--auth-key", ",".join(list(KEYS.values())[:2])]
    rclone = Path(sys.executable).with_name("rclone")
    process = subprocess.Popen([str(rclone), *arguments, str(folder / "buckets")], stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"http://127.0.0.1:{port}")
        storage = Storage(f"s3://{BUCKET}/store", f"http://127.0.0.1:{port}")
        yield _note_etags(Dataset(storage, storage.uri("datasets", "bench"), dataset.manifest))
    finally:
        process.terminate()
        process.wait(timeout=10)


def _wait_for(endpoint: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if answers(endpoint):
            return
        time.sleep(0.1)
    raise TimeoutError(f"{endpoint}: rclone does not answer")
