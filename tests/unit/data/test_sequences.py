"""Rows of different lengths: selecting, cutting and joining; windows: each target once, none too long."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.data.sequences import Sequences, ranges
from tests.datasets import Window, windows_of


def test_windows_of_a_short_and_a_long_sequence() -> None:
    assert windows_of(0, 5, 5) == []
    assert windows_of(1, 5, 5) == []
    assert windows_of(2, 5, 5) == [Window(0, 2, 1)]
    assert windows_of(6, 5, 5) == [Window(0, 6, 1)]
    assert windows_of(8, 5, 5) == [Window(2, 8, 1), Window(0, 3, 1)]
    assert windows_of(8, 5, 2) == [Window(2, 8, 4), Window(0, 6, 4), Window(0, 4, 2), Window(0, 2, 1)]
    assert windows_of(8, 5, 5, first=7) == [Window(2, 8, 5)]
    assert windows_of(8, 5, 2, first=5) == [Window(2, 8, 4), Window(0, 6, 5)]
    assert windows_of(8, 5, 5, first=8) == []


@given(length=st.integers(0, 300), max_history=st.integers(2, 40), data=st.data())
def test_every_interaction_from_the_first_target_on_is_one_exactly_once(length: int, max_history: int, data: st.DataObject) -> None:
    stride, first = data.draw(st.integers(1, max_history)), data.draw(st.integers(1, length + 2))
    targets = []
    for window in windows_of(length, max_history, stride, first):
        assert 0 <= window.start < window.stop <= length
        assert window.stop - window.start <= max_history + 1
        assert 1 <= window.first_target < window.stop - window.start
        of_window = range(window.start + window.first_target, window.stop)
        assert len(of_window) <= stride
        targets += of_window
    assert sorted(targets) == list(range(first, length))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=20))
def test_gathered_rows_are_the_rows_one_after_another(rows: list[tuple[int, int]]) -> None:
    starts = np.array([start for start, _ in rows], np.int64)
    lengths = np.array([length for _, length in rows], np.int64)
    gathered = Sequences({"items": np.arange(60)}, starts, lengths).compact()
    expected = [list(range(start, start + length)) for start, length in rows]
    assert [gathered.items[low:high].tolist() for low, high in itertools.pairwise(gathered.offsets)] == expected
    assert [row.tolist() for row in gathered.split("items")] == expected
    positions = ranges(starts, lengths)
    assert [positions[low:high].tolist() for low, high in itertools.pairwise(gathered.offsets)] == expected
    assert gathered.owners.tolist() == [owner for owner, row in enumerate(expected) for _ in row]
    assert gathered.positions.tolist() == [position for row in expected for position in range(len(row))]


def test_a_view_of_rows_copies_nothing_and_a_part_of_them_is_theirs() -> None:
    rows = Sequences.of_offsets({"items": np.arange(9)}, np.array([0, 4, 4, 9]), first_target=np.array([1, 0, 3]))
    assert [row.tolist() for row in rows[np.array([2, 0])].last(3).split("items")] == [[6, 7, 8], [1, 2, 3]]
    assert [row.tolist() for row in rows.within(1, rows.scalars["first_target"]).split("items")] == [[], [], [5, 6]]
    assert np.shares_memory(rows[1:].items, rows.columns["items"])
    joined = Sequences.join([rows[2:], rows[:1]])
    assert joined.items.tolist() == [4, 5, 6, 7, 8, 0, 1, 2, 3]
    assert joined.scalars["first_target"].tolist() == [3, 1]


@pytest.mark.parametrize(("starts", "lengths", "expected"), [([4, 0], [2, 3], [4, 5, 0, 1, 2]), ([7], [0], []), ([], [], [])])
def test_ranges(starts: list[int], lengths: list[int], expected: list[int]) -> None:
    assert ranges(np.array(starts, np.int64), np.array(lengths, np.int64)).tolist() == expected
