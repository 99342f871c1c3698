"""Splits and withheld items: by hand, compared with plain references, and independent of order, partition and version."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.config.data import DataConfig
from recsys.data.sequences import Sequences
from recsys.ingest.write.sequence_tables import by_part
from recsys.ingest.write.splits import TEST, TRAINING, VALIDATION, WITHHELD, part_by_place, split_events, split_in_order, withheld
from recsys.schema import DEFAULT_EVENT, EVENTS_SCHEMA

RANDOM = DataConfig(split="random", test_fraction=0.25, validation_fraction=0.2)


def events_of(rows: list[tuple[str, str, int]]) -> tuple[pa.Table, np.ndarray]:
    """Build events sorted by user from (user, item, time), and the users' offsets."""
    rows = sorted(rows, key=lambda row: row[0])
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[], [], []]
    extra = [[DEFAULT_EVENT] * len(rows), [None] * len(rows), [None] * len(rows), list(range(len(rows)))]
    _, counts = np.unique(np.array(columns[0], str), return_counts=True)
    return pa.table([*columns, *extra], schema=EVENTS_SCHEMA), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def parts_of(rows: list[tuple[str, str, int]], data: DataConfig) -> dict[tuple[str, str, int], int]:
    events, offsets = events_of(rows)
    keys = zip(*(events[name].to_pylist() for name in ("user_id", "item_id", "timestamp")), strict=True)
    return dict(zip(keys, split_events(events, offsets, data).tolist(), strict=True))


def grid(num_users: int, num_items: int) -> list[tuple[str, str, int]]:
    return [(f"u{user}", f"i{item}", 7 * user + item) for user in range(num_users) for item in range(num_items)]


def test_leave_one_out_takes_two_of_users_with_three_or_more() -> None:
    parts = split_in_order(np.arange(16), np.array([0, 1, 3, 6, 16]), DataConfig())
    assert parts.tolist() == [0, 0, 0, *[0, 1, 2], *[0] * 8, 1, 2]


def test_time_splits_at_the_two_moments() -> None:
    data = DataConfig(split="time", validation_from=10, test_from=20)
    parts = split_in_order(np.array([1, 9, 10, 19, 20, 21, 25, 9]), np.array([0, 5, 7, 8]), data)
    assert parts.tolist() == [0, 0, 1, 1, 2, 2, 2, 0]


def test_what_is_late_behind_a_held_out_interaction_is_held_out_too() -> None:
    data = DataConfig(split="time", validation_from=10, test_from=20)
    parts = split_in_order(np.array([1, 12, 3, 25, 15, 4, 5]), np.array([0, 5, 5, 7]), data)
    assert parts.tolist() == [0, 1, 1, 2, 2, 0, 0]


interactions = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("wxyz"), st.integers(0, 9)), unique=True, max_size=30)


@given(rows=interactions, data=st.data(), seed=st.integers(0, 5))
def test_what_is_drawn_depends_on_nothing_but_the_interaction_and_the_seed(
    rows: list[tuple[str, str, int]], data: st.DataObject, seed: int
) -> None:
    config = RANDOM.model_copy(update={"split_seed": seed})
    whole = parts_of(rows, config)
    some = data.draw(st.lists(st.sampled_from(rows), unique=True)) if rows else []
    assert parts_of(some, config) == {row: whole[row] for row in some}


def test_the_drawn_shares_are_those_of_the_config_and_the_seed_draws_anew() -> None:
    rows = grid(200, 100)
    drawn = parts_of(rows, RANDOM)
    shares = np.bincount(list(drawn.values()), minlength=3) / len(rows)
    deviation = np.sqrt(0.25 / len(rows))
    np.testing.assert_allclose(shares, [0.75 * 0.8, 0.75 * 0.2, 0.25], atol=4 * deviation)
    for axis in (0, 1):  # held-out interactions are spread over all users and items
        tested = {name: np.mean([part == TEST for row, part in drawn.items() if row[axis] == name]) for name in {row[axis] for row in rows}}
        assert 0.0 < min(tested.values()) < max(tested.values()) < 0.6
    again = parts_of(rows, RANDOM.model_copy(update={"split_seed": 1}))
    assert np.mean([again[row] == part for row, part in drawn.items()]) == pytest.approx((shares**2).sum(), abs=0.02)


def test_another_validation_share_leaves_the_test_targets_what_they_are() -> None:
    first, second = (parts_of(grid(20, 20), RANDOM.model_copy(update={"validation_fraction": share})) for share in (0.1, 0.5))
    assert {row for row, part in first.items() if part == TEST} == {row for row, part in second.items() if part == TEST}


def test_a_draw_is_the_same_in_every_release() -> None:
    """Another hash would change the held-out interactions of published datasets."""
    assert list(parts_of([("u", "i", time) for time in range(12)], RANDOM).values()) == [0, 1, 0, 1, 0, 0, 2, 2, 2, 2, 2, 0]
    ids = pa.array([f"i{number}" for number in range(40)])
    assert np.flatnonzero(withheld(ids, DataConfig(withheld_items=0.1))).tolist() == [13, 14, 15, 37]


def test_about_the_share_of_the_items_is_withheld_and_a_larger_catalogue_keeps_them() -> None:
    ids = pa.array([f"i{number}" for number in range(5000)])
    data = DataConfig(withheld_items=0.1)
    chosen = withheld(ids, data)
    assert chosen.mean() == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 5000))
    assert withheld(ids[1000:3000], data).tolist() == chosen[1000:3000].tolist()
    assert not withheld(ids, DataConfig()).any()
    others = withheld(ids, data.model_copy(update={"split_seed": 1}))
    assert (chosen & others).mean() < 0.03
    assert (chosen <= withheld(ids, DataConfig(withheld_items=0.3))).all()


@given(st.lists(st.lists(st.integers(TRAINING, WITHHELD), max_size=9), max_size=6))
def test_rows_have_training_first_then_validation_then_test_each_in_order(users: list[list[int]]) -> None:
    offsets = np.cumsum([0, *map(len, users)])
    flat = np.array([part for parts in users for part in parts], np.int64)
    rows, num_train, num_validation = by_part(Sequences.of_offsets({"items": np.arange(len(flat))}, offsets), flat)
    expected = [
        [offsets[user] + place for part in range(3) for place, own in enumerate(parts) if own == part] for user, parts in enumerate(users)
    ]
    assert [rows.columns["items"][low:high].tolist() for low, high in zip(rows.offsets, rows.offsets[1:], strict=False)] == expected
    assert num_train.tolist() == [parts.count(TRAINING) for parts in users]
    assert num_validation.tolist() == [parts.count(VALIDATION) for parts in users]
    assert part_by_place(rows.offsets, num_train, num_validation).tolist() == [
        part for parts in users for part in sorted(parts) if part != WITHHELD
    ]
