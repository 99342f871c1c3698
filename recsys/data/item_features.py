"""The catalogue as tensors: what is known of each item, row 0 being the padding item. The table itself is `catalogue.py`'s."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from recsys.data.catalogue_source import ITEM_INDEX, CatalogueSource
from recsys.data.manifest import Dataset, DatasetManifest
from recsys.data.mapped import Strings, create_array, map_array, map_table, shared_entry, write_table
from recsys.errors import UserError
from recsys.schema import ITEM_ID

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
    """Item features by catalogue index. The tensors may be views of read-only files: nobody writes to them.

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
    """Give ids, titles and texts in parts, the padding item's first; a missing text is empty."""
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
