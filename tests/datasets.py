"""Small datasets for tests, written directly in the dataset's schema, without Ray and preparation."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recsys.config import Config, load_config
from recsys.data.items import ItemFeatures
from recsys.data.manifest import MANIFEST_NAME, Dataset, DatasetManifest, Shard, content_fingerprint
from recsys.data.sequences import Sequences, cut_windows
from recsys.schema import CATALOGUE_SCHEMA, QUERIES_SCHEMA, TIE_RULE, TRAIN_SCHEMA, USERS_SCHEMA, Kind, derive_tasks
from recsys.store import Storage, join, sha256_of

GENRES = ("comedy", "drama", "horror", "science fiction", "western")
KINDS = ("view", "purchase")


class Window(NamedTuple):
    """A sample `sequence[start:stop]`; its interactions from `first_target` on (relative to `start`) are targets."""

    start: int
    stop: int
    first_target: int


def windows_of(length: int, max_history: int, stride: int, first: int = 1) -> list[Window]:
    """Cut one sequence into the windows that become samples."""
    whole = Sequences.of_offsets({"items": np.arange(length)}, np.array([0, length]), first_target=np.array([first]))
    cut = cut_windows(whole, max_history, np.array([stride]))
    return list(map(Window, cut.starts.tolist(), (cut.starts + cut.lengths).tolist(), cut.scalars["first_target"].tolist()))


def make_dataset(
    storage: Storage, num_users: int = 60, num_items: int = 40, max_history: int = 10, seed: int = 0, has_queries: bool = False
) -> Dataset:
    """Write a dataset in which each user goes through the items of one genre in order, with some noise.

    With queries, two of three interactions follow a query word that occurs in no item's text (see `wish`).
    """
    generator = np.random.default_rng(seed)
    users = [_make_user(generator, index, num_items) for index in range(num_users)]
    for user in users:
        asked = (np.arange(len(user["items"])) + user["user_index"]) % 3 > 0 if has_queries else np.zeros(len(user["items"]), bool)
        user["queries"] = (asked * (num_items + 1 - np.array(user["items"]))).tolist()
    samples = [
        {"user_index": user["user_index"], "first_target": window.first_target}
        | {name: user[name][window.start : window.stop] for name in ("items", "events", "timestamps", "values", "queries")}
        for user in users
        for window in windows_of(user["num_train"], max_history, max_history)
    ]
    counts = np.bincount(np.concatenate([user["items"][: user["num_train"]] for user in users]), minlength=num_items + 1)
    catalogue = [_make_item(index, int(counts[index])) for index in range(1, num_items + 1)]
    queries = [{"query_index": index, "query": wish(num_items + 1 - index)} for index in range(1, num_items + 1)]
    half = len(samples) // 2
    uri = storage.uri("datasets", f"tiny-{num_users}-{num_items}-{seed}" + "-queries" * has_queries)
    values = np.concatenate([user["values"][: user["num_train"]] for user in users])
    fields: dict[str, Any] = {
        "inputs": (),
        "data_config": {"max_history": max_history},
        "tie_rule": TIE_RULE,
        "num_users": num_users,
        "num_items": num_items,
        "num_interactions": sum(len(user["items"]) for user in users),
        "num_targets": sum(len(sample["items"]) - sample["first_target"] for sample in samples),
        "rejected": {},
        "event_kinds": KINDS,
        "tasks": derive_tasks(tuple(map(Kind, KINDS)), len(values), 4.0),
        "value_mean": float(values.mean()),
        "value_std": float(values.std()),
        "has_time": True,
        "num_streams": 12,
        "category_vocabulary": tuple(f"genre={genre}" for genre in GENRES),
        "number_columns": ("price",),
        "vector_size": 0,
        "train_shards": tuple(
            _write(storage, uri, f"train/{number}.parquet", part, TRAIN_SCHEMA)
            for number, part in enumerate((samples[:half], samples[half:]))
        ),
        "users_shards": (_write(storage, uri, "users/0.parquet", users, USERS_SCHEMA),),
        "num_queries": num_items * has_queries,
        "query_shards": (_write(storage, uri, "queries/0.parquet", queries, QUERIES_SCHEMA),) if has_queries else (),
        "catalogue_shards": (_write(storage, uri, "catalogue/0.parquet", catalogue, CATALOGUE_SCHEMA),),
    }
    unnamed = DatasetManifest(fingerprint="", **fields)
    manifest = unnamed.model_copy(update={"fingerprint": content_fingerprint(unnamed.model_dump(mode="json"))})
    storage.write_bytes(join(uri, MANIFEST_NAME), manifest.model_dump_json().encode())
    return Dataset.open(storage, uri)


def small_settings(dataset: Dataset, folder: Path, **values: object) -> dict[str, object]:
    """Return the settings of a small run on a dataset of `make_dataset`; `values` override them, with keys spelled `section__key`."""
    return {
        "storage.root": dataset.storage.root,
        "run.scratch": str(folder / "scratch"),
        "data.dataset": dataset.uri,
        "data.max_history": 10,
        "model.width": 16,
        "model.text.mode": "off",
        "training.num_workers": 1,
        "training.global_batch_size": 16,
        "training.micro_batch_size": 16,
        **{key.replace("__", "."): value for key, value in values.items()},
    }


def small_config(dataset: Dataset, folder: Path, **values: object) -> Config:
    """Return the config with `small_settings`."""
    return load_config().with_values(small_settings(dataset, folder, **values))


def open_dataset(config: Config) -> Dataset:
    return Dataset.open(Storage.from_config(config.storage), config.data.dataset)


def wish(item: int) -> str:
    """Return the query that users of `make_dataset` type to find an item; query i is for item `num_items` + 1 - i."""
    return " ".join("bcfgjklpqv"[int(digit)] * 2 for digit in str(item))


def _make_user(generator: np.random.Generator, index: int, num_items: int) -> dict[str, Any]:
    length = int(generator.integers(4, 20))
    genre = int(generator.integers(len(GENRES)))
    own = [item for item in range(1, num_items + 1) if item % len(GENRES) == genre]
    start = int(generator.integers(len(own)))
    items = [
        own[(start + step) % len(own)] if generator.random() < 0.8 else int(generator.integers(1, num_items + 1)) for step in range(length)
    ]
    return {
        "user_index": index,
        "user_id": f"user-{index}",
        "items": items,
        "events": generator.integers(0, len(KINDS), length).tolist(),
        "timestamps": (1_600_000_000 + np.cumsum(generator.integers(1, 100_000, length))).tolist(),
        "values": generator.integers(1, 6, length).astype(float).tolist(),
        "num_train": length - 2,
        "num_validation": 1,
        "attributes": [("group", "even" if index % 2 == 0 else "odd")],
    }


def _make_item(index: int, train_count: int) -> dict[str, Any]:
    genre = index % len(GENRES)
    return {
        "item_index": index,
        "item_id": f"item-{index}",
        "title": f"Story {index}",
        "text": f"Story {index}. A {GENRES[genre]} about the number {index}",
        "categories": sorted({genre + 1, index % 3 + 1}) if index % 11 else [],
        "numbers": [index / 10 if index % 7 else float("nan")],
        "vector": [],
        "train_count": train_count,
    }


def _write(storage: Storage, uri: str, path: str, rows: list[dict[str, Any]], schema: pa.Schema) -> Shard:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        local = Path(folder) / "shard.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema), local, row_group_size=16, write_page_checksum=True)
        metadata = pq.read_metadata(local)
        storage.upload(local, join(uri, path))
        groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        stored = storage.stat(join(uri, path))
        assert stored is not None
        return Shard(path=path, row_groups=groups, num_bytes=local.stat().st_size, sha256=sha256_of(local), etag=stored.etag)


def features_of(table: pa.Table, num_categories: int) -> ItemFeatures:
    """Convert a table of CATALOGUE_SCHEMA to tensors, item by item."""
    items = table.sort_by("item_index").to_pylist()
    assert [item["item_index"] for item in items] == list(range(1, len(items) + 1))

    def rectangle(name: str, filler: float, dtype: type) -> np.ndarray:
        lists = [[], *(item[name] or [] for item in items)]
        width = max(map(len, lists))
        return np.array([[*row, *[filler] * (width - len(row))] for row in lists], dtype).reshape(len(lists), width)

    numbers = rectangle("numbers", np.nan, np.float32)
    texts = ["", *(item["text"] or "" for item in items)]
    arrays = {
        "categories": rectangle("categories", 0, np.int32),
        "numbers": np.nan_to_num(numbers),
        "has_number": ~np.isnan(numbers),
        "vectors": rectangle("vector", 0, np.float32),
        "train_count": np.array([0, *(item["train_count"] for item in items)], np.int64),
        "has_text": np.array([len(text) > 0 for text in texts]),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    ids, titles = (["", *(item[name] or "" for item in items)] for name in ("item_id", "title"))
    return ItemFeatures(ids, titles, texts, num_categories=num_categories, **tensors)
