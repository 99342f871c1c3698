"""Rows of the training shards as flat arrays: sequences of unlike length end to end; no files and no tensors here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Integers = NDArray[np.int64]
NUM_GAP_BUCKETS = 32
_FIELD_TYPES = {"items": np.int32, "values": np.float32, "events": np.int8, "gaps": np.int8}
_SOURCES = {"items": "items", "values": "values", "events": "events", "gaps": "timestamps"}


@dataclass(frozen=True)
class Rows:
    """R samples. Row r's interactions are `interactions[offsets[r]:offsets[r + 1]]`, oldest first.

    An interaction is a record of the columns that were read: `items` (catalogue index), `values` (NaN: none), `events` (kind, from 0),
    `gaps` (bucket of the time since the interaction before). Records, since one gather then moves all of them.
    """

    sample_ids: Integers  # (R,)
    first_target: NDArray[np.int32]  # (R,)
    offsets: NDArray[np.integer[Any]]  # (R + 1,)
    interactions: NDArray[np.void]

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def num_bytes(self) -> int:
        """Memory of the interactions."""
        return int(self.offsets[-1] - self.offsets[0]) * self.interactions.itemsize

    @property
    def plain(self) -> NDArray[np.void]:
        """The interactions without their fields, so that NumPy moves them whole."""
        return self.interactions.view(f"V{self.interactions.itemsize}")

    @classmethod
    def from_table(cls, table: pa.Table, sample_ids: Integers) -> "Rows":
        """Copy a table of `first_target` and some of the sequence columns (TRAIN_SCHEMA), which has rows and no nulls."""
        table = table.combine_chunks()
        lists = {name: table[source].chunk(0) for name, source in _SOURCES.items() if source in table.column_names}
        offsets = lists["items"].offsets.to_numpy()
        interactions = np.empty(offsets[-1] - offsets[0], record_type(lists))
        offsets = offsets - offsets[0]
        for name, column in lists.items():
            values = column.flatten().to_numpy(zero_copy_only=False)
            interactions[name] = gap_buckets(_gaps(values, offsets)) if name == "gaps" else values
        return cls(sample_ids, table["first_target"].to_numpy(), offsets, interactions)

    @classmethod
    def join(cls, parts: Sequence["Rows"]) -> "Rows":
        """Put parts with the same columns end to end."""
        if len(parts) == 1:
            return parts[0]
        spans = [(int(part.offsets[0]), int(part.offsets[-1])) for part in parts]
        shifts = np.cumsum([0, *(stop - start for start, stop in spans)])
        offsets = [part.offsets[:-1] + (shift - start) for part, (start, _), shift in zip(parts, spans, shifts, strict=False)]
        return cls(
            np.concatenate([part.sample_ids for part in parts]),
            np.concatenate([part.first_target for part in parts]),
            np.concatenate([*offsets, shifts[-1:]]),
            np.concatenate([part.plain[start:stop] for part, (start, stop) in zip(parts, spans, strict=True)]).view(
                parts[0].interactions.dtype
            ),
        )

    def slice(self, start: int, stop: int) -> "Rows":
        """View the rows from `start` to `stop`."""
        return Rows(self.sample_ids[start:stop], self.first_target[start:stop], self.offsets[start : stop + 1], self.interactions)

    def take(self, rows: Integers) -> "Rows":
        """Return the rows asked for, in that order: a view where they follow each other, else a copy."""
        if len(rows) and (np.diff(rows) == 1).all():
            return self.slice(rows[0], rows[-1] + 1)
        begins = self.offsets[rows].astype(np.int64)
        lengths = self.offsets[rows + 1] - begins
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        places = np.arange(offsets[-1])
        places += np.repeat(begins - offsets[:-1], lengths)
        taken = self.plain.take(places, mode="clip")  # nothing is clipped: it spares a pass of checking
        return Rows(self.sample_ids[rows], self.first_target[rows], offsets, taken.view(self.interactions.dtype))

    def pad(self) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
        """Lay the interactions out as a zero-padded rectangle (R, L) of records, aligned left, with the mask of what is real."""
        lengths = np.diff(self.offsets)
        columns = np.arange(lengths.max(initial=0))
        mask = columns < lengths[:, None]
        rectangle = np.zeros(mask.shape, self.interactions.dtype)
        rectangle[mask] = self.interactions[self.offsets[0] : self.offsets[-1]]
        return rectangle, mask


def record_type(names: Sequence[str] | dict[str, Any]) -> np.dtype[np.void]:
    """Return the type of an interaction; its size is a power of two, which NumPy gathers fastest."""
    fields = {name: np.dtype(kind) for name, kind in _FIELD_TYPES.items() if name in names}
    offsets = np.cumsum([0, *(kind.itemsize for kind in fields.values())]).tolist()
    size = 1 << (offsets.pop() - 1).bit_length()
    return np.dtype({"names": list(fields), "formats": list(fields.values()), "offsets": offsets, "itemsize": size})


def gap_buckets(gaps: NDArray[np.int64]) -> NDArray[np.int8]:
    """Bucket seconds between interactions: floor(log2(1 + gap)), capped; a step back counts as no time."""
    _, exponents = np.frexp(np.maximum(gaps, 0) + 1.0)
    return np.minimum(exponents - 1, NUM_GAP_BUCKETS - 1).astype(np.int8)


def _gaps(timestamps: NDArray[np.int64], offsets: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    gaps = np.diff(timestamps, prepend=0)
    gaps[offsets[:-1]] = 0
    return gaps
