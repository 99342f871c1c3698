"""Histories of unlike length laid end to end with next to no padding; the samples they belong to are `batch.py`'s."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.schema import PADDING_ITEM

Integers = NDArray[np.int64]
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
    has_query: NDArray[np.bool_] | None = None,
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
    """Tell what one more group costs where the histories are encoded."""
    return GPU_GROUP_COST if is_gpu else CPU_GROUP_COST


def ranges(starts: Integers, lengths: Integers) -> Integers:
    """List the numbers from each start, as many as its length, one range after another."""
    numbers: Integers = np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return numbers
