"""The arithmetic of the sequence training benchmark: metrics of given lists, summary of rounds, steps within a time."""

import numpy as np
import pytest

from recsys.data.sequences import Sequences
from recsys.evaluation.users import EvaluationUser
from tests.benchmarks.sequence_training import BARE, OURS, RECTOOLS, metrics_of_lists, speed_rows, steps_within
from tests.users import evaluation_user


def user_of(index: int, seen: list[int], targets: list[int]) -> EvaluationUser:
    return evaluation_user(index, Sequences.of(seen), Sequences.of(targets), {}, 0)


def test_lists_are_scored_by_the_place_of_the_target() -> None:
    users = [user_of(4, [1, 2], [9]), user_of(7, [3], [5]), user_of(8, [3], [6]), user_of(9, [3], [7])]
    lists = {4: [9, 3], 7: [1, 2, 5], 8: [*range(10, 20), 6]}
    metrics = metrics_of_lists(lists, users)
    assert metrics["hr@10"] == 0.5
    assert metrics["ndcg@10"] == pytest.approx((1 + 1 / np.log2(4)) / 4)


def test_a_list_with_an_item_that_was_seen_is_refused() -> None:
    with pytest.raises(ValueError, match="user 4 is recommended what was seen"):
        metrics_of_lists({4: [9, 2]}, [user_of(4, [1, 2], [9])])


def test_rounds_are_compared_one_by_one() -> None:
    rounds = [
        {RECTOOLS: 100.0, BARE: 1000.0, OURS: 900.0},
        {RECTOOLS: 50.0, BARE: 500.0, OURS: 500.0},
        {RECTOOLS: 90.0, BARE: 800.0, OURS: 810.0},
    ]
    rows = {row.pop("contender"): row for row in speed_rows(rounds)}
    assert rows[RECTOOLS] == {
        "sequences_per_second": 90,
        "least": 50,
        "greatest": 100,
        "ours_is_times": 9,
        "times_least": 9,
        "times_greatest": 10,
    }
    assert (rows[BARE]["ours_is_times"], rows[BARE]["times_least"]) == (1.0, 0.9)
    assert rows[OURS]["ours_is_times"] == 1


def test_steps_fit_into_the_time() -> None:
    assert steps_within(300, 2000, 128) == 4687
    assert steps_within(0.01, 10, 128) == 1
