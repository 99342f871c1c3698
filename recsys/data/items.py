"""The catalogue, read in parts and as tensors; row 0 is the padding item."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import DTypeLike, NDArray
from pyarrow.fs import FileSystem
from torch import Tensor

from recsys.data.manifest import Dataset, DatasetManifest, last_rows
from recsys.data.node_files import Strings, create_array, map_array, map_table, shared_entry, write_table
from recsys.errors import UserError
from recsys.schema import ITEM_ID

PART_ROWS = 16_384
ITEM_INDEX = "item_index"

Location = tuple[FileSystem | None, str]


@dataclass(frozen=True)
class CatalogueSource:
    """The Parquet files of a catalogue, read in parts of at most PART_ROWS rows; each call reads them again."""

    first: Sequence[Location]  # the first version's rows, in the order of `item_index`
    later: Sequence[Location] = ()  # rows of later versions; the last row of an index counts
    counts: Sequence[Location] = ()  # `count` to be added to the `train_count` of `item_index`

    @classmethod
    def of_dataset(cls, dataset: Dataset) -> "CatalogueSource":
        """Build from a dataset's shards."""
        shards, counts = dataset.manifest.catalogue_shards, dataset.manifest.count_shards
        num_first = sum(shard.dataset == shards[0].dataset for shard in shards)
        locations = [dataset.storage.locate(dataset.address(shard)) for shard in (*shards, *counts)]
        return cls(locations[:num_first], locations[num_first : len(shards)], locations[len(shards) :])

    def rows(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield `item_index` and some columns of all versions, oldest first."""
        return _read_parts([*self.first, *self.later], [ITEM_INDEX, *columns])

    def sorted_rows(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield `item_index` and some columns, one row per item, sorted by index; rows of later versions are held in memory."""
        with_index = [ITEM_INDEX, *columns]
        later = list(_read_parts(self.later, with_index))
        if not later:
            yield from _read_parts(self.first, with_index)
            return
        newest = last_rows(pa.concat_tables(later), ITEM_INDEX)
        indices, begin = newest[ITEM_INDEX].to_numpy(), 0
        for part in _read_parts(self.first, with_index):
            end = int(np.searchsorted(indices, part[ITEM_INDEX][-1].as_py(), side="right"))
            yield last_rows(pa.concat_tables([part, newest.slice(begin, end - begin)]), ITEM_INDEX)
            begin = end
        yield newest.slice(begin)

    def added_counts(self) -> Iterator[pa.Table]:
        """Yield the counts to add to `train_count`."""
        return _read_parts(self.counts, [ITEM_INDEX, "count"])


def _read_parts(locations: Sequence[Location], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield tables of a few row groups at a time, since pyarrow fetches all requested row groups at once."""
    for filesystem, path in locations:
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            part_of = (np.cumsum([0, *sizes]) // PART_ROWS).tolist()
            for _, groups in groupby(range(file.num_row_groups), key=part_of.__getitem__):
                for batch in file.iter_batches(PART_ROWS, row_groups=list(groups), columns=list(columns)):
                    yield pa.Table.from_batches([batch])


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
"""Per array: the list column that determines its width (empty: one value per item), and its type."""


@dataclass(frozen=True)
class ItemFeatures:
    """Item features by catalogue index. The tensors are views of read-only files.

    Shapes: I items, K maximum number of categories per item, N number columns, V vector width. Row 0 is padding.
    """

    item_ids: Sequence[str]  # I + 1, "" first
    titles: Sequence[str]  # I + 1
    texts: Sequence[str]  # I + 1
    categories: Tensor  # (I + 1, K) int32, 0 where there is none
    numbers: Tensor  # (I + 1, N) standardized, 0 where missing
    has_number: Tensor  # (I + 1, N) bool
    vectors: Tensor  # (I + 1, V)
    train_count: Tensor  # (I + 1,) int64
    has_text: Tensor  # (I + 1,) bool
    num_categories: int

    @property
    def num_items(self) -> int:
        """Number of items without the padding item."""
        return len(self.item_ids) - 1

    @classmethod
    def read(cls, dataset: Dataset, scratch: Path | None = None) -> "ItemFeatures":
        """Load a dataset's catalogue; the processes of a node share its files below `scratch`, or use temporary files if it is None."""
        return cls._read(CatalogueSource.of_dataset(dataset), dataset.manifest, scratch)

    @classmethod
    def read_file(cls, path: Path, manifest: DatasetManifest, scratch: Path | None = None) -> "ItemFeatures":
        """Load the whole catalogue of the dataset with this `manifest` from a Parquet file; `scratch` as in `read`."""
        return cls._read(CatalogueSource([(None, str(path))]), manifest, scratch)

    @classmethod
    def _read(cls, source: CatalogueSource, manifest: DatasetManifest, scratch: Path | None) -> "ItemFeatures":
        def build(folder: Path) -> None:
            write_table(folder / "strings.arrow", _STRINGS, _strings(source))
            shapes = _shapes(source, manifest)
            _fill({name: create_array(folder / f"{name}.npy", shapes[name], dtype) for name, (_, dtype) in _ARRAYS.items()}, source)

        with (
            TemporaryDirectory() if scratch is None else nullcontext(scratch) as parent,
            shared_entry(node_folder(Path(parent), manifest, f"features-{_FORMAT}"), build) as folder,
        ):
            strings = map_table(folder / "strings.arrow")
            item_ids, titles, texts = (Strings(strings[name]) for name in _STRINGS.names)
            tensors = {name: map_array(folder / f"{name}.npy") for name in _ARRAYS}
            return cls(item_ids, titles, texts, num_categories=len(manifest.category_vocabulary), **tensors)


def node_folder(scratch: Path, manifest: DatasetManifest, name: str) -> Path:
    """Return the folder below `scratch` where the processes of a node share files derived from a dataset's catalogue."""
    return scratch / "catalogues" / f"{manifest.fingerprint[:16]}-{name}"


def _shapes(source: CatalogueSource, manifest: DatasetManifest) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array. Reads the categories, since the manifest lacks their maximum number per item."""
    longest = (pc.max(pc.list_value_length(part["categories"])).as_py() or 0 for part in source.rows(["categories"]))
    widths = {"categories": max(longest, default=0), "numbers": len(manifest.number_columns), "vector": manifest.vector_size}
    rows = manifest.num_items + 1
    return {name: (rows, widths[column]) if column else (rows,) for name, (column, _) in _ARRAYS.items()}


def _fill(arrays: dict[str, NDArray[Any]], source: CatalogueSource) -> None:
    """Fill arrays of zeros; the row of the padding item stays zero.

    Raises:
        UserError: an index is out of range or has no row.
    """
    num_items = len(arrays["train_count"]) - 1
    has_row = np.zeros(num_items + 1, np.bool_)
    for part in source.rows(["text", "categories", "numbers", "vector", "train_count"]):
        indices = part[ITEM_INDEX].to_numpy()
        if len(indices) and not 1 <= indices.min() <= indices.max() <= num_items:
            raise UserError(f"catalogue: has item_index {indices.max()}, but its manifest has {num_items} items; prepare the data again")
        has_row[indices] = True
        numbers = _rectangle(part["numbers"], arrays["numbers"].shape[1], np.nan)
        arrays["categories"][indices] = _rectangle(part["categories"], arrays["categories"].shape[1], 0)
        arrays["numbers"][indices], arrays["has_number"][indices] = np.nan_to_num(numbers), ~np.isnan(numbers)
        arrays["vectors"][indices] = _rectangle(part["vector"], arrays["vectors"].shape[1], 0)
        arrays["train_count"][indices] = part["train_count"].to_numpy()
        arrays["has_text"][indices] = pc.fill_null(pc.greater(pc.binary_length(part["text"]), 0), False).to_numpy()
    if not has_row[1:].all():
        raise UserError(f"catalogue: has rows for {has_row.sum()} of the {num_items} items of its manifest; prepare the data again")
    for added in source.added_counts():
        np.add.at(arrays["train_count"], added[ITEM_INDEX].to_numpy(), added["count"].to_numpy())


def _strings(source: CatalogueSource) -> Iterator[pa.Table]:
    """Yield ids, titles and texts in parts, the padding item first; missing texts are empty."""
    yield pa.table([[""], [""], [""]], schema=_STRINGS)
    for part in source.sorted_rows(_STRINGS.names):
        yield pa.table([pc.fill_null(part[name], "") for name in _STRINGS.names], schema=_STRINGS)


def _rectangle(column: pa.ChunkedArray, width: int, filler: float) -> NDArray[Any]:
    """Return a list column as a 2D array, shorter lists padded with `filler`."""
    lists = column.combine_chunks()
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    rectangle = np.full((len(lists), width), filler, dtype=values.dtype)
    rectangle[np.arange(width) < lengths[:, None]] = values
    return rectangle
