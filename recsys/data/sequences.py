"""Sequences of different lengths: samples, histories, targets. Does not import torch, since data preparation works without it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, DTypeLike, NDArray

from recsys.arrays import Integers
from recsys.schema import EXPOSURE_COLUMNS, PROFILE_COLUMNS, SEQUENCE_COLUMNS

HISTORY_COLUMNS = ("items", "events", "timestamps", "values")
"""The columns of a history; users and samples may also have `queries` and `contexts`."""

ASKED = "asked"
"""The scalar with the context in which what follows a history is asked for."""


@dataclass(frozen=True)
class Sequences:
    """R rows with N interactions in total, oldest first; row r is `columns[name][starts[r]:starts[r] + lengths[r]]`.

    Rows may start anywhere in the columns and may overlap, so selecting, cutting and reordering rows does not copy interactions.
    """

    columns: Mapping[str, NDArray[Any]]
    starts: Integers  # (R,)
    lengths: Integers  # (R,)
    scalars: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # (R,) each: one value per row, such as `first_target`
    exposures: "Sequences | None" = None  # (R,) what was shown to each row's user: EXPOSURE_COLUMNS without their prefix
    profiles: "Sequences | None" = None  # (R,) each row's user, as returned by `ProfileSpace.encode`

    @classmethod
    def of_offsets(cls, columns: Mapping[str, NDArray[Any]], offsets: Integers, **scalars: NDArray[Any]) -> "Sequences":
        """Build from consecutive rows: row r's interactions are `[offsets[r]:offsets[r + 1]]`."""
        return cls(columns, offsets[:-1], np.diff(offsets), scalars)

    @classmethod
    def of(
        cls, items: ArrayLike, events: ArrayLike | None = None, timestamps: ArrayLike | None = None, values: ArrayLike | None = None
    ) -> "Sequences":
        """Build one user's history; without events all are of the weakest kind (0), without timestamps all gaps are zero."""
        length = len(np.atleast_1d(np.asarray(items)))
        zeros = np.zeros(length, np.int64)
        columns: dict[str, NDArray[Any]] = {
            "items": np.asarray(items, np.int64),
            "events": zeros if events is None else np.asarray(events, np.int64),
            "timestamps": zeros if timestamps is None else np.asarray(timestamps, np.int64),
            "values": np.full(length, np.nan, np.float32) if values is None else np.asarray(values, np.float32),
        }
        return cls(columns, np.zeros(1, np.int64), np.array([length]))

    @classmethod
    def from_table(cls, table: pa.Table, **scalars: NDArray[Any]) -> "Sequences":
        """Build from a table of TRAIN_SCHEMA or USERS_SCHEMA, in which columns may be missing; integer columns become scalars."""
        table = table.combine_chunks()
        lists = {name: table[name].chunk(0) for name in SEQUENCE_COLUMNS if name in table.column_names}
        columns = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in lists.items()}
        offsets = lists["items"].offsets.to_numpy().astype(np.int64)
        integers = {name: table[name].to_numpy().astype(np.int64) for name in table.column_names if pa.types.is_integer(table[name].type)}
        return cls(columns, offsets[:-1] - offsets[0], np.diff(offsets), integers | scalars, cls._exposures(table), cls.profiles_of(table))

    @classmethod
    def _exposures(cls, table: pa.Table) -> "Sequences | None":
        lists = {name.removeprefix("exposed_"): table[name].chunk(0) for name in EXPOSURE_COLUMNS if name in table.column_names}
        if not lists:
            return None
        offsets = lists["items"].offsets.to_numpy().astype(np.int64)
        columns = {name: column.flatten().to_numpy() for name, column in lists.items()}
        return cls.of_offsets(columns, offsets - offsets[0])

    @classmethod
    def profiles_of(cls, table: pa.Table) -> "Sequences | None":
        """Return the profiles in a table's PROFILE_COLUMNS (R,); None if it lacks them."""
        if not set(PROFILE_COLUMNS).issubset(table.column_names):
            return None
        categories, numbers = (table[name].combine_chunks() for name in PROFILE_COLUMNS)
        offsets = categories.offsets.to_numpy().astype(np.int64)
        rows = numbers.flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, -1 if table.num_rows else 0)
        return cls.of_offsets({"categories": categories.flatten().to_numpy(zero_copy_only=False)}, offsets - offsets[0], numbers=rows)

    @classmethod
    def join(cls, parts: Sequence["Sequences"]) -> "Sequences":
        """Concatenate the rows of one or more parts with the same columns."""
        if len(parts) == 1:
            return parts[0]
        columns = {name: np.concatenate([part.flat(name) for part in parts]) for name in parts[0].columns}
        scalars = {name: np.concatenate([part.scalars[name] for part in parts]) for name in parts[0].scalars}
        lengths = np.concatenate([part.lengths for part in parts])
        exposures = [part.exposures for part in parts if part.exposures is not None]
        profiles = [part.profiles for part in parts if part.profiles is not None]
        nested = (cls.join(own) if own else None for own in (exposures, profiles))
        return cls(columns, np.cumsum(lengths) - lengths, lengths, scalars, *nested)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, rows: slice | NDArray[Any]) -> "Sequences":
        """Return a view of some rows, by a slice, row numbers or a mask."""
        scalars = {name: column[rows] for name, column in self.scalars.items()}
        nested = (None if own is None else own[rows] for own in (self.exposures, self.profiles))
        return Sequences(self.columns, self.starts[rows], self.lengths[rows], scalars, *nested)

    def within(self, begins: int | Integers, ends: int | Integers) -> "Sequences":
        """Return a view of each row from `begins` to `ends`, counted from its first interaction."""
        return replace(self, starts=self.starts + begins, lengths=np.maximum(ends - begins, 0))

    def last(self, length: int) -> "Sequences":
        """Return a view of the most recent `length` interactions of each row."""
        return self.within(np.maximum(self.lengths - length, 0), self.lengths)

    def compact(self) -> "Sequences":
        """Return the rows end to end in their columns without gaps; copies the interactions if necessary."""
        columns = {name: self.flat(name) for name in self.columns}
        exposures, profiles = (None if own is None else own.compact() for own in (self.exposures, self.profiles))
        return replace(self, columns=columns, starts=np.cumsum(self.lengths) - self.lengths, exposures=exposures, profiles=profiles)

    def where(self, is_kept: NDArray[np.bool_]) -> "Sequences":
        """Return copies of the rows with only some interactions; the mask (N,) is in the order of `flat`."""
        columns = {name: self.flat(name)[is_kept] for name in self.columns}
        lengths = np.bincount(self.owners[is_kept], minlength=len(self))
        return replace(self, columns=columns, starts=np.cumsum(lengths) - lengths, lengths=lengths)

    def cast(self, **dtypes: DTypeLike) -> "Sequences":
        """Convert columns to other types."""
        return replace(self, columns={**self.columns, **{name: self.columns[name].astype(dtype) for name, dtype in dtypes.items()}})

    def flat(self, name: str) -> NDArray[Any]:
        """Return a column of all rows (N,), as a view if the rows are consecutive."""
        places, column = self.places, self.columns[name]
        return column[places] if isinstance(places, slice) else column.take(places, mode="clip")  # "clip" skips a bounds check

    def split(self, name: str) -> list[NDArray[Any]]:
        """Return a column as one array per row."""
        column, stops = self.columns[name], self.starts + self.lengths
        return [column[start:stop] for start, stop in zip(self.starts.tolist(), stops.tolist(), strict=True)]

    @cached_property
    def places(self) -> slice | Integers:
        """Positions of the N interactions in the columns; a slice if the rows are consecutive."""
        stops = self.starts + self.lengths
        if len(self) and (self.starts[1:] == stops[:-1]).all():
            return slice(int(self.starts[0]), int(stops[-1]))
        return ranges(self.starts, self.lengths)

    @property
    def owners(self) -> Integers:
        """The row of each interaction (N,)."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def positions(self) -> Integers:
        """The place of each interaction in its row, from 0 (N,)."""
        return ranges(np.zeros_like(self.lengths), self.lengths)

    @property
    def offsets(self) -> Integers:
        """Start of each row in what `flat` returns, then the end of the last row (R + 1,)."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @property
    def items(self) -> NDArray[Any]:
        """Catalogue indices (N,)."""
        return self.flat("items")

    @property
    def events(self) -> NDArray[Any]:
        """Event kinds from 0, the weakest (N,)."""
        return self.flat("events")

    @property
    def timestamps(self) -> Integers:
        """Seconds, or positions where there is no time (N,)."""
        return self.flat("timestamps")

    @property
    def values(self) -> NDArray[Any]:
        """Values such as ratings, NaN if missing (N,)."""
        return self.flat("values")


def ranges(starts: Integers, lengths: Integers) -> Integers:
    """Concatenate the ranges of `lengths` numbers from `starts` on."""
    numbers: Integers = np.arange(lengths.sum())
    numbers += np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return numbers


def cut_windows(sequences: Sequences, max_history: int, strides: Integers, max_exposures: int = 1 << 30) -> Sequences:
    """Cut each sequence into windows; each target from the scalar `first_target` on is in exactly one window, as is each exposure.

    Windows are cut from the end backwards. Each holds at most `max_history + 1` interactions, of which the last `strides` (R,), or fewer,
    are targets, and at most `max_exposures` exposures. A stride below `max_history` gives the targets more history and costs more samples.
    """
    lengths, first = sequences.lengths, sequences.scalars["first_target"]
    shown = sequences.exposures
    is_only_shown = np.zeros(len(sequences), bool) if shown is None else (shown.lengths > 0) & (first >= lengths)
    first = np.where(is_only_shown, 0, first)  # such rows are cut, too, so that each exposure has its history
    num_windows = np.maximum(-(-(lengths - first) // strides), is_only_shown)
    owners, numbers = np.repeat(np.arange(len(sequences)), num_windows), ranges(np.zeros_like(num_windows), num_windows)
    ends = lengths[owners] - numbers * strides[owners]
    begins = np.maximum(ends - (max_history + 1), 0)
    windows = sequences[owners].within(begins, ends)
    first_targets = np.where(is_only_shown[owners], windows.lengths, np.maximum(ends - strides[owners], first[owners]) - begins)
    windows = replace(windows, scalars={**windows.scalars, "first_target": first_targets})
    return windows if shown is None else _with_exposures(shown, windows, owners, begins, ends, max_exposures)


def _with_exposures(
    shown: Sequences, windows: Sequences, owners: Integers, begins: Integers, ends: Integers, max_exposures: int
) -> Sequences:
    """Give each exposure (rows as before the cut) to the first window of its row that ends at or after its place.

    A window with more than `max_exposures` is repeated without targets for those that are left.
    """
    order = np.lexsort((ends, owners))  # each row's windows, the earliest first
    span = int(ends.max(initial=0)) + 2
    last = np.zeros(len(shown), np.int64)
    np.maximum.at(last, owners, ends)
    rows, places = shown.owners, shown.flat("places").astype(np.int64)
    keys = owners[order] * span + ends[order]
    chosen = order[np.searchsorted(keys, rows * span + np.minimum(places, last[rows]), side="left")]
    by_window = np.argsort(chosen, kind="stable")
    counts = np.bincount(chosen, minlength=len(owners))
    parts = np.maximum(-(-counts // max_exposures), 1)
    copies, numbers = np.repeat(np.arange(len(owners)), parts), ranges(np.zeros_like(parts), parts)
    lengths = np.minimum(counts[copies] - numbers * max_exposures, max_exposures)
    columns = {name: shown.flat(name)[by_window] for name in shown.columns}
    columns["places"] = np.maximum(places - begins[chosen], 0)[by_window].astype(columns["places"].dtype)
    repeated = windows[copies]
    first_targets = np.where(numbers == 0, repeated.scalars["first_target"], repeated.lengths)
    exposures = Sequences(columns, np.cumsum(lengths) - lengths, lengths)
    return replace(repeated, scalars={**repeated.scalars, "first_target": first_targets}, exposures=exposures)
