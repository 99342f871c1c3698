"""Gaps between groups of users: compared by hand, with counts of what is left out, and an interval that reflects noise."""

import numpy as np
import pytest

from recsys.data.sequences import Sequences
from recsys.errors import UserError
from recsys.evaluation.slices import MIN_GROUP_USERS, fairness_gaps
from recsys.evaluation.users import EvaluationUser
from tests.users import evaluation_user


def users_of(groups: list[str]) -> list[EvaluationUser]:
    nothing = Sequences.of([])
    return [
        evaluation_user(0, nothing, nothing, {"shop": group, "id": str(number)} if group else {}, 0) for number, group in enumerate(groups)
    ]


SIZES = {"a": 40, "b": 50, "c": 30, "small": MIN_GROUP_USERS - 1, "": MIN_GROUP_USERS + 5}
GROUPS = [name for name, size in SIZES.items() for _ in range(size)]


def test_gap_by_hand() -> None:
    values = np.array([{"a": 0.5, "b": 0.2, "c": 0.3}.get(group, 0.9) for group in GROUPS])
    found = fairness_gaps(values, users_of(GROUPS), [])
    assert found.keys() == {"shop"}  # "id" has too many values to be groups
    shop = found["shop"]
    assert {name: (group["num_users"], group["mean"]) for name, group in shop["groups"].items()} == {
        "a": (40, pytest.approx(0.5)),
        "b": (50, pytest.approx(0.2)),
        "c": (30, pytest.approx(0.3)),
    }
    assert shop["gap"] == pytest.approx(0.3)
    assert shop["relative_gap"] == pytest.approx(0.3 / ((40 * 0.5 + 50 * 0.2 + 30 * 0.3) / 120))
    assert shop["interval_95"] == pytest.approx((0.3, 0.3))  # all users of a group are equal
    assert (shop["num_groups_left_out"], shop["num_users_left_out"]) == (2, 2 * MIN_GROUP_USERS + 4)


def test_the_interval_is_that_of_two_independent_means() -> None:
    groups = ["a"] * 400 + ["b"] * 300
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.normal(1.0, 0.5, 400), generator.normal(0.5, 1.0, 300)])
    found = fairness_gaps(values, users_of(groups), ["shop"])["shop"]
    deviation = np.sqrt(values[:400].var() / 400 + values[400:].var() / 300)
    assert found["interval_95"] == pytest.approx((found["gap"] - 1.96 * deviation, found["gap"] + 1.96 * deviation), abs=0.02)


def test_an_attribute_that_nobody_has_is_refused_and_one_without_groups_left_out() -> None:
    values = np.zeros(len(GROUPS))
    with pytest.raises(UserError, match="'gender' is not an attribute of this dataset's users; known: id, shop"):
        fairness_gaps(values, users_of(GROUPS), ["gender"])
    assert fairness_gaps(values, users_of(GROUPS), ["id"]) == {}
    assert fairness_gaps(np.zeros(40), users_of(["a"] * 40), []) == {}
