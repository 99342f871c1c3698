"""Statistics of users and items from training interactions only, as pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys.arrays import Floats, Integers, Mask
from recsys.data.sequences import HISTORY_COLUMNS, Sequences
from recsys.schema import ITEM_STATISTICS_SCHEMA, USER_STATISTICS_SCHEMA, Kind, taken_follows_shown

NUM_PERIODS = 8
NUMBER_PREFIX = "statistics."
USED_COLUMNS = ["user_index", *HISTORY_COLUMNS, "num_train", "num_validation"]

PRIOR_EXPOSURES = 10
"""With more, an item's rate tells less; with fewer, the rate of a rare item tells the very labels that are learned from it."""


@dataclass(frozen=True)
class TrainSpan:
    """Times of the first and the last training interaction of all users, and of the end of the training data."""

    first: int
    last: int
    end: int

    def period_of(self, times: Integers) -> Integers:
        """Return the index of each time's period; all NUM_PERIODS periods are equally long."""
        return np.asarray((times - self.first) * NUM_PERIODS // (self.last - self.first + 1), np.int64)


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of groups of values, one entry per group."""

    count: Integers
    mean: Floats
    deviations: Floats

    @classmethod
    def of(cls, values: Floats, groups: Integers, num_groups: int) -> "Moments":
        """Measure the finite values of each group in two passes, which is more precise than a sum of squares."""
        is_there = np.isfinite(values)
        values, groups = values[is_there].astype(np.float64), groups[is_there]
        count = np.bincount(groups, minlength=num_groups).astype(np.int64)
        divisor = np.maximum(count, 1)
        mean = np.bincount(groups, values, num_groups) / divisor
        apart = values - mean[groups]
        rest = np.bincount(groups, apart, num_groups)  # rounding error of the mean
        deviations = np.bincount(groups, apart**2, num_groups) - rest**2 / divisor
        return cls(count, mean + rest / divisor, np.maximum(deviations, 0.0))

    def merge(self, other: "Moments") -> "Moments":
        """Merge the moments of two parts of each group (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        delta = other.mean - self.mean
        return Moments(count, self.mean + delta * share, self.deviations + other.deviations + delta**2 * self.count * share)

    @property
    def variance(self) -> Floats:
        """Population variance; 0 for a group without values."""
        return self.deviations / np.maximum(self.count, 1)


def join_moments(parts: Sequence[Sequence[float]]) -> tuple[int, float, float]:
    """Merge `[count, mean, sum of squared deviations]` of parts into count, mean and standard deviation (1 where it would be 0)."""
    total = Moments(np.zeros(1, np.int64), np.zeros(1), np.zeros(1))
    for number, mean, deviations in parts:
        total = total.merge(Moments(np.array([int(number)]), np.array([mean]), np.array([deviations])))
    return int(total.count[0]), float(total.mean[0]), float(total.variance[0]) ** 0.5 or 1.0


def read_histories(users: pa.Table) -> Sequences:
    """Convert the `USED_COLUMNS` of users (USERS_SCHEMA) to histories, in 64 bits because they are summed."""
    return Sequences.from_table(users.select(USED_COLUMNS)).cast(items=np.int64, events=np.int64, values=np.float64)


def training_part(histories: Sequences) -> Sequences:
    """Return only the training interactions."""
    return histories.within(0, histories.scalars["num_train"]).compact()


def session_lengths(histories: Sequences, gap_seconds: int) -> tuple[Integers, Integers]:
    """Cut each user's interactions at gaps of more than `gap_seconds`; return the owner and the length of each session."""
    owners = histories.owners
    if not len(owners):
        return owners, owners
    starts = (np.diff(owners, prepend=-1) != 0) | (np.diff(histories.timestamps, prepend=histories.timestamps[:1]) > gap_seconds)
    positions = np.flatnonzero(starts)
    return owners[positions], np.diff(np.append(positions, len(owners)))


def user_statistics(histories: Sequences, num_kinds: int, span: TrainSpan | None, session_gap_seconds: int) -> pa.Table:
    """Return the statistics of users (USER_STATISTICS_SCHEMA) from training data only; without a span, time columns are null."""
    training = training_part(histories)
    num_users, owners, count = len(training), training.owners, training.lengths
    moments = Moments.of(training.values, owners, num_users)
    kinds = np.bincount(owners * num_kinds + training.events, minlength=num_users * num_kinds).reshape(num_users, num_kinds)
    has_any = (count > 0) & (span is not None)
    gaps, recency, sessions = np.zeros(num_users), np.zeros(num_users, np.int64), np.zeros(num_users, np.int64)
    if span is not None:
        firsts, num_gaps = training.starts[has_any], count[has_any] - 1
        first, last = training.timestamps[firsts], training.timestamps[firsts + num_gaps]
        gaps[has_any] = (last - first) / np.maximum(num_gaps, 1)
        recency[has_any] = span.end - last
        sessions = np.bincount(session_lengths(training, session_gap_seconds)[0], minlength=num_users)
    return pa.table(
        [
            pa.array(training.scalars["user_index"], pa.int64()),
            pa.array(count, pa.int64()),
            *_moment_columns(moments),
            _where(gaps, has_any & (count > 1), pa.float64()),
            _where(recency, has_any, pa.int64()),
            _where(sessions, has_any, pa.int64()),
            _where(count / np.maximum(sessions, 1), has_any, pa.float64()),
            _lists(kinds),
        ],
        schema=USER_STATISTICS_SCHEMA,
    )


@dataclass(frozen=True)
class Shown:
    """E training exposures with a label of the weakest positive kind."""

    items: Integers  # (E,)
    is_taken: Mask  # (E,)


def item_sums(histories: Sequences, span: TrainSpan | None, shown: Shown | None = None) -> pa.Table:
    """Sum one partition's training interactions, and its exposures if the data has them, by item, for `ItemTotals.add`."""
    training = training_part(histories)
    items, groups = np.unique(np.concatenate([training.items, *([shown.items] if shown else [])]), return_inverse=True)
    groups, exposed_groups = np.split(groups, [len(training.items)])
    moments = Moments.of(training.values, groups, len(items))
    first, last = np.full(len(items), np.iinfo(np.int64).max), np.full(len(items), np.iinfo(np.int64).min)
    np.minimum.at(first, groups, training.timestamps)
    np.maximum.at(last, groups, training.timestamps)
    columns: dict[str, npt.NDArray[Any]] = {"item_index": items, "train_count": np.bincount(groups, minlength=len(items))}
    columns |= {"num_values": moments.count, "mean": moments.mean, "deviations": moments.deviations, "first": first, "last": last}
    if span is not None:
        cells = groups * NUM_PERIODS + span.period_of(training.timestamps)
        periods = np.bincount(cells, minlength=len(items) * NUM_PERIODS).reshape(len(items), NUM_PERIODS)
        columns |= {f"period_{number}": periods[:, number] for number in range(NUM_PERIODS)}
    if shown is not None:
        columns["shown"] = np.bincount(exposed_groups, minlength=len(items))
        columns["taken"] = np.bincount(exposed_groups[shown.is_taken], minlength=len(items))
    return pa.table(columns)


class ItemTotals:
    """Sums over all partitions; entry i is of item i + 1. `first` and `last` are valid where `train_count` is positive."""

    def __init__(self, num_items: int, has_time: bool) -> None:
        self.has_exposures = False
        self.shown, self.taken = np.zeros((2, num_items), np.int64)
        self.train_count = np.zeros(num_items, np.int64)
        self.moments = Moments(np.zeros(num_items, np.int64), np.zeros(num_items), np.zeros(num_items))
        self.first = np.full(num_items, np.iinfo(np.int64).max)
        self.last = np.full(num_items, np.iinfo(np.int64).min)
        self.periods = np.zeros((num_items, NUM_PERIODS if has_time else 0), np.int64)

    def add(self, sums: pa.Table) -> None:
        """Add one partition's `item_sums`."""
        column = {name: sums[name].to_numpy() for name in sums.column_names}
        rows = column["item_index"] - 1
        self.train_count[rows] += column["train_count"]
        mine = Moments(self.moments.count[rows], self.moments.mean[rows], self.moments.deviations[rows])
        both = mine.merge(Moments(column["num_values"], column["mean"], column["deviations"]))
        self.moments.count[rows], self.moments.mean[rows], self.moments.deviations[rows] = both.count, both.mean, both.deviations
        self.first[rows] = np.minimum(self.first[rows], column["first"])
        self.last[rows] = np.maximum(self.last[rows], column["last"])
        for number in range(self.periods.shape[1]):
            self.periods[rows, number] += column[f"period_{number}"]
        if "shown" in column:
            self.has_exposures = True
            self.shown[rows] += column["shown"]
            self.taken[rows] += column["taken"]


def item_statistics(totals: ItemTotals, span: TrainSpan | None) -> pa.Table:
    """Return the statistics of all items (ITEM_STATISTICS_SCHEMA) from their totals; without a span, time columns are null."""
    has_time = (totals.train_count > 0) & (span is not None)
    end = span.end if span is not None else 0
    return pa.table(
        [
            pa.array(np.arange(1, len(totals.train_count) + 1), pa.int32()),
            pa.array(totals.train_count, pa.int64()),
            *_moment_columns(totals.moments),
            _where(totals.first, has_time, pa.int64()),
            _where(totals.last, has_time, pa.int64()),
            _where(end - np.where(has_time, totals.last, end), has_time, pa.int64()),
            _lists(totals.periods),
            *(_where(counts, np.full(len(counts), totals.has_exposures), pa.int64()) for counts in (totals.shown, totals.taken)),
        ],
        schema=ITEM_STATISTICS_SCHEMA,
    )


def item_numbers(statistics: pa.Table) -> dict[str, Floats]:
    """Convert item statistics to number columns of the catalogue, NaN where missing; a column without any value is left out.

    log_count: log(1 + training interactions). mean_value. recency: log(1 + seconds since the last one). trend: log of (1 + interactions
    in the later half of the periods) / (1 + interactions in the earlier half). taken: log odds of an exposure being taken, where
    PRIOR_EXPOSURES exposures are added to each item's own, taken at the mean rate.
    """
    numbers = {"log_count": np.log1p(statistics["train_count"].to_numpy()), "mean_value": _floats(statistics["value_mean"])}
    recency = _floats(statistics["recency_seconds"])
    numbers["recency"] = np.log1p(recency)
    periods = statistics["period_counts"].combine_chunks().flatten().to_numpy()
    if len(periods):
        halves = periods.reshape(statistics.num_rows, 2, NUM_PERIODS // 2).sum(axis=2)
        trend = np.log1p(halves[:, 1]) - np.log1p(halves[:, 0])
        numbers["trend"] = np.where(np.isnan(recency), np.nan, trend)
    shown, taken = _floats(statistics["num_shown"]), _floats(statistics["num_taken"])
    num_shown, num_taken = np.nansum(shown), np.nansum(taken)
    if 0 < num_taken < num_shown:
        rates = (taken + PRIOR_EXPOSURES * num_taken / num_shown) / (shown + PRIOR_EXPOSURES)
        numbers["taken"] = np.where(shown > 0, np.log(rates / (1 - rates)), np.nan)
    return {NUMBER_PREFIX + name: column for name, column in numbers.items() if not np.isnan(column).all()}


def taken_moments(kinds: Sequence[Kind], counts: Integers, has_labels: bool) -> tuple[float, float]:
    """Return the mean and the standard deviation of what histories say was taken (1) or not (0), from the number of events of each kind.

    With labels a row is either taken or not. Otherwise what is taken was shown before, if exposures are in histories.
    """
    untaken = sum(count for kind, count in zip(kinds, counts, strict=True) if kind.says_untaken)
    taken = next((count for kind, count in zip(kinds, counts, strict=True) if kind.is_target), 0)
    share = float(min(0.99, (taken + 1) / (untaken + (0 if taken_follows_shown(kinds, has_labels) else taken) + 2)))
    return share, (share * (1 - share)) ** 0.5


def _floats(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)


def _moment_columns(moments: Moments) -> list[pa.Array]:
    has_value = moments.count > 0
    return [
        pa.array(moments.count, pa.int64()),
        _where(moments.mean, has_value, pa.float64()),
        _where(moments.variance, has_value, pa.float64()),
    ]


def _where(values: npt.NDArray[Any], is_there: Mask, kind: pa.DataType) -> pa.Array:
    return pa.array(values, kind, mask=~is_there)


def _lists(block: npt.NDArray[Any]) -> pa.Array:
    offsets = np.arange(block.shape[0] + 1, dtype=np.int32) * block.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(block.reshape(-1), pa.int64()))
