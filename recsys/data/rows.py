"""Rows of the training shards as flat arrays: sequences of unlike length end to end; no files and no tensors here."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Integers = NDArray[np.int64]
SEQUENCES = ("items", "events", "timestamps", "values")


@dataclass(frozen=True)
class Rows:
    """R samples. The interactions of row r are `flat[name][offsets[r]:offsets[r + 1]]` of each sequence column that was read."""

    sample_ids: Integers  # (R,)
    first_target: NDArray[np.int32]  # (R,)
    offsets: Integers  # (R + 1,)
    flat: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def num_bytes(self) -> int:
        """Memory that the arrays take."""
        return sum(array.nbytes for array in (self.sample_ids, self.first_target, self.offsets, *self.flat.values()))

    @property
    def lengths(self) -> Integers:
        """Interactions of each row. (R,)."""
        return np.diff(self.offsets)

    @classmethod
    def from_table(cls, table: pa.Table, sample_ids: Integers) -> "Rows":
        """View a table of `first_target` and some sequence columns (TRAIN_SCHEMA), without nulls."""
        table = table.combine_chunks()
        lists = {name: table[name].chunk(0) for name in SEQUENCES if name in table.column_names} if len(table) else {}
        flat = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in lists.items()}
        offsets = lists["items"].offsets.to_numpy().astype(np.int64) if lists else np.zeros(1, np.int64)
        return cls(sample_ids, table["first_target"].to_numpy(), offsets - offsets[0], flat)

    @classmethod
    def join(cls, parts: Sequence["Rows"]) -> "Rows":
        """Put parts with the same columns end to end."""
        if len(parts) == 1:
            return parts[0]
        sizes = np.cumsum([0, *(part.offsets[-1] - part.offsets[0] for part in parts)])
        starts = [part.offsets[:-1] - part.offsets[0] + size for part, size in zip(parts, sizes, strict=False)]
        return cls(
            np.concatenate([part.sample_ids for part in parts]),
            np.concatenate([part.first_target for part in parts]),
            np.concatenate([*starts, sizes[-1:]]),
            {name: np.concatenate([part.flat[name][part.offsets[0] : part.offsets[-1]] for part in parts]) for name in parts[0].flat},
        )

    def slice(self, start: int, stop: int) -> "Rows":
        """View the rows from `start` to `stop`."""
        return Rows(self.sample_ids[start:stop], self.first_target[start:stop], self.offsets[start : stop + 1], self.flat)

    def take(self, rows: Integers) -> "Rows":
        """Copy the rows asked for, in that order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return Rows(self.sample_ids[rows], self.first_target[rows], offsets, {name: flat[places] for name, flat in self.flat.items()})

    def pad(self, names: Iterable[str]) -> tuple[dict[str, NDArray[Any]], NDArray[np.bool_]]:
        """Lay sequence columns out as zero-padded rectangles (R, L), aligned left, with the mask of what is real."""
        lengths = self.lengths
        columns = np.arange(lengths.max(initial=0))
        mask = columns < lengths[:, None]
        places = np.where(mask, self.offsets[:-1, None] + columns, 0)
        return {name: np.where(mask, self.flat[name][places], 0) for name in names}, mask
