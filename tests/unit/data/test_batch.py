"""Collating: exact tensors of a small table, padding masked everywhere, distinct items listed once."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data.batch import Batch, Collator, cut_histories, shuffle_histories
from recsys.data.manifest import Dataset
from recsys.data.sequences import Sequences
from recsys.schema import TRAIN_SCHEMA
from recsys.store import Storage
from tests.datasets import make_dataset

NO_NEGATIVES = (torch.zeros(0, dtype=torch.long), torch.zeros(0))
ROWS = pa.Table.from_pylist(
    [
        {
            "user_index": 0,
            "items": [3, 4, 5],
            "events": [0, 1, 0],
            "timestamps": [0, 1, 8],
            "values": [5.0, float("nan"), 2.0],
            "first_target": 1,
        },
        {"user_index": 1, "items": [7, 8], "events": [1, 1], "timestamps": [5, 5], "values": [1.0, 4.0], "first_target": 1},
        {"user_index": 2, "items": [4, 9, 4], "events": [0, 0, 1], "timestamps": [0, 3, 9], "values": [3.0, 3.0, 5.0], "first_target": 2},
    ],
    TRAIN_SCHEMA,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("store"))))


def collate(
    dataset: Dataset, rows: pa.Table, takes_whole_catalogue: bool, negatives: tuple[torch.Tensor, torch.Tensor] = NO_NEGATIVES
) -> Batch:
    collator = Collator(dataset.manifest, takes_whole_catalogue, group_cost=0)
    return collator(Sequences.from_table(rows, sample_id=np.arange(rows.num_rows)), *negatives)


def test_whole_catalogue_batch(dataset: Dataset) -> None:
    batch = collate(dataset, ROWS, takes_whole_catalogue=True)
    assert batch.items.tolist() == list(range(dataset.manifest.num_items + 1))
    assert batch.histories.groups == ((1, 1), (2, 2))
    assert batch.histories.items.tolist() == [7, 3, 4, 4, 9]
    assert batch.histories.events.tolist() == [2, 1, 2, 1, 1]
    assert batch.histories.times.tolist() == [5, 0, 1, 0, 3]
    np.testing.assert_array_equal(batch.histories.values, [1.0, 5.0, np.nan, 3.0, 3.0])
    assert batch.target_places.tolist() == [1, 2, 0, 4]
    assert batch.targets.tolist() == [4, 5, 8, 4]


def test_one_group_pads_the_shorter_histories(dataset: Dataset) -> None:
    batch = Collator(dataset.manifest, True, group_cost=100)(Sequences.from_table(ROWS, sample_id=np.arange(3)), *NO_NEGATIVES)
    assert batch.histories.groups == ((3, 2),)
    assert batch.histories.items.tolist() == [7, 0, 3, 4, 4, 9]
    assert batch.histories.events.tolist() == [2, 0, 1, 2, 1, 1]
    assert batch.target_places.tolist() == [2, 3, 0, 5]


def test_labels_are_of_the_target_and_masked_where_missing(dataset: Dataset) -> None:
    names = [task.name for task in dataset.manifest.tasks]
    batch = collate(dataset, ROWS, takes_whole_catalogue=True)
    like, purchase, rating = (names.index(name) for name in ("like", "purchase", "rating"))
    assert batch.label_mask[:, purchase].tolist() == [1, 1, 1, 1]
    assert batch.labels[:, purchase].tolist() == [1, 0, 1, 1]
    assert batch.label_mask[:, like].tolist() == [0, 1, 1, 1]
    assert batch.labels[:, like].tolist() == [0, 0, 1, 1]
    expected = (2.0 - dataset.manifest.value_mean) / dataset.manifest.value_std
    assert batch.labels[1, rating].item() == pytest.approx(expected, rel=1e-6)


def test_distinct_items_are_listed_once_and_indexed(dataset: Dataset) -> None:
    negatives = (torch.tensor([4, 11, 11]), torch.zeros(3))
    batch = collate(dataset, ROWS, takes_whole_catalogue=False, negatives=negatives)
    assert batch.items.tolist() == [0, 3, 4, 5, 7, 8, 9, 11]
    assert batch.items[batch.histories.items].tolist() == [7, 3, 4, 4, 9]
    assert batch.items[batch.targets].tolist() == [4, 5, 8, 4]
    assert batch.items[batch.negatives].tolist() == [4, 11, 11]


def test_columns_that_were_not_read_are_empty(dataset: Dataset) -> None:
    rows = Sequences.from_table(ROWS.select(["items", "first_target"]), sample_id=np.arange(3))
    batch = Collator(dataset.manifest, True)(rows, *NO_NEGATIVES)
    assert batch.histories.events.tolist() == (batch.histories.items != 0).long().tolist()
    assert not batch.histories.times.any()
    assert batch.histories.values.isnan().all()


@pytest.mark.parametrize("takes_whole_catalogue", [True, False])
def test_no_rows_give_a_batch_without_targets(dataset: Dataset, takes_whole_catalogue: bool) -> None:
    batch = collate(dataset, ROWS.slice(0, 0), takes_whole_catalogue)
    assert batch.histories.groups == ((1, 1),)
    assert batch.valid_counts().sum() == 0


def test_counts_are_of_targets_and_labels(dataset: Dataset) -> None:
    batch = collate(dataset, ROWS, takes_whole_catalogue=True)
    names = [task.name for task in dataset.manifest.tasks]
    assert dict(zip(["retrieval", *names], batch.valid_counts().tolist(), strict=True)) == {
        "retrieval": 4,
        "purchase": 4,
        "rating": 3,
        "like": 3,
    }


def test_moving_a_batch_moves_its_histories(dataset: Dataset) -> None:
    moved = collate(dataset, ROWS, takes_whole_catalogue=True).to(torch.device("meta"))
    assert moved.targets.is_meta
    assert moved.histories.items.is_meta
    assert moved.histories.groups == ((1, 1), (2, 2))


def test_shuffled_histories_keep_each_interaction_whole_and_change_with_the_epoch() -> None:
    lengths = np.array([6, 1, 9, 9])
    numbers = np.arange(lengths.sum() + 4)  # row 0 begins at 4; the values before it belong to no row
    columns, scalars = {"items": numbers, "values": numbers / 2}, {"sample_id": np.array([7, 8, 9, 10]), "first_target": np.ones(4, int)}
    rows = Sequences(columns, np.cumsum(lengths) - lengths + 4, lengths, scalars)
    orders = {}
    for epoch in range(3):
        shuffled = shuffle_histories(rows, seed=1, epoch=epoch)
        np.testing.assert_array_equal(shuffled.columns["values"], shuffled.columns["items"] / 2)
        parts = [shuffled.columns["items"][start : start + length] for start, length in zip(shuffled.starts, shuffled.lengths, strict=True)]
        assert [sorted(part) for part in parts] == [list(range(4, 10)), [10], list(range(11, 20)), list(range(20, 29))]
        orders[epoch] = [part.tolist() for part in parts]
        assert np.argsort(parts[2]).tolist() != np.argsort(parts[3]).tolist()
    assert orders[0][2] != orders[1][2] != orders[2][2]
    alone = shuffle_histories(rows[np.array([2])], seed=1, epoch=0)
    assert alone.columns["items"].tolist() == orders[0][2], "the order must not depend on which samples a rank has"
    assert shuffle_histories(rows[np.array([2])], seed=2, epoch=0).columns["items"].tolist() != orders[0][2]


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(2, 40), st.integers(1, 39)).filter(lambda row: row[1] < row[0]), min_size=1, max_size=5),
    max_history=st.integers(2, 12),
    stride=st.integers(1, 12),
)
def test_cut_rows_have_every_target_once_with_the_history_that_fits(rows: list[tuple[int, int]], max_history: int, stride: int) -> None:
    stride = min(stride, max_history)
    lengths, first = (np.array(column) for column in zip(*rows, strict=True))
    starts = np.cumsum(lengths) - lengths
    whole = Sequences({"items": np.arange(lengths.sum())}, starts, lengths, {"sample_id": np.arange(len(rows)), "first_target": first})
    cut = cut_histories(whole, max_history, stride)

    def targets(of: Sequences) -> list[int]:
        spans = zip(of.starts.tolist(), of.lengths.tolist(), of.scalars["first_target"].tolist(), strict=True)
        return sorted(place for start, length, target in spans for place in range(start + target, start + length))

    assert targets(cut) == targets(whole)
    assert (cut.lengths <= max_history + 1).all()
    for row, (length, target) in enumerate(rows):
        own = cut.scalars["sample_id"] == row
        if length <= max_history + 1:
            assert (cut.lengths[own].tolist(), cut.scalars["first_target"][own].tolist()) == ([length], [target])
        else:  # each piece has the longest possible history
            stops = (cut.starts + cut.lengths)[own] - starts[row]
            assert cut.lengths[own].tolist() == np.minimum(max_history + 1, stops).tolist()
