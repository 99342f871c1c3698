"""The catalogue as tensors: what is known of each item, row 0 being the padding item. The table itself is `catalogue.py`'s."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.data.manifest import Dataset


@dataclass(frozen=True)
class ItemFeatures:
    """Item features by catalogue index.

    Shapes: I items, K most categories of one item, N number columns, V vector width. Row 0 is padding.
    """

    item_ids: tuple[str, ...]  # I + 1, "" first
    titles: tuple[str, ...]  # I + 1
    texts: tuple[str, ...]  # I + 1
    categories: Tensor  # (I + 1, K) int64, 0 where there is none
    numbers: Tensor  # (I + 1, N) standardised, 0 where missing
    has_number: Tensor  # (I + 1, N) bool
    vectors: Tensor  # (I + 1, V)
    train_count: Tensor  # (I + 1,) int64
    num_categories: int

    @property
    def num_items(self) -> int:
        """Items, the padding item not counted."""
        return len(self.item_ids) - 1

    @classmethod
    def read(cls, dataset: Dataset) -> "ItemFeatures":
        """Read a dataset's catalogue."""
        return cls.from_table(dataset.catalogue, len(dataset.manifest.category_vocabulary))

    @classmethod
    def from_table(cls, table: pa.Table, num_categories: int) -> "ItemFeatures":
        """Build from a table of `CATALOGUE_SCHEMA`, sorted by `item_index`."""
        numbers = _rectangle(table["numbers"], np.nan)
        return cls(
            item_ids=("", *table["item_id"].to_pylist()),
            titles=("", *(title or "" for title in table["title"].to_pylist())),
            texts=("", *(text or "" for text in table["text"].to_pylist())),
            categories=torch.from_numpy(_rectangle(table["categories"], 0).astype(np.int64)),
            numbers=torch.from_numpy(np.nan_to_num(numbers)),
            has_number=torch.from_numpy(~np.isnan(numbers)),
            vectors=torch.from_numpy(_rectangle(table["vector"], 0)),
            train_count=torch.from_numpy(np.concatenate([[0], table["train_count"].to_numpy()]).astype(np.int64)),
            num_categories=num_categories,
        )


def _rectangle(column: pa.ChunkedArray, filler: float) -> NDArray[Any]:
    """Lay a list column out as a rectangle under a row of `filler` for the padding item."""
    lists = column.combine_chunks()
    lengths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    rectangle = np.full((len(lists) + 1, int(lengths.max(initial=0))), filler, dtype=values.dtype)
    rectangle[1:][np.arange(rectangle.shape[1]) < lengths[:, None]] = values
    return rectangle
