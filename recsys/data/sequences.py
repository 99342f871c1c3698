"""Sequences of unlike length in flat arrays: rows of the training shards, and histories packed with next to no padding."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.arrays import Integers, Mask
from recsys.schema import PADDING_ITEM, SEQUENCE_COLUMNS

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


Groups = tuple[tuple[int, int], ...]
"""(histories, places of each) of every group, in the order in which they lie."""

CPU_GROUP_COST = 32
GPU_GROUP_COST = 4096
"""How many padded places one more group is worth: attention runs once per group, and that costs most on a GPU."""


@dataclass(frozen=True)
class Histories:
    """B histories in P places, oldest first; those of like length lie together, each as long as the longest of its group."""

    items: Tensor  # (P,) 0 is padding
    events: Tensor  # (P,) event kind, from 1; 0 is padding
    times: Tensor  # (P,) seconds
    values: Tensor  # (P,) NaN where there is none
    groups: Groups
    query_places: Tensor | None = None  # (Q,) the last places of the histories that a query follows; nothing else is known of them

    def map(self, change: Callable[[Tensor], Tensor]) -> "Histories":
        """Return a copy with every tensor changed."""
        return map_tensors(self, change)


def map_tensors(record: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Copy a dataclass with `change` applied to each of its tensors, and to those of the histories in it."""
    changed = {}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        changed[field.name] = change(value) if isinstance(value, Tensor) else value.map(change) if isinstance(value, Histories) else value
    return type(record)(**changed)


def group_lengths(lengths: Integers, group_cost: int) -> tuple[Integers, Groups]:
    """Choose groups with the fewest padded places, each group counting as `group_cost` more (dynamic programming over the lengths).

    Args:
        lengths: (B,) at least 1 each.

    Returns:
        The place at which each history begins (B,), and the groups.
    """
    distinct, counts = np.unique(lengths, return_counts=True)
    up_to = np.concatenate([[0], np.cumsum(counts)])  # histories no longer than each length
    cost, first = np.zeros(len(distinct) + 1), np.zeros(len(distinct) + 1, np.int64)
    for last in range(1, len(cost)):
        costs = cost[:last] + (up_to[last] - up_to[:last]) * distinct[last - 1] + group_cost
        first[last] = np.argmin(costs)
        cost[last] = costs[first[last]]
    groups: list[tuple[int, int]] = []
    last = len(distinct)
    while last:
        groups.append((int(up_to[last] - up_to[first[last]]), int(distinct[last - 1])))
        last = int(first[last])
    groups.reverse()
    widths = np.repeat([length for _, length in groups], [number for number, _ in groups])
    starts = np.empty(len(lengths), np.int64)
    starts[np.argsort(lengths, kind="stable")] = np.cumsum(widths) - widths
    return starts, tuple(groups)


def pack(
    columns: Mapping[str, NDArray[Any]],
    starts: Integers,
    lengths: Integers,
    group_cost: int,
    has_query: Mask | None = None,
) -> tuple[Histories, Integers]:
    """Pack histories that are ranges of flat columns: `items` and, where there are, `events` (from 0), `timestamps` and `values`.

    Args:
        starts: (B,) where each history begins in the columns; `lengths` (B,), 0 for none at all.
        has_query: (B,) which histories get one more place, for a query; its time is that of the interaction before.

    Returns:
        The histories, and the place at which each begins (B,).
    """
    first_places, groups = group_lengths(np.maximum(lengths if has_query is None else lengths + has_query, 1), group_cost)
    source, places = ranges(starts, lengths), ranges(first_places, lengths)
    num_places = sum(number * length for number, length in groups)

    def lay_out(name: str, empty: float, dtype: type) -> NDArray[Any]:
        laid_out: NDArray[Any] = np.full(num_places, empty, dtype)
        if name in columns:
            laid_out[places] = columns[name][source]
        return laid_out

    events = np.zeros(num_places, np.int64)
    events[places] = columns["events"][source].astype(np.int64) + 1 if "events" in columns else 1
    times, query_places = lay_out("timestamps", 0, np.int64), None
    if has_query is not None:
        query_places = (first_places + lengths)[has_query]
        times[query_places] = times[query_places - (lengths[has_query] > 0)]
    histories = Histories(
        items=torch.from_numpy(lay_out("items", PADDING_ITEM, np.int64)),
        events=torch.from_numpy(events),
        times=torch.from_numpy(times),
        values=torch.from_numpy(lay_out("values", np.nan, np.float32)),
        groups=groups,
        query_places=None if query_places is None else torch.from_numpy(query_places),
    )
    return histories, first_places


def group_cost(is_gpu: bool) -> int:
    """Return the cost of one more group, in padded places, on a GPU or a CPU."""
    return GPU_GROUP_COST if is_gpu else CPU_GROUP_COST


def ranges(starts: Integers, lengths: Integers) -> Integers:
    """List the numbers from each start, as many as its length, one range after another."""
    numbers: Integers = np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return numbers
