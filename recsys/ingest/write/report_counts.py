"""Counts the interactions of one partition's users for the dataset's report, in fixed bins, so that partitions add up."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys.arrays import Floats, Integers, Mask
from recsys.data.sequences import Sequences
from recsys.ingest.write.feature_statistics import session_lengths, training_part
from recsys.ingest.write.splits import TEST, VALIDATION, part_by_place

NUM_TIME_BINS = 60
NUM_VALUE_BINS = 40
MOST_DISTINCT_VALUES = 30
LENGTH_EDGES: Integers = np.unique(np.ceil(2.0 ** (np.arange(0, 43) / 2)).astype(np.int64))
GAP_EDGES: Integers = np.unique(np.concatenate([[0], np.floor(10.0 ** (np.arange(0, 41) / 4))]).astype(np.int64))
"""Lower edges of the bins for numbers of interactions and for gaps in seconds; the last bin has no upper edge."""

SPLITS = ("training", "validation", "test")
Counts = dict[str, list[int]]


@dataclass(frozen=True)
class Limits:
    """The smallest and largest time and value of all interactions, and time of training interactions; None if there are none."""

    times: tuple[int, int] | None
    train_times: tuple[int, int] | None
    values: tuple[float, float] | None

    @classmethod
    def of(cls, histories: Sequences, has_time: bool) -> "Limits":
        """Return one partition's limits."""
        known = histories.values[np.isfinite(histories.values)]
        return cls(
            _range(histories.timestamps) if has_time else None,
            _range(training_part(histories).timestamps) if has_time else None,
            _range(known),
        )

    @classmethod
    def merge(cls, parts: Sequence["Limits"]) -> "Limits":
        """Merge the limits of all partitions."""
        return cls(*(_join([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def _range(numbers: npt.NDArray[Any]) -> Any:
    return (numbers.min().item(), numbers.max().item()) if len(numbers) else None


def _join(ranges: Sequence[Any]) -> Any:
    known = [each for each in ranges if each is not None]
    return (min(low for low, _ in known), max(high for _, high in known)) if known else None


def count_partition(
    histories: Sequences, samples: pa.Table, is_withheld: Mask, num_kinds: int, limits: Limits, session_gap_seconds: int
) -> Counts:
    """Return one partition's counts for the report.

    `samples` has one row per interaction in its training samples: user_index, item, time, event. `is_withheld` is by item index - 1.
    """
    splits = part_by_place(histories.offsets, *(histories.scalars[name] for name in ("num_train", "num_validation")))
    lengths = histories.lengths
    counts = {
        "splits": np.bincount(splits, minlength=3),
        "users_with": np.array([(np.bincount(histories.owners[splits == split]) > 0).sum() for split in range(3)]),
        "pairs": np.array([_is_first(histories).sum()]),
        "lengths": _histogram(lengths[lengths > 0], LENGTH_EDGES),
        "kinds": np.bincount(histories.events, minlength=num_kinds),
        **_count_times(histories, splits, limits, session_gap_seconds),
        **_count_values(histories, limits),
        **_count_leaks(histories, splits, samples, limits),
        "withheld": _by_split(splits[(splits > 0) & is_withheld[histories.items - 1]]),
        "withheld_in_samples": np.array([is_withheld[samples["item"].to_numpy() - 1].sum()]),
    }
    return {name: [int(count) for count in column] for name, column in counts.items()}


def time_edges(times: tuple[int, int]) -> Floats:
    """Return the edges of equal bins over all times."""
    return np.linspace(times[0], times[1] + 1, NUM_TIME_BINS + 1)


def value_edges(values: tuple[float, float]) -> Floats:
    """Return the edges of equal bins over all values."""
    low, high = values
    return np.linspace(low, high, NUM_VALUE_BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])


def _count_times(histories: Sequences, splits: Integers, limits: Limits, session_gap_seconds: int) -> dict[str, Integers]:
    if limits.times is None:
        return {}
    edges = time_edges(limits.times)
    counts = {f"times_{name}": np.histogram(histories.timestamps[splits == split], edges)[0] for split, name in enumerate(SPLITS)}
    # A row may not be in time order: held-out interactions are at its end, and an appended version adds late ones.
    order = np.lexsort((histories.timestamps, histories.owners))
    in_time = replace(histories, columns={"timestamps": histories.timestamps[order]})
    gaps = np.diff(in_time.timestamps)[np.diff(in_time.owners) == 0]
    _, lengths = session_lengths(in_time, session_gap_seconds)
    return {**counts, "gaps": _histogram(gaps, GAP_EDGES), "session_lengths": _histogram(lengths, LENGTH_EDGES)}


def _count_values(histories: Sequences, limits: Limits) -> dict[str, Integers]:
    """Count values in bins and, if their range is short, by whole and half numbers."""
    if limits.values is None:
        return {}
    values = histories.values[np.isfinite(histories.values)]
    counts = {"values": np.histogram(values, value_edges(limits.values))[0]}
    first, steps = value_scale(limits.values)
    if steps:
        places = (values - first) * 2
        is_on_scale = places == np.rint(places)
        counts["scale"] = np.bincount(places[is_on_scale].astype(np.int64), minlength=steps)
        counts["off_scale"] = np.array([(~is_on_scale).sum()])
    return counts


def value_scale(values: tuple[float, float]) -> tuple[float, int]:
    """Return a scale of whole and half numbers for the values, as (first number, number of steps); 0 steps if it would be too long."""
    first = float(np.floor(values[0]))
    steps = (np.ceil(values[1]) - first) * 2 + 1
    return first, int(steps) if steps <= 2 * MOST_DISTINCT_VALUES else 0


def _count_leaks(histories: Sequences, splits: Integers, samples: pa.Table, limits: Limits) -> dict[str, Integers]:
    """Count the targets (validation, test) that a clean split would not have; `check_split` judges the counts."""
    is_target = splits > 0
    owners, times, split = histories.owners[is_target], histories.timestamps[is_target], splits[is_target]
    keys = {"user_index": histories.scalars["user_index"][owners], "item": histories.items[is_target], "time": times}
    targets = pa.table({**keys, "event": histories.events[is_target], "split": split})
    twice = targets.join(samples, ["user_index", "item", "time", "event"], join_type="left semi", use_threads=False)["split"].to_numpy()
    latest = _latest(samples["user_index"].to_numpy(), samples["time"].to_numpy(), histories.scalars["user_index"])
    validation = splits == VALIDATION
    latest_validation = _latest(histories.owners[validation], histories.timestamps[validation], np.arange(len(histories)))
    return {
        "targets": _by_split(split),
        "before_training": _by_split(split[times < latest[owners]]),
        "before_validation": _by_split(split[(split == TEST) & (times < latest_validation[owners])]),
        "in_samples": _by_split(twice),
        "in_history": _by_split(split[~_is_first(histories)[is_target]]),
        "before_training_of_others": _by_split(split[times < limits.train_times[1]] if limits.train_times else split[:0]),
    }


def _by_split(splits: npt.NDArray[Any]) -> Integers:
    return np.bincount(splits, minlength=3)[1:]


def _latest(users: Integers, times: Integers, wanted: Integers) -> Integers:
    """Return the latest time of each wanted user (ascending); the minimum int64 for a user without any."""
    latest = np.full(len(wanted), np.iinfo(np.int64).min)
    if len(users):
        np.maximum.at(latest, np.searchsorted(wanted, users), times)
    return latest


def _is_first(histories: Sequences) -> Mask:
    """Return which interactions are their user's first with the item."""
    keys = histories.owners * (int(histories.items.max(initial=0)) + 1) + histories.items
    is_first = np.zeros(len(keys), bool)
    is_first[np.unique(keys, return_index=True)[1]] = True
    return is_first


def _histogram(numbers: Integers, edges: Integers) -> Integers:
    # A number below the first edge, such as a negative gap in broken data, counts in the first bin.
    return np.bincount(np.maximum(np.searchsorted(edges, numbers, side="right") - 1, 0), minlength=len(edges))


def merge_counts(parts: Sequence[Counts]) -> dict[str, Integers]:
    """Add up the counts of all partitions."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: np.sum([part[name] for part in parts if name in part], axis=0).astype(np.int64) for name in names}
