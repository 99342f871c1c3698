"""Cleaning: exact tables and counts for every rejection rule, and the tie rule."""

import math
from datetime import UTC, date, datetime

import pyarrow as pa
import pytest

from recsys.config.data import CleaningConfig
from recsys.errors import UserError
from recsys.ingest.clean.cleaning import (
    apply_rules,
    cast_events,
    drop_bots,
    notice_ids,
    notice_order,
    sort_and_deduplicate,
)
from recsys.ingest.sources.scalars import numbers_of, spell
from recsys.schema import EVENTS_SCHEMA


def raw_events(**columns: list) -> pa.Table:
    number = len(next(iter(columns.values())))
    defaults = {"user_id": ["u"] * number, "item_id": ["i"] * number, "timestamp": [1] * number}
    return pa.table({**defaults, **columns, "input_order": list(range(number))})


def test_each_fault_is_counted_once_under_the_first_reason() -> None:
    raw = raw_events(
        user_id=["a", None, " ", "a", "a", "a", "a", "a", "a", "a"],
        item_id=["1", None, "1", None, "1", "1", "1", "1", "1", " 1 "],
        timestamp=["5", "5", "5", "5", None, "soon", "5", "5", "5", "6.9"],
        event=["view", "view", "view", "view", "view", "view", None, "view", "view", "click"],
        value=["1", "1", "1", "1", "1", "1", "1", "good", "inf", None],
        query=[" tent", *["lost"] * 8, " "],
    )
    events, rejected = cast_events(raw)
    assert dict(rejected) == {"null_user": 2, "null_item": 1, "null_time": 1, "bad_time": 1, "null_event": 1, "bad_value": 2}
    assert events.schema == EVENTS_SCHEMA
    assert events.to_pylist() == [
        {"user_id": "a", "item_id": "1", "timestamp": 5, "event": "view", "value": 1.0, "query": "tent", "input_order": 0},
        {"user_id": "a", "item_id": "1", "timestamp": 6, "event": "click", "value": None, "query": None, "input_order": 9},
    ]


def test_ids_of_every_type_become_the_same_strings() -> None:
    for ids in (["7", "-1"], [7, -1], [7.0, -1.0], pa.array(["7", "-1"]).dictionary_encode()):
        events, _ = cast_events(raw_events(user_id=ids))
        assert events["user_id"].to_pylist() == ["7", "-1"]
    assert cast_events(raw_events(user_id=[7.0, math.nan]))[1] == {"null_user": 1}
    with pytest.raises(UserError, match="column 'user_id'"):
        cast_events(raw_events(user_id=[["a"], ["b"]]))


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        ([-3, 4], [-3, 4]),
        ([1.9, -0.5], [1, -1]),
        (["12", "1970-01-02", "1970-01-01T00:00:10.5+00:00", " 8 "], [12, 86400, 10, 8]),
        ([date(1970, 1, 2)], [86400]),
        ([datetime(1969, 12, 31, 23, 59, 59, 500_000, tzinfo=UTC)], [-1]),
        (pa.array([1_500_000_000_999_999_999], pa.timestamp("ns")), [1_500_000_000]),
    ],
)
def test_times_become_whole_seconds(times: list, seconds: list[int]) -> None:
    events, rejected = cast_events(raw_events(timestamp=times))
    assert events["timestamp"].to_pylist() == seconds
    assert not rejected


def test_impossible_times_are_bad() -> None:
    events, rejected = cast_events(raw_events(timestamp=[1e30, math.nan, math.inf, 1.0]))
    assert dict(rejected) == {"bad_time": 3}
    assert events["timestamp"].to_pylist() == [1]
    assert cast_events(raw_events(timestamp=[True]))[0]["timestamp"].to_pylist() == [1]


def test_values_that_are_not_finite_numbers_are_bad() -> None:
    events, rejected = cast_events(raw_events(value=[1.5, math.nan, -math.inf, 1e300, None]))
    assert dict(rejected) == {"bad_value": 3}
    assert events["value"].to_pylist() == [1.5, None]


def test_position_stands_in_for_time() -> None:
    raw = pa.table({"user_id": ["a"], "item_id": ["b"], "position": [3], "input_order": [0]})
    assert cast_events(raw)[0].to_pylist() == [
        {"user_id": "a", "item_id": "b", "timestamp": 3, "event": "interaction", "value": None, "query": None, "input_order": 0}
    ]


def clean_events(rows: list[tuple]) -> pa.Table:
    """Build a table of EVENTS_SCHEMA from rows without queries."""
    names = [name for name in EVENTS_SCHEMA.names if name != "query"]
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=EVENTS_SCHEMA)


def test_ties_keep_the_input_order_and_duplicates_their_first() -> None:
    events = clean_events(
        [
            ("b", "i2", 5, "view", 1.0, 4),
            ("b", "i1", 5, "view", 2.0, 3),
            ("a", "i1", 9, "view", 3.0, 2),
            ("b", "i1", 5, "view", 9.0, 7),
            ("b", "i1", 5, "click", 4.0, 8),
            ("b", "i3", 1, "view", None, 9),
        ]
    )
    kept, num_duplicates = sort_and_deduplicate(events)
    assert num_duplicates == 1
    assert [(row["user_id"], row["item_id"], row["event"], row["input_order"]) for row in kept.to_pylist()] == [
        ("a", "i1", "view", 2),
        ("b", "i3", "view", 9),
        ("b", "i1", "view", 3),
        ("b", "i2", "view", 4),
        ("b", "i1", "click", 8),
    ]


def test_numbers_that_cannot_be_read_are_null() -> None:
    assert numbers_of(pa.chunked_array([["1", " 2.5 ", "-3e1", "x", "", "nan", None]])).to_pylist() == [
        1,
        2.5,
        -30,
        None,
        None,
        None,
        None,
    ]
    assert numbers_of(pa.chunked_array([[[1], [2]]])).to_pylist() == [None, None]


def test_each_rule_drops_what_it_names_and_bounds_are_inside() -> None:
    rules = CleaningConfig(min_value=0.7, max_value=0.8, min_time=10, max_time=20, reject_negative_ids=True)
    rows = [
        ("a", "i", 10, "view", 0.7, 0),
        ("a", "i", 20, "view", 0.8, 1),
        ("a", "i", 15, "view", None, 2),
        ("a", "i", 15, "view", 0.69, 3),
        ("-1", "i", 99, "view", 0.81, 4),
        ("a", "i", 9, "view", 0.75, 5),
        ("a", "i", 21, "view", 0.75, 6),
        ("-1", "i", 15, "view", 0.75, 7),
        ("a", "-2", 15, "view", 0.75, 8),
        ("a-1", "--2", 15, "view", 0.75, 9),
    ]
    kept, rejected = apply_rules(clean_events(rows), rules, has_time=True)
    assert kept["input_order"].to_pylist() == [0, 1, 2, 9]
    assert rejected == {"outlier_value": 2, "early_time": 1, "future_time": 1, "negative_id": 2}
    kept, rejected = apply_rules(clean_events(rows), rules, has_time=False)
    assert kept["input_order"].to_pylist() == [0, 1, 2, 5, 6, 9]
    assert rejected == {"outlier_value": 2, "negative_id": 2}


def test_only_one_end_of_a_range_may_be_given() -> None:
    rows = clean_events([("a", "i", 1, "view", value, 0) for value in (-5.0, 0.0, 5.0)])
    assert apply_rules(rows, CleaningConfig(min_value=0), has_time=True)[0]["value"].to_pylist() == [0.0, 5.0]
    assert apply_rules(rows, CleaningConfig(max_value=0), has_time=True)[0]["value"].to_pylist() == [-5.0, 0.0]
    kept, rejected = apply_rules(rows, CleaningConfig(), has_time=True)
    assert (kept.num_rows, dict(rejected)) == (3, {})


def test_a_bot_goes_whole_and_minutes_are_those_of_the_clock() -> None:
    bot = [("bot", f"i{number}", 60 + 29 * number, "view", None, number) for number in range(3)]  # 60, 89 and 118 s are in the same minute
    fast = [("fast", f"i{number}", time, "view", None, 10 + number) for number, time in enumerate((58, 59, 60, 61))]
    early = [("early", f"i{number}", -1 - number, "view", None, 20 + number) for number in range(2)]
    events = clean_events([*bot, ("bot", "i9", 9999, "view", None, 9), *fast, *early])
    kept, num_dropped = drop_bots(events, 2)
    assert num_dropped == 4
    assert set(kept["user_id"].to_pylist()) == {"fast", "early"}
    assert drop_bots(events, 1)[0].num_rows == 0
    assert drop_bots(events, None) == (events, 0)


def test_odd_ids_are_kept_and_counted_by_event() -> None:
    ids = [("-7", "i"), ("-7", "-8"), ("a\x00", "i"), ("a", "i\ufffd"), ("-7.5", "\x85"), ("a-1", "i"), ("-", "i")]
    events = clean_events([(user, item, 1, "view", None, number) for number, (user, item) in enumerate(ids)])
    assert notice_ids(events) == {"negative_id": 3, "odd_id": 3}
    assert notice_ids(events.slice(0, 0)) == {}


def test_ties_and_the_order_of_the_input_are_noticed_within_a_user() -> None:
    rows = [("a", "i1", 5, 3), ("a", "i2", 5, 4), ("a", "i3", 7, 1), ("b", "i1", 7, 0), ("b", "i2", 8, 2), ("b", "i3", 8, 9)]
    events = clean_events([(user, item, time, "view", None, order) for user, item, time, order in rows])
    assert notice_order(events) == {"out_of_order": 1, "equal_time": 2}
    assert notice_order(events.slice(0, 0)) == {}


def test_broken_text_becomes_replacement_characters() -> None:
    raw = pa.array([b"a\xed\xa0\x80 ", None, b"fine"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    column = pa.chunked_array([strings])
    assert spell(column).to_pylist() == ["a\ufffd\ufffd\ufffd ", None, "fine"]
    lists = pa.chunked_array([pa.ListArray.from_arrays(pa.array([0, 2, 3], pa.int32()), strings)])
    assert spell(lists).to_pylist() == [["a\ufffd\ufffd\ufffd ", None], ["fine"]]
    assert cast_events(raw_events(user_id=strings))[0]["user_id"].to_pylist() == [r"a\xed\xa0\x80", "fine"]
