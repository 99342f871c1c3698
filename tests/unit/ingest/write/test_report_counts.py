"""The report's counts: correct bins, sums over partitions, and detection of planted leaks."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys.data.sequences import Sequences
from recsys.ingest.write.report_counts import (
    GAP_EDGES,
    LENGTH_EDGES,
    Counts,
    Limits,
    count_partition,
    merge_counts,
    value_scale,
)
from recsys.ingest.write.report_numbers import check_split

USERS = [  # (user_index, num_train, num_validation, [(item, time, kind, value)])
    (7, 3, 1, [(1, 0, 0, 1.0), (2, 10, 1, None), (3, 5000, 0, 5.0), (4, 5001, 0, 2.0), (5, 9000, 1, 2.5)]),
    (9, 2, 0, [(1, 3, 0, None), (1, 8999, 0, None)]),
]


def histories_of(users: list[tuple] = USERS) -> Sequences:
    rows = [row for user in users for row in user[3]]
    item, time, kind, value = (list(column) for column in zip(*rows, strict=True))
    return Sequences.of_offsets(
        {"items": np.array(item), "events": np.array(kind), "timestamps": np.array(time), "values": np.array(value, float)},
        np.cumsum([0, *(len(user[3]) for user in users)]),
        user_index=np.array([user[0] for user in users]),
        num_train=np.array([user[1] for user in users]),
        num_validation=np.array([user[2] for user in users]),
    )


def samples_of(users: list[tuple] = USERS, extra: list[tuple] | None = None) -> pa.Table:
    rows = [(user[0], item, time, kind) for user in users for item, time, kind, _ in user[3][: user[1]]] + (extra or [])
    names = ("user_index", "item", "time", "event")
    return pa.table({name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})


NONE_WITHHELD = np.zeros(9, bool)


def count(
    users: list[tuple] = USERS, extra: list[tuple] | None = None, has_time: bool = True, is_withheld: np.ndarray = NONE_WITHHELD
) -> Counts:
    histories = histories_of(users)
    return count_partition(histories, samples_of(users, extra), is_withheld, 2, Limits.of(histories, has_time), 1800)


def test_every_interaction_is_counted_in_its_split_kind_and_bins() -> None:
    counts = count()
    assert counts["splits"] == [5, 1, 1]
    assert counts["users_with"] == [2, 1, 1]
    assert counts["kinds"] == [5, 2]
    assert {LENGTH_EDGES[place]: number for place, number in enumerate(counts["lengths"]) if number} == {2: 1, 4: 1}
    assert [sum(counts[f"times_{name}"]) for name in ("training", "validation", "test")] == [5, 1, 1]
    assert counts["times_test"][-1] == 1
    gaps = {GAP_EDGES[place]: number for place, number in enumerate(counts["gaps"]) if number}
    assert gaps == {1: 1, 10: 1, 3162: 2, 5623: 1}
    assert {LENGTH_EDGES[place]: number for place, number in enumerate(counts["session_lengths"]) if number} == {1: 3, 2: 2}
    assert sum(counts["values"]) == 4
    assert counts["scale"] == [1, 0, 1, 1, 0, 0, 0, 0, 1]
    assert counts["off_scale"] == [0]


def test_pairs_are_counted_once() -> None:
    assert count()["pairs"] == [6]  # user 9 takes item 1 twice
    assert merge_counts([count(), count()])["pairs"].tolist() == [12]


def test_no_time_and_no_values_leave_their_counts_out() -> None:
    bare = [(user, train, validation, [(*row[:3], None) for row in rows]) for user, train, validation, rows in USERS]
    counts = count(bare, has_time=False)
    assert not {"times_training", "gaps", "session_lengths", "values", "scale"} & counts.keys()
    assert counts["before_training"] == [0, 0]


def test_a_clean_split_has_no_leak_but_the_clock() -> None:
    counts = count()
    assert counts["targets"] == [1, 1]
    for name in ("before_training", "before_validation", "in_samples", "in_history"):
        assert counts[name] == [0, 0]
    assert counts["before_training_of_others"] == [1, 0]


@pytest.mark.parametrize(
    ("name", "users", "extra", "expected"),
    [
        ("in_samples", USERS, [(7, 5, 9000, 1)], [0, 1]),
        ("in_samples", USERS, [(7, 5, 9000, 0)], [0, 0]),
        ("before_training", USERS, [(7, 6, 5002, 0)], [1, 0]),
        ("in_history", [(7, 2, 1, [(1, 0, 0, None), (2, 1, 0, None), (1, 2, 0, None), (1, 3, 1, None)])], [], [1, 1]),
        ("before_validation", [(7, 1, 1, [(1, 0, 0, None), (2, 9, 0, None), (3, 5, 0, None)])], [], [0, 1]),
    ],
)
def test_a_leak_that_is_put_in_is_found(name: str, users: list[tuple], extra: list[tuple], expected: list[int]) -> None:
    assert count(users, extra)[name] == expected


def test_gaps_and_sessions_are_those_of_time_and_users_with_nothing_left_have_no_length() -> None:
    held_out_early = [(7, 2, 1, [(1, 0, 0, None), (2, 9000, 0, None), (3, 10, 0, None), (4, 20, 0, None)]), (8, 0, 0, [])]
    counts = count(held_out_early)
    assert {GAP_EDGES[place]: number for place, number in enumerate(counts["gaps"]) if number} == {10: 2, 5623: 1}
    assert {LENGTH_EDGES[place]: number for place, number in enumerate(counts["session_lengths"]) if number} == {1: 1, 3: 1}
    assert {LENGTH_EDGES[place]: number for place, number in enumerate(counts["lengths"]) if number} == {4: 1}


def judged(counts: Counts, **data_config: Any) -> dict[str, str]:
    checks = check_split({name: np.array(column) for name, column in counts.items()}, data_config, has_time=True)
    return {check.title: check.state for check in checks}


def test_what_the_random_split_does_by_design_is_noted_and_fails_elsewhere() -> None:
    out_of_order = [(7, 2, 1, [(1, 0, 0, None), (2, 9, 0, None), (3, 7, 0, None), (4, 5, 0, None)])]
    titles = ("Targets before training ends", "Test before validation")
    assert [judged(count(out_of_order), split="random")[title] for title in titles] == ["note", "note"]
    assert [judged(count(out_of_order), split="time")[title] for title in titles] == ["fail", "fail"]
    leak = count(out_of_order, [(7, 4, 5, 0)])
    assert judged(leak, split="random")["Targets in training samples"] == "fail"


def test_targets_of_withheld_items_are_counted_and_one_in_a_sample_is_a_fault() -> None:
    is_withheld = np.arange(1, 10) >= 4
    counts = count(is_withheld=is_withheld)
    assert (counts["withheld"], counts["withheld_in_samples"]) == ([1, 1], [0])
    assert judged(counts, split="time", withheld_items=0.5)["Cold targets"] == "pass"
    assert "Cold targets" not in judged(counts, split="time", withheld_items=0.0)
    leak = count(extra=[(9, 4, 1, 0)], is_withheld=is_withheld)
    assert leak["withheld_in_samples"] == [1]
    assert judged(leak, split="time", withheld_items=0.5)["Cold targets"] == "fail"


def test_partitions_add_up_to_the_whole() -> None:
    whole = histories_of()
    limits = Limits.of(whole, has_time=True)
    parts = [[user] for user in USERS]
    assert Limits.merge([Limits.of(histories_of(part), has_time=True) for part in parts]) == limits
    counts = [count_partition(histories_of(part), samples_of(part), NONE_WITHHELD, 2, limits, 1800) for part in parts]
    merged = merge_counts([*counts, {}])
    assert {name: column.tolist() for name, column in merged.items()} == count_partition(
        whole, samples_of(), NONE_WITHHELD, 2, limits, 1800
    )


def test_a_scale_is_short() -> None:
    assert value_scale((1.0, 5.0)) == (1.0, 9)
    assert value_scale((0.5, 5.0)) == (0.0, 11)
    assert value_scale((0.0, 1000.0))[1] == 0
