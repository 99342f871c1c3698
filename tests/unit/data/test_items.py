"""The catalogue as tensors: mapped or in memory, from a dataset, an appended dataset, an export's file or a table; one copy per node."""

import dataclasses
import multiprocessing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recsys.data import items as catalogue_source
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset, Shard
from recsys.errors import UserError
from recsys.schema import CATALOGUE_SCHEMA
from recsys.store import Storage, join
from tests.datasets import features_of, make_dataset

ARRAYS = ("categories", "numbers", "has_number", "vectors", "train_count", "has_text")
STRINGS = ("item_ids", "titles", "texts")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(Storage(str(tmp_path / "store")))


def rows(items: Iterable[dict[str, Any]]) -> pa.Table:
    plain = {"title": "", "text": "", "categories": [], "numbers": [], "vector": [], "train_count": 0}
    return pa.Table.from_pylist([plain | {"item_id": f"new-{item['item_index']}"} | item for item in items], CATALOGUE_SCHEMA)


def assert_equal(left: ItemFeatures, right: ItemFeatures) -> None:
    for name in ARRAYS:
        mine, theirs = getattr(left, name), getattr(right, name)
        assert mine.dtype == theirs.dtype, name
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    for name in STRINGS:
        assert list(getattr(left, name)) == list(getattr(right, name)), name
    assert left.num_categories == right.num_categories


def test_every_feature_of_every_item_is_where_its_index_says(dataset: Dataset, tmp_path: Path) -> None:
    table = rows(
        [
            {
                "item_index": 1,
                "item_id": "a",
                "title": "A",
                "text": "A text",
                "categories": [2],
                "numbers": [0.5, np.nan],
                "vector": [1, 2],
            },
            {"item_index": 2, "item_id": "b", "title": None, "text": None, "categories": [1, 3], "numbers": [np.nan, 2], "vector": [3, 4]},
            {"item_index": 3, "item_id": "c", "categories": [], "numbers": [0, 0], "vector": [0, 0], "train_count": 7},
        ]
    )
    described = {"num_items": 3, "category_vocabulary": ("x", "y", "z"), "number_columns": ("p", "q"), "vector_size": 2}
    pq.write_table(table, tmp_path / "catalogue.parquet")
    features = ItemFeatures.read_file(tmp_path / "catalogue.parquet", dataset.manifest.model_copy(update=described))
    assert features.num_items == 3
    assert list(features.item_ids) == ["", "a", "b", "c"]
    assert list(features.titles) == ["", "A", "", ""]
    assert features.texts[1] == "A text"
    assert features.texts[2] == ""
    assert features.categories.tolist() == [[0, 0], [2, 0], [1, 3], [0, 0]]
    assert features.numbers.tolist() == [[0, 0], [0.5, 0], [0, 2], [0, 0]]
    assert features.has_number.tolist() == [[False, False], [True, False], [False, True], [True, True]]
    assert features.vectors.tolist() == [[0, 0], [1, 2], [3, 4], [0, 0]]
    assert features.train_count.tolist() == [0, 0, 0, 7]
    assert features.has_text.tolist() == [False, True, False, False]


@pytest.mark.parametrize("part_rows", [7, 10_000])
def test_mapped_features_equal_those_in_memory(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_rows: int) -> None:
    whole = features_of(dataset.catalogue, len(dataset.manifest.category_vocabulary))
    monkeypatch.setattr(catalogue_source, "PART_ROWS", part_rows)
    assert_equal(ItemFeatures.read(dataset, tmp_path / "scratch"), whole)
    assert_equal(ItemFeatures.read(dataset), whole)


def test_an_export_file_gives_what_the_dataset_gave(dataset: Dataset, tmp_path: Path) -> None:
    pq.write_table(dataset.catalogue, tmp_path / "catalogue.parquet")
    expected = ItemFeatures.read(dataset)
    assert_equal(ItemFeatures.read_file(tmp_path / "catalogue.parquet", dataset.manifest, tmp_path / "scratch"), expected)
    assert_equal(ItemFeatures.read_file(tmp_path / "catalogue.parquet", dataset.manifest), expected)


def test_the_files_are_built_once(dataset: Dataset, tmp_path: Path) -> None:
    first = ItemFeatures.read(dataset, tmp_path / "scratch")
    for shard in dataset.manifest.catalogue_shards:
        Path(dataset.address(shard)).unlink()
    assert_equal(ItemFeatures.read(dataset, tmp_path / "scratch"), first)


def append(dataset: Dataset, tables: list[pa.Table], counts: pa.Table, num_items: int) -> Dataset:
    """Write a version of the dataset with more catalogue shards and counts, in a separate folder."""
    uri = join(dataset.uri.rpartition("/")[0], "appended")

    def write(path: str, table: pa.Table) -> Shard:
        target = Path(uri) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, target)
        return Shard(path=path, row_groups=(table.num_rows,), num_bytes=target.stat().st_size, sha256=path)

    older = tuple(shard.model_copy(update={"dataset": dataset.name}) for shard in dataset.manifest.catalogue_shards)
    manifest = dataset.manifest.model_copy(
        update={
            "fingerprint": "appended",
            "version": 2,
            "base": dataset.name,
            "num_items": num_items,
            "catalogue_shards": older + tuple(write(f"catalogue/{number}.parquet", table) for number, table in enumerate(tables)),
            "count_shards": (write("counts/0.parquet", counts),),
        }
    )
    return Dataset(dataset.storage, uri, manifest)


@pytest.mark.parametrize("part_rows", [7, 10_000])
def test_of_an_appended_dataset_the_last_row_of_an_item_counts(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_rows: int
) -> None:
    monkeypatch.setattr(catalogue_source, "PART_ROWS", part_rows)
    changed = [{"item_index": index, "text": f"changed {index}", "numbers": [float(index)], "categories": [1]} for index in (3, 16, 40, 41)]
    newest = [{"item_index": index, "title": "newest", "numbers": [2.0], "categories": [1, 2, 3]} for index in (16, 42)]
    counts = pa.table({"item_index": pa.array([3, 1, 42], pa.int32()), "count": pa.array([5, 6, 7], pa.int64())})
    appended = append(dataset, [rows(changed), rows(newest)], counts, 42)
    features = ItemFeatures.read(appended, tmp_path / "scratch")
    assert_equal(features, features_of(appended.catalogue, len(appended.manifest.category_vocabulary)))
    assert features.texts[3] == "changed 3"
    assert features.titles[16] == "newest"
    assert features.texts[16] == ""
    assert features.item_ids[42] == "new-42"
    assert features.train_count[[3, 42]].tolist() == [5, 7]
    assert features.train_count[1] == ItemFeatures.read(dataset).train_count[1] + 6


@pytest.mark.parametrize("num_items", [39, 41])
def test_a_catalogue_with_other_items_than_the_manifest_says_is_refused(dataset: Dataset, tmp_path: Path, num_items: int) -> None:
    wrong = dataclasses.replace(dataset, manifest=dataset.manifest.model_copy(update={"num_items": num_items}))
    with pytest.raises(UserError, match="prepare the data again"):
        ItemFeatures.read(wrong, tmp_path / "scratch")
    with pytest.raises(UserError, match="prepare the data again"):
        ItemFeatures.read(wrong)


def large_dataset(folder: Path, num_items: int, width: int) -> Dataset:
    base = make_dataset(Storage(str(folder)))
    vectors = np.random.default_rng(0).standard_normal((num_items, width)).astype(np.float32)
    items = [{"item_index": index, "text": f"a tale about the number {index}"} for index in range(1, num_items + 1)]
    table = rows(items).set_column(6, CATALOGUE_SCHEMA.field("vector"), pa.array(list(vectors), pa.list_(pa.float32())))
    path = Path(base.uri) / "catalogue" / "large.parquet"
    pq.write_table(table, path, row_group_size=1024)
    shard = Shard(path="catalogue/large.parquet", row_groups=(), num_bytes=path.stat().st_size, sha256="large")
    fields = {"num_items": num_items, "vector_size": width, "number_columns": (), "catalogue_shards": (shard,), "fingerprint": "large"}
    return dataclasses.replace(base, manifest=base.manifest.model_copy(update=fields))


def pss_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def hold_catalogue(dataset: Dataset, scratch: Path, barrier: Any, results: Any) -> None:
    from recsys.config import load_config
    from recsys.model.item_encoder import ItemEncoder, ItemText

    barrier.wait(60)
    before = pss_bytes()
    barrier.wait(60)
    features = ItemFeatures.read(dataset, scratch)
    encoder = ItemEncoder(load_config(None, ["model.use_ids=false", "model.width=16"]).model, features, ItemText()).to("cpu")
    total = sum(float(buffer.float().sum()) for buffer in encoder.buffers() if buffer.numel())  # touches every page
    total += sum(len(text) for column in (features.item_ids, features.titles, features.texts) for text in column)
    barrier.wait(60)
    results.put(pss_bytes() - before)
    barrier.wait(60)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of shared memory")
def test_two_processes_hold_one_copy_of_the_catalogue(tmp_path: Path) -> None:
    dataset = large_dataset(tmp_path / "store", num_items=40_000, width=512)
    ItemFeatures.read(dataset, tmp_path / "scratch")
    one_copy = sum(path.stat().st_size for path in (tmp_path / "scratch").rglob("*") if path.is_file())
    assert one_copy > 80e6
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=hold_catalogue, args=(dataset, tmp_path / "scratch", barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    grown = sum(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    assert 0.9 * one_copy < grown < 1.3 * one_copy
