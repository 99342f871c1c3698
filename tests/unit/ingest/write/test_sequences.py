"""Windows: each target once, no window too long."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recsys.ingest.write.sequences import Window, cut_windows, gather_ranges


def test_windows_of_a_short_and_a_long_sequence() -> None:
    assert cut_windows(0, 5, 5) == []
    assert cut_windows(1, 5, 5) == []
    assert cut_windows(2, 5, 5) == [Window(0, 2, 1)]
    assert cut_windows(6, 5, 5) == [Window(0, 6, 1)]
    assert cut_windows(8, 5, 5) == [Window(2, 8, 1), Window(0, 3, 1)]
    assert cut_windows(8, 5, 2) == [Window(2, 8, 4), Window(0, 6, 4), Window(0, 4, 2), Window(0, 2, 1)]
    assert cut_windows(8, 5, 5, first=7) == [Window(2, 8, 5)]
    assert cut_windows(8, 5, 2, first=5) == [Window(2, 8, 4), Window(0, 6, 5)]
    assert cut_windows(8, 5, 5, first=8) == []


@given(length=st.integers(0, 300), max_history=st.integers(2, 40), data=st.data())
def test_every_interaction_from_the_first_target_on_is_one_exactly_once(length: int, max_history: int, data: st.DataObject) -> None:
    stride, first = data.draw(st.integers(1, max_history)), data.draw(st.integers(1, length + 2))
    targets = []
    for window in cut_windows(length, max_history, stride, first):
        assert 0 <= window.start < window.stop <= length
        assert window.stop - window.start <= max_history + 1
        assert 1 <= window.first_target < window.stop - window.start
        of_window = range(window.start + window.first_target, window.stop)
        assert len(of_window) <= stride
        targets += of_window
    assert sorted(targets) == list(range(first, length))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), max_size=20))
def test_gathered_ranges_are_the_ranges_one_after_another(ranges: list[tuple[int, int]]) -> None:
    starts = np.array([start for start, _ in ranges], np.int64)
    stops = starts + np.array([length for _, length in ranges], np.int64)
    positions, offsets = gather_ranges(starts, stops)
    assert [positions[low:high].tolist() for low, high in itertools.pairwise(offsets)] == [
        list(range(start, start + length)) for start, length in ranges
    ]
