"""The catalogue, read part by part and as tensors; row 0 is the padding item."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from recsys.data.manifest import Dataset, DatasetManifest, Shard, last_rows
from recsys.data.node_files import Strings, create_array, map_array, map_table, shared_entry, write_table
from recsys.errors import UserError
from recsys.schema import ITEM_ID

PART_ROWS = 16_384
ITEM_INDEX = "item_index"

ReadColumns = Callable[[Sequence[str]], Iterator[pa.Table]]
"""Some columns of CATALOGUE_SCHEMA in parts of at most PART_ROWS rows; reads anew with each call."""


@dataclass(frozen=True)
class CatalogueSource:
    """The first version's rows in the order of `item_index`, those of later versions, and counts (`item_index`, `count`) to be added."""

    first: ReadColumns
    later: ReadColumns
    added_counts: Callable[[], Iterator[pa.Table]]

    @classmethod
    def of_dataset(cls, dataset: Dataset) -> "CatalogueSource":
        """Read a dataset's shards from the store."""
        shards = dataset.manifest.catalogue_shards
        oldest = [shard for shard in shards if shard.dataset == shards[0].dataset]
        return cls(
            first=partial(_read_shards, dataset, oldest),
            later=partial(_read_shards, dataset, shards[len(oldest) :]),
            added_counts=lambda: map(dataset.read_shard, dataset.manifest.count_shards),
        )

    @classmethod
    def of_file(cls, path: Path) -> "CatalogueSource":
        """Read a Parquet file with a whole catalogue."""
        return cls(lambda columns: _read_file(pq.ParquetFile(path), columns), _nothing, lambda: iter(()))

    @classmethod
    def of_table(cls, table: pa.Table) -> "CatalogueSource":
        """Read a table with a whole catalogue."""

        def parts(columns: Sequence[str]) -> Iterator[pa.Table]:
            return (table.select(columns).slice(begin, PART_ROWS) for begin in range(0, table.num_rows, PART_ROWS))

        return cls(parts, _nothing, lambda: iter(()))

    def rows(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Return `item_index` and some columns of all versions, oldest first: the last row of an index counts."""
        yield from self.first([ITEM_INDEX, *columns])
        yield from self.later([ITEM_INDEX, *columns])

    def sorted_rows(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Return `item_index` and some columns, one row per item in the order of the index; later versions' rows are held in memory."""
        with_index = [ITEM_INDEX, *columns]
        later = list(self.later(with_index))
        if not later:
            yield from self.first(with_index)
            return
        newest = last_rows(pa.concat_tables(later), ITEM_INDEX)
        indices, begin = newest[ITEM_INDEX].to_numpy(), 0
        for part in self.first(with_index):
            end = int(np.searchsorted(indices, part[ITEM_INDEX][-1].as_py(), side="right"))
            yield last_rows(pa.concat_tables([part, newest.slice(begin, end - begin)]), ITEM_INDEX)
            begin = end
        yield newest.slice(begin)

    def widths(self, columns: Sequence[str]) -> dict[str, int]:
        """Measure the longest list of each list column."""
        widths = dict.fromkeys(columns, 0)
        for part in self.rows(columns):
            for name in columns:
                widths[name] = max(widths[name], pc.max(pc.list_value_length(part[name])).as_py() or 0)
        return widths


def _read_shards(dataset: Dataset, shards: Sequence[Shard], columns: Sequence[str]) -> Iterator[pa.Table]:
    for shard in shards:
        filesystem, path = dataset.storage.locate(dataset.address(shard))
        yield from _read_file(pq.ParquetFile(path, filesystem=filesystem), columns)


def _read_file(file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Read some row groups after others: pyarrow would fetch all that it is asked for at once."""
    with file:
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        part_of = (np.cumsum([0, *rows[:-1]]) // PART_ROWS).tolist() if rows else []
        for _, groups in groupby(range(file.num_row_groups), key=part_of.__getitem__):
            for batch in file.iter_batches(PART_ROWS, row_groups=list(groups), columns=list(columns)):
                yield pa.Table.from_batches([batch])


def _nothing(_: Sequence[str]) -> Iterator[pa.Table]:
    return iter(())


_FORMAT = "v1"
_STRINGS = pa.schema([(ITEM_ID, pa.string()), ("title", pa.string()), ("text", pa.string())])
_ARRAYS: dict[str, tuple[str, DTypeLike]] = {
    "categories": ("categories", np.int32),
    "numbers": ("numbers", np.float32),
    "has_number": ("numbers", np.bool_),
    "vectors": ("vector", np.float32),
    "train_count": ("", np.int64),
    "has_text": ("", np.bool_),
}
"""Of each array, the list column that it is as wide as (none: one value per item) and its type."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ItemFeatures:
    """Item features by catalogue index. The tensors may be views of read-only files.

    Shapes: I items, K most categories of one item, N number columns, V vector width. Row 0 is padding.
    """

    item_ids: Sequence[str]  # I + 1, "" first
    titles: Sequence[str]  # I + 1
    texts: Sequence[str]  # I + 1
    categories: Tensor  # (I + 1, K) int32, 0 where there is none
    numbers: Tensor  # (I + 1, N) standardised, 0 where missing
    has_number: Tensor  # (I + 1, N) bool
    vectors: Tensor  # (I + 1, V)
    train_count: Tensor  # (I + 1,) int64
    has_text: Tensor  # (I + 1,) bool
    num_categories: int

    @property
    def num_items(self) -> int:
        """Items, the padding item not counted."""
        return len(self.item_ids) - 1

    @classmethod
    def read(cls, dataset: Dataset, scratch: Path | None = None) -> "ItemFeatures":
        """Read a dataset's catalogue: from files below `scratch` that all processes of the node share, or into memory."""
        return cls._read(lambda: CatalogueSource.of_dataset(dataset), dataset.manifest, scratch)

    @classmethod
    def read_file(cls, path: Path, manifest: DatasetManifest, scratch: Path | None = None) -> "ItemFeatures":
        """Read a Parquet file with the catalogue of the dataset that `manifest` describes; `scratch` as in `read`."""
        return cls._read(lambda: CatalogueSource.of_file(path), manifest, scratch)

    @classmethod
    def from_table(cls, table: pa.Table, num_categories: int) -> "ItemFeatures":
        """Build in memory from a table of `CATALOGUE_SCHEMA`."""
        source = CatalogueSource.of_table(table)
        return cls._in_memory(source, _shapes(table.num_rows, source.widths(["categories", "numbers", "vector"])), num_categories)

    @classmethod
    def _read(cls, open_source: Callable[[], CatalogueSource], manifest: DatasetManifest, scratch: Path | None) -> "ItemFeatures":
        num_categories = len(manifest.category_vocabulary)
        if scratch is None:
            source = open_source()
            return cls._in_memory(source, _shapes_by_manifest(source, manifest), num_categories)

        def build(folder: Path) -> None:
            source = open_source()
            write_table(folder / "strings.arrow", _STRINGS, _strings(source))
            shapes = _shapes_by_manifest(source, manifest)
            _fill({name: create_array(folder / f"{name}.npy", shapes[name], dtype) for name, (_, dtype) in _ARRAYS.items()}, source)

        with shared_entry(node_folder(scratch, manifest, f"features-{_FORMAT}"), build) as folder:
            tensors = {name: map_array(folder / f"{name}.npy") for name in _ARRAYS}
            return cls._of(map_table(folder / "strings.arrow"), tensors, num_categories)

    @classmethod
    def _in_memory(cls, source: CatalogueSource, shapes: Shapes, num_categories: int) -> "ItemFeatures":
        arrays = {name: np.zeros(shapes[name], dtype) for name, (_, dtype) in _ARRAYS.items()}
        _fill(arrays, source)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return cls._of(pa.concat_tables(_strings(source)), tensors, num_categories)

    @classmethod
    def _of(cls, strings: pa.Table, tensors: dict[str, Tensor], num_categories: int) -> "ItemFeatures":
        item_ids, titles, texts = (Strings(strings[name]) for name in _STRINGS.names)
        return cls(item_ids=item_ids, titles=titles, texts=texts, num_categories=num_categories, **tensors)


def node_folder(scratch: Path, manifest: DatasetManifest, name: str) -> Path:
    """Name the folder below `scratch` where the processes of a node share something made of a dataset's catalogue."""
    return scratch / "catalogues" / f"{manifest.fingerprint[:16]}-{name}"


def _shapes(num_items: int, widths: dict[str, int]) -> Shapes:
    rows = num_items + 1
    return {name: (rows, widths[column]) if column else (rows,) for name, (column, _) in _ARRAYS.items()}


def _shapes_by_manifest(source: CatalogueSource, manifest: DatasetManifest) -> Shapes:
    """Lay the arrays out; the categories are read for it, since no manifest says how many an item has at most."""
    fixed = {"numbers": len(manifest.number_columns), "vector": manifest.vector_size}
    return _shapes(manifest.num_items, source.widths(["categories"]) | fixed)


def _fill(arrays: dict[str, NDArray[Any]], source: CatalogueSource) -> None:
    """Fill arrays of zeros, which the padding item's row stays.

    Raises:
        UserError: the catalogue has not one row for each index.
    """
    num_items = len(arrays["train_count"]) - 1
    has_row = np.zeros(num_items + 1, np.bool_)
    for part in source.rows(["text", "categories", "numbers", "vector", "train_count"]):
        indices = part[ITEM_INDEX].to_numpy()
        if len(indices) and not 1 <= indices.min() <= indices.max() <= num_items:
            raise UserError(f"catalogue: has item_index {indices.max()}, its manifest {num_items} items; prepare the data again")
        has_row[indices] = True
        widths = {name: arrays[name].shape[1] for name in ("categories", "numbers", "vectors")}
        for name, block in _blocks(part, widths).items():
            arrays[name][indices] = block
    if not has_row[1:].all():
        raise UserError(f"catalogue: has rows for {has_row.sum()} of the {num_items} items of its manifest; prepare the data again")
    for added in source.added_counts():
        np.add.at(arrays["train_count"], added[ITEM_INDEX].to_numpy(), added["count"].to_numpy())


def _blocks(part: pa.Table, widths: dict[str, int]) -> dict[str, NDArray[Any]]:
    """Turn some rows of a catalogue into the same rows of each array."""
    numbers = _rectangle(part["numbers"], widths["numbers"], np.nan)
    return {
        "categories": _rectangle(part["categories"], widths["categories"], 0),
        "numbers": np.nan_to_num(numbers),
        "has_number": ~np.isnan(numbers),
        "vectors": _rectangle(part["vector"], widths["vectors"], 0),
        "train_count": part["train_count"].to_numpy(),
        "has_text": pc.fill_null(pc.greater(pc.binary_length(part["text"]), 0), False).to_numpy(),
    }


def _strings(source: CatalogueSource) -> Iterator[pa.Table]:
    """Return ids, titles and texts in parts, the padding item's first; a missing text is empty."""
    yield pa.table([[""], [""], [""]], schema=_STRINGS)
    for part in source.sorted_rows(_STRINGS.names):
        yield pa.table([pc.fill_null(part[name], "") for name in _STRINGS.names], schema=_STRINGS)


def _rectangle(column: pa.ChunkedArray, width: int, filler: float) -> NDArray[Any]:
    """Lay a list column out as a rectangle, shorter lists filled up with `filler`."""
    lists = column.combine_chunks()
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    rectangle = np.full((len(lists), width), filler, dtype=values.dtype)
    rectangle[np.arange(width) < lengths[:, None]] = values
    return rectangle
