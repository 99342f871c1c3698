"""A store that lists files in any order, or that holds other files next to the tables, gives the same dataset."""

import random
from pathlib import Path

import pytest

from recsys.config import load_config
from recsys.data.manifest import Dataset
from recsys.ingest.prepare import prepare
from recsys.ingest.sources.input_files import find_files
from recsys.store import Storage
from tests.proxy import FaultProxy, Faults
from tests.without_ray import patch_run_tasks

NUM_FILES = 7
STRAYS = ("_SUCCESS", ".part-0.csv.crc", "notes.txt", "folder/", "_temporary/0/part-9.csv", ".hidden/part-9.csv")


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_run_tasks(monkeypatch)


def event_files() -> dict[str, str]:
    """Write events whose ties in time make the dataset depend on the order of the files."""
    generator = random.Random(0)
    rows = [f"u{generator.randrange(30)},i{generator.randrange(20)},{generator.randrange(40)}" for _ in range(50 * NUM_FILES)]
    lines = ["user_id,item_id,timestamp"]
    return {f"part-{number}.csv": "\n".join(lines + rows[number::NUM_FILES]) + "\n" for number in range(NUM_FILES)}


def prepare_from(storage: Storage, name: str) -> Dataset:
    overrides = [f"storage.root={storage.root}", f"data.events={storage.uri(name)}", "data.num_shards=2"]
    if storage.endpoint:
        overrides.append(f"storage.endpoint={storage.endpoint}")
    return prepare(load_config(None, overrides), storage)


def content(dataset: Dataset) -> tuple[str, list[tuple[str, str]]]:
    manifest = dataset.manifest
    shards = (*manifest.train_shards, *manifest.users_shards, *manifest.catalogue_shards)
    return manifest.fingerprint, [(shard.path, shard.sha256) for shard in shards]


def test_an_order_of_the_files_that_mattered_would_be_seen(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "store"))
    files = event_files()
    for name, text in zip(files, reversed(files.values()), strict=True):
        storage.write_bytes(storage.uri("reversed", name), text.encode())
    for name, text in files.items():
        storage.write_bytes(storage.uri("straight", name), text.encode())
    assert content(prepare_from(storage, "straight")) != content(prepare_from(storage, "reversed"))


def test_a_shuffled_listing_with_strays_makes_no_difference(faulty_storage: Storage, s3_proxy: FaultProxy, tmp_path: Path) -> None:
    local = Storage(str(tmp_path / "store"))
    for name, text in event_files().items():
        local.write_bytes(local.uri("in", name), text.encode())
        faulty_storage.write_bytes(faulty_storage.uri("in", name), text.encode())
    found = find_files(faulty_storage, "events", faulty_storage.uri("in"))
    s3_proxy.faults = Faults(shuffles_listings=True, stray_names=STRAYS, stray_prefix="/in/")
    assert find_files(faulty_storage, "events", faulty_storage.uri("in")) == found
    assert len(found) == NUM_FILES
    assert content(prepare_from(faulty_storage, "in")) == content(prepare_from(local, "in"))
    assert s3_proxy.counts["listing"] > 2


def test_strays_in_a_folder_make_no_difference(any_storage: Storage, tmp_path: Path) -> None:
    local = Storage(str(tmp_path / "other"))
    for name, text in reversed(event_files().items()):
        local.write_bytes(local.uri("in", name), text.encode())
        any_storage.write_bytes(any_storage.uri("in", name), text.encode())
    for name in STRAYS:
        if not name.endswith("/"):
            any_storage.write_bytes(any_storage.uri("in", name), b"user_id,item_id,timestamp\nu1,i1,1\n")
    if any_storage.endpoint is None:
        (tmp_path / "store" / "in" / "folder").mkdir()
    assert len(find_files(any_storage, "events", any_storage.uri("in"))) == NUM_FILES
    assert content(prepare_from(any_storage, "in")) == content(prepare_from(local, "in"))
