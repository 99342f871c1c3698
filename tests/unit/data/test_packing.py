"""Packing: one position per interaction, groups with the least padding, compared with all possible groupings."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recsys.data.batch import group_lengths, pack
from recsys.data.sequences import Sequences, ranges


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 20))
def test_groups_are_the_cheapest_of_all(lengths: list[int], group_cost: int) -> None:
    _, groups = group_lengths(np.array(lengths), group_cost)
    cost = sum(number * length + group_cost for number, length in groups)
    distinct = sorted(set(lengths))
    costs = []
    for cuts in itertools.product([False, True], repeat=len(distinct) - 1):
        limits = [length for length, is_cut in zip(distinct, [*cuts, True], strict=True) if is_cut]
        own = [min(limit for limit in limits if limit >= length) for length in lengths]
        costs.append(sum(own) + group_cost * len(limits))
    assert cost == min(costs)
    assert sum(number for number, _ in groups) == len(lengths)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 200))
def test_histories_lie_in_their_groups_and_do_not_overlap(lengths: list[int], group_cost: int) -> None:
    starts, groups = group_lengths(np.array(lengths), group_cost)
    places = ranges(starts, np.array(lengths))
    assert len(set(places.tolist())) == sum(lengths)
    begins, limits = [], []
    at = 0
    for number, length in groups:
        begins += [at + index * length for index in range(number)]
        limits += [length] * number
        at += number * length
    assert sorted(starts.tolist()) == begins
    width = dict(zip(begins, limits, strict=True))
    assert all(length <= width[start] for start, length in zip(starts.tolist(), lengths, strict=True))


def test_packed_columns_are_the_rows_own() -> None:
    columns = {
        "items": np.array([9, 9, 1, 2, 3, 4, 5, 6], np.int32),
        "events": np.array([0, 0, 1, 0, 1, 0, 1, 0], np.int8),
        "values": np.arange(8, dtype=np.float32),
    }
    histories, starts = pack(Sequences(columns, np.array([5, 2, 0]), np.array([3, 2, 0])), group_cost=0)
    assert histories.groups == ((1, 1), (1, 2), (1, 3))
    assert starts.tolist() == [3, 1, 0]
    assert histories.items.tolist() == [0, 1, 2, 4, 5, 6]
    assert histories.events.tolist() == [0, 2, 1, 1, 2, 1]
    assert histories.times.tolist() == [0] * 6
    np.testing.assert_array_equal(histories.values, [np.nan, 2, 3, 5, 6, 7])
