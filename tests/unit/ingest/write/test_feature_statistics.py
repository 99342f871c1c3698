"""Statistics compared with plain Python loops, for any partitioning."""

import itertools
import statistics as plain
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys.data.sequences import Sequences
from recsys.ingest.write.feature_statistics import (
    NUM_PERIODS,
    PRIOR_EXPOSURES,
    ItemTotals,
    Moments,
    Shown,
    TrainSpan,
    item_numbers,
    item_statistics,
    item_sums,
    read_histories,
    session_lengths,
    taken_moments,
    user_statistics,
)
from recsys.schema import ITEM_STATISTICS_SCHEMA, USER_STATISTICS_SCHEMA, USERS_SCHEMA, Kind

GAP = 1800
Rows = list[dict[str, Any]]


def make_users(num_users: int, seed: int, num_items: int = 30) -> Rows:
    generator = np.random.default_rng(seed)
    users = []
    for index in range(num_users):
        length = int(generator.integers(0, 25))
        values: list[float | None] = generator.normal(1e6, 1, length).astype(np.float32).astype(float).tolist()
        users.append(
            {
                "user_index": index,
                "user_id": str(index),
                "items": generator.integers(1, num_items - 3, length).tolist(),
                "events": generator.integers(0, 3, length).tolist(),
                "timestamps": np.sort(generator.integers(1_000, 90_000, length)).tolist(),
                "values": [value if generator.random() < 0.8 else None for value in values],
                "num_train": max(0, length - int(generator.integers(0, 6))),
                "num_validation": 0,
                "attributes": [],
            }
        )
    return users


def histories_of(users: Rows) -> Sequences:
    return read_histories(pa.Table.from_pylist(users, USERS_SCHEMA))


def span_of(users: Rows) -> TrainSpan:
    times = [time for user in users for time in user["timestamps"][: user["num_train"]]]
    return TrainSpan(min(times), max(times), max(times) + 5)


def expected_moments(values: list[float | None]) -> tuple[int, float | None, float | None]:
    known = [value for value in values if value is not None]
    return len(known), plain.fmean(known) if known else None, plain.pvariance(known) if known else None


def near(expected: float | None, tolerance: float) -> Any:
    return None if expected is None else pytest.approx(expected, rel=tolerance, abs=1e-9)


def expected_sessions(times: list[int]) -> int:
    return 1 + sum(later - earlier > GAP for earlier, later in itertools.pairwise(times))


def test_user_statistics_equal_plain_loops() -> None:
    users = make_users(60, seed=1)
    span = span_of(users)
    table = user_statistics(histories_of(users), 3, span, GAP)
    assert table.schema == USER_STATISTICS_SCHEMA
    assert any(user["num_train"] == 0 for user in users)
    for user, row in zip(users, table.to_pylist(), strict=True):
        count = user["num_train"]
        times, kinds = user["timestamps"][:count], Counter(user["events"][:count])
        num_values, mean, variance = expected_moments(user["values"][:count])
        assert (row["user_index"], row["num_interactions"], row["num_values"]) == (user["user_index"], count, num_values)
        assert row["value_mean"] == near(mean, 1e-12)
        assert row["value_variance"] == near(variance, 1e-9)
        assert row["event_counts"] == [kinds[kind] for kind in range(3)]
        assert row["mean_gap_seconds"] == (pytest.approx((times[-1] - times[0]) / (count - 1)) if count > 1 else None)
        assert row["recency_seconds"] == (span.end - times[-1] if count else None)
        assert row["num_sessions"] == (expected_sessions(times) if count else None)
        assert row["mean_session_length"] == (pytest.approx(count / expected_sessions(times)) if count else None)


def test_item_statistics_equal_plain_loops_whatever_the_partitions_are() -> None:
    users = make_users(60, seed=2)
    span = span_of(users)
    totals = ItemTotals(30, has_time=True)
    for first, stop in ((0, 1), (1, 40), (40, 60)):
        totals.add(item_sums(histories_of(users[first:stop]), span))
    table = item_statistics(totals, span)
    assert table.schema == ITEM_STATISTICS_SCHEMA
    width = span.last - span.first + 1
    for row in table.to_pylist():
        seen = [
            (time, value)
            for user in users
            for item, time, value in list(zip(user["items"], user["timestamps"], user["values"], strict=True))[: user["num_train"]]
            if item == row["item_index"]
        ]
        times = [time for time, _ in seen]
        num_values, mean, variance = expected_moments([value for _, value in seen])
        periods = Counter((time - span.first) * NUM_PERIODS // width for time in times)
        assert (row["train_count"], row["num_values"]) == (len(seen), num_values)
        assert row["value_mean"] == near(mean, 1e-12)
        assert row["value_variance"] == near(variance, 1e-9)
        assert (row["first_seen"], row["last_seen"]) == ((min(times), max(times)) if times else (None, None))
        assert row["recency_seconds"] == (span.end - max(times) if times else None)
        assert row["period_counts"] == [periods[number] for number in range(NUM_PERIODS)]
    assert table.num_rows == 30
    assert table["train_count"].to_pylist()[-3:] == [0, 0, 0]


def test_what_comes_after_training_changes_nothing() -> None:
    users = make_users(30, seed=3)
    span = span_of(users)
    cut = [{**user, **{name: user[name][: user["num_train"]] for name in ("items", "events", "timestamps", "values")}} for user in users]
    assert user_statistics(histories_of(users), 3, span, GAP).equals(user_statistics(histories_of(cut), 3, span, GAP))
    assert item_sums(histories_of(users), span).equals(item_sums(histories_of(cut), span))


def test_positions_are_no_times() -> None:
    users = make_users(20, seed=4)
    table = user_statistics(histories_of(users), 3, None, GAP)
    for name in ("mean_gap_seconds", "recency_seconds", "num_sessions", "mean_session_length"):
        assert table[name].null_count == table.num_rows
    totals = ItemTotals(30, has_time=False)
    totals.add(item_sums(histories_of(users), None))
    items = item_statistics(totals, None)
    assert items["first_seen"].null_count == items["recency_seconds"].null_count == 30
    assert items["period_counts"].to_pylist() == [[]] * 30
    assert set(item_numbers(items)) == {"statistics.log_count", "statistics.mean_value"}


def test_variance_survives_a_mean_that_dwarfs_it() -> None:
    generator = np.random.default_rng(5)
    values, groups = 1e9 + generator.normal(0, 1e-3, 5000), generator.integers(0, 4, 5000)
    whole = Moments.of(values, groups, 4)
    parts = Moments.of(values[:100], groups[:100], 4).merge(Moments.of(values[100:], groups[100:], 4))
    for group in range(4):
        expected = np.var(values[groups == group])
        assert whole.variance[group] == pytest.approx(expected, rel=1e-6)
        assert parts.variance[group] == pytest.approx(expected, rel=1e-6)


def test_sessions_end_where_more_than_the_gap_passes() -> None:
    users = [
        {**make_users(1, 0)[0], **{name: [1] * 4 for name in ("items", "events", "values")}, "timestamps": times, "num_train": 4}
        for times in ([0, GAP, 2 * GAP + 1, 2 * GAP + 2], [5, 5, 5, 5])
    ]
    owners, lengths = session_lengths(histories_of(users), GAP)
    assert owners.tolist() == [0, 0, 1]
    assert lengths.tolist() == [2, 2, 4]


def test_item_numbers_say_what_their_names_say() -> None:
    span = TrainSpan(0, NUM_PERIODS * 10 - 1, NUM_PERIODS * 10 - 1)
    user = {
        **make_users(1, 0)[0],
        "items": [1, 1, 1, 2],
        "events": [0] * 4,
        "timestamps": [0, 70, 79, 79],
        "values": [2.0, 4.0, None, None],
    }
    totals = ItemTotals(3, has_time=True)
    totals.add(item_sums(histories_of([{**user, "num_train": 4}]), span))
    numbers = item_numbers(item_statistics(totals, span))
    np.testing.assert_allclose(numbers["statistics.log_count"], np.log([4, 2, 1]))
    np.testing.assert_allclose(numbers["statistics.mean_value"], [3.0, np.nan, np.nan])
    np.testing.assert_allclose(numbers["statistics.recency"], [0.0, 0.0, np.nan])
    np.testing.assert_allclose(numbers["statistics.trend"], [np.log(3 / 2), np.log(2), np.nan])
    assert "statistics.taken" not in numbers


def test_the_rate_at_which_an_item_is_taken_is_pulled_towards_the_mean_rate() -> None:
    histories, span = histories_of(make_users(5, 0)), TrainSpan(0, 1, 1)
    totals = ItemTotals(30, has_time=False)
    totals.add(item_sums(histories, None, Shown(np.array([1, 1, 2]), np.array([True, True, False]))))
    totals.add(item_sums(histories, None, Shown(np.array([2, 30]), np.array([False, True]))))
    table = item_statistics(totals, None)
    assert table["num_shown"].to_pylist() == [2, 2, *[0] * 27, 1]
    assert table["num_taken"].to_pylist() == [2, 0, *[0] * 27, 1]
    plain = item_statistics(ItemTotals(30, has_time=True), span)
    assert plain["num_shown"].null_count == plain["num_taken"].null_count == 30
    rates = [(2 + PRIOR_EXPOSURES * 3 / 5) / (2 + PRIOR_EXPOSURES), (0 + PRIOR_EXPOSURES * 3 / 5) / (2 + PRIOR_EXPOSURES)]
    taken = item_numbers(table)["statistics.taken"]
    np.testing.assert_allclose(taken[:2], [np.log(rate / (1 - rate)) for rate in rates])
    assert np.isnan(taken[2:29]).all()


def test_the_share_of_what_was_taken_counts_each_row_once() -> None:
    shown, disliked = Kind("exposure", "exposure", marks_seen=False), Kind("dislike", "negative", marks_seen=False)
    clicked, bought = Kind("click"), Kind("purchase")
    counts = np.array([7, 2, 1])
    rows = taken_moments((shown, clicked, bought), counts, has_labels=True)
    assert rows == pytest.approx((3 / 11, (3 * 8) ** 0.5 / 11))
    log = taken_moments((shown, clicked, bought), counts, has_labels=False)
    assert log == pytest.approx((3 / 9, (3 * 6) ** 0.5 / 9))
    assert taken_moments((disliked, clicked, bought), counts, has_labels=False) == rows
    assert taken_moments((replace(shown, in_history=False), disliked, clicked), np.array([0, 7, 2]), has_labels=False) == rows
