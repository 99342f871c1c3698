"""Reading a dataset of several versions: addresses, newest rows, summed counts; and invalid manifests."""

import pickle

import pyarrow as pa
import pytest

from recsys.data.manifest import MANIFEST_NAME, Dataset, Shard, content_fingerprint, last_rows
from recsys.errors import UserError
from recsys.ingest.shuffle import write_table
from recsys.schema import CATALOGUE_SCHEMA, COUNTS_SCHEMA, USERS_SCHEMA
from recsys.store import Storage, join
from tests.datasets import make_dataset


def shard_of(storage: Storage, uri: str, path: str, table: pa.Table, dataset: str = "") -> Shard:
    write_table(storage, join(uri, path), table)
    return Shard(path=path, row_groups=(table.num_rows,), num_bytes=1, sha256="0", dataset=dataset)


def two_versions(storage: Storage) -> tuple[Dataset, Dataset]:
    """Return a dataset, and a version with a new history of user 3, a new title of item 2, and more counts for items 1 and 2."""
    base = make_dataset(storage, num_users=20)
    uri = storage.uri("datasets", "second")
    manifest = base.manifest
    inherited = {
        name: [shard.model_copy(update={"dataset": base.name}) for shard in getattr(manifest, name)]
        for name in ("train_shards", "users_shards", "catalogue_shards")
    }
    user = {**base.read_users().slice(3, 1).to_pylist()[0], "items": [7, 8, 9]}
    item = {**base.catalogue.slice(1, 1).to_pylist()[0], "title": "Another"}
    inherited["users_shards"].append(shard_of(storage, uri, "users/0.parquet", pa.Table.from_pylist([user], USERS_SCHEMA)))
    inherited["catalogue_shards"].append(shard_of(storage, uri, "catalogue/0.parquet", pa.Table.from_pylist([item], CATALOGUE_SCHEMA)))
    counts = [shard_of(storage, uri, f"counts/{n}.parquet", pa.table([[1, 2], [n, -1]], schema=COUNTS_SCHEMA)) for n in (5, 6)]
    updates = {
        "version": 2,
        "base": base.name,
        "count_shards": tuple(counts),
        **{name: tuple(shards) for name, shards in inherited.items()},
    }
    storage.write_bytes(join(uri, MANIFEST_NAME), manifest.model_copy(update=updates).model_dump_json().encode())
    return base, Dataset.open(storage, uri)


def test_the_last_row_of_a_user_counts_also_for_some_columns(any_storage: Storage) -> None:
    base, dataset = two_versions(any_storage)
    before, after = base.read_users(), dataset.read_users()
    assert after["user_index"].to_pylist() == list(range(20))
    assert after["items"].to_pylist() == [[7, 8, 9] if index == 3 else row for index, row in enumerate(before["items"].to_pylist())]
    assert dataset.read_users(["items", "user_id"]).equals(after.select(["items", "user_id"]))


def test_the_catalogue_has_changed_items_and_all_counts(any_storage: Storage) -> None:
    base, dataset = two_versions(any_storage)
    before, after = base.catalogue.to_pydict(), dataset.catalogue.to_pydict()
    assert after["title"] == [before["title"][0], "Another", *before["title"][2:]]
    expected = [before["train_count"][0] + 11, before["train_count"][1] - 2, *before["train_count"][2:]]
    assert after["train_count"] == expected
    assert dataset.catalogue_rows["train_count"].to_pylist() == before["train_count"]


def test_an_address_is_in_the_folder_of_the_version_that_wrote_it(any_storage: Storage) -> None:
    base, dataset = two_versions(any_storage)
    addresses = [dataset.address(shard) for shard in dataset.manifest.users_shards]
    assert addresses == [f"{base.uri}/users/0.parquet", f"{dataset.uri}/users/0.parquet"]


def test_a_dataset_travels_without_the_tables_that_it_has_read(any_storage: Storage) -> None:
    base, _ = two_versions(any_storage)
    size = len(pickle.dumps(base))
    assert base.catalogue.num_rows
    assert len(pickle.dumps(base)) == size


def test_last_rows_of_nothing_are_none() -> None:
    assert last_rows(USERS_SCHEMA.empty_table(), "user_index").num_rows == 0


def test_a_fingerprint_is_of_the_content_not_of_the_place() -> None:
    shard = {"path": "a", "sha256": "1", "etag": "x", "dataset": ""}
    fields = {"num_users": 1, "base": "one", "fingerprint": "", "inputs": ["/here"], "users_shards": [shard]}
    moved = {**fields, "base": "two", "inputs": ["/there"], "users_shards": [{**shard, "etag": "y", "dataset": "three"}]}
    changed = {**fields, "users_shards": [{**shard, "sha256": "2"}]}
    assert content_fingerprint(fields) == content_fingerprint(moved) != content_fingerprint(changed)


@pytest.mark.parametrize(
    ("text", "message"), [(b"", "Invalid JSON"), (b'{"format_version": 2}', "format_version: Input should be 5"), (b"[]", "the file: ")]
)
def test_what_is_no_manifest_is_refused_in_one_line(tmp_path: object, text: bytes, message: str) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes(storage.uri("datasets", "a", MANIFEST_NAME), text)
    with pytest.raises(UserError, match=r"manifest\.json: is not a manifest of format 5 \(.*" + message):
        Dataset.open(storage, storage.uri("datasets", "a"))
