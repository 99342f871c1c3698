"""Rows of the training shards as flat arrays: sequences of unlike length end to end; no files and no tensors here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.schema import SEQUENCE_COLUMNS

Integers = NDArray[np.int64]
SEQUENCES = ("items", "events", "timestamps", "values")
"""What a history consists of; training rows may have `queries` beside them."""


@dataclass(frozen=True)
class Rows:
    """R samples. Row r's interactions are `flat[name][starts[r]:starts[r] + lengths[r]]` of each sequence column that was read.

    Oldest first. Rows may lie anywhere in the flat arrays, so that choosing and reordering them moves no interaction.
    """

    sample_ids: Integers  # (R,)
    first_target: NDArray[np.int32]  # (R,)
    starts: NDArray[np.integer[Any]]  # (R,)
    lengths: NDArray[np.integer[Any]]  # (R,)
    flat: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def num_bytes(self) -> int:
        """Memory of the interactions."""
        return int(self.lengths.sum()) * sum(column.itemsize for column in self.flat.values())

    @classmethod
    def from_table(cls, table: pa.Table, sample_ids: Integers) -> "Rows":
        """View a table of `first_target` and some of the sequence columns (TRAIN_SCHEMA), which has rows and no nulls."""
        table = table.combine_chunks()
        lists = {name: table[name].chunk(0) for name in SEQUENCE_COLUMNS if name in table.column_names}
        offsets = lists["items"].offsets.to_numpy()
        flat = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in lists.items()}
        return cls(sample_ids, table["first_target"].to_numpy(), offsets[:-1] - offsets[0], np.diff(offsets), flat)

    @classmethod
    def join(cls, parts: Sequence["Rows"]) -> "Rows":
        """Put parts with the same columns end to end; the rows of each must lie so already. No parts give no rows, of no columns."""
        if not parts:
            nothing = np.zeros(0, np.int64)
            return cls(nothing, nothing.astype(np.int32), nothing, nothing, {})
        if len(parts) == 1:
            return parts[0]
        spans = [(int(part.starts[0]), int(part.starts[-1] + part.lengths[-1])) for part in parts]
        shifts = np.cumsum([0, *(stop - start for start, stop in spans[:-1])])
        starts = [part.starts + (shift - start) for part, (start, _), shift in zip(parts, spans, shifts, strict=True)]
        pieces = {name: [part.flat[name][slice(*span)] for part, span in zip(parts, spans, strict=True)] for name in parts[0].flat}
        return cls(
            np.concatenate([part.sample_ids for part in parts]),
            np.concatenate([part.first_target for part in parts]),
            np.concatenate(starts),
            np.concatenate([part.lengths for part in parts]),
            {name: np.concatenate(columns) for name, columns in pieces.items()},
        )

    def slice(self, start: int, stop: int) -> "Rows":
        """View the rows from `start` to `stop`."""
        here = slice(start, stop)
        return Rows(self.sample_ids[here], self.first_target[here], self.starts[here], self.lengths[here], self.flat)

    def take(self, rows: Integers) -> "Rows":
        """View the rows asked for, in that order."""
        return Rows(self.sample_ids[rows], self.first_target[rows], self.starts[rows], self.lengths[rows], self.flat)

    def compact(self) -> "Rows":
        """Copy the interactions, so that the rows lie end to end in their order."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        starts = ends - self.lengths
        places = np.arange(ends[-1] if len(ends) else 0)
        places += np.repeat(self.starts - starts, self.lengths)
        flat = {name: column.take(places, mode="clip") for name, column in self.flat.items()}  # clip spares a pass of checking
        return Rows(self.sample_ids, self.first_target, starts, self.lengths, flat)
