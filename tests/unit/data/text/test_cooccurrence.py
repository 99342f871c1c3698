"""Pairs of items that users took close together: compared with a plain count over whole sequences, in one block or many."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.text import cooccurrence
from recsys.data.text.cooccurrence import Cooccurrences, near_pairs
from recsys.errors import UserError
from recsys.store import Storage
from tests.datasets import make_dataset, windows_of


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(Storage(str(tmp_path / "store")), num_users=150, max_history=30)


def plain_pairs(sequence: list[int], window: int) -> Counter[tuple[int, int]]:
    return Counter(
        (sequence[before], sequence[after])
        for after in range(len(sequence))
        for before in range(max(0, after - window), after)
        if sequence[before] != sequence[after]
    )


def train_sequences(dataset: Dataset) -> list[list[int]]:
    return [user["items"][: user["num_train"]] for user in dataset.read_users().to_pylist()]


@pytest.mark.parametrize("stride", [2, 5])
@pytest.mark.parametrize("window", [1, 3, 30])
def test_windows_that_overlap_give_each_pair_once(stride: int, window: int) -> None:
    generator = np.random.default_rng(0)
    sequences = [generator.integers(1, 9, length).tolist() for length in (1, 2, 7, 23)]
    max_history = 30 if window == 30 else 5
    rows = [
        {"items": sequence[cut.start : cut.stop], "first_target": cut.first_target}
        for sequence in sequences
        for cut in windows_of(len(sequence), max_history, stride)
    ]
    table = pa.Table.from_pylist(rows, pa.schema([("items", pa.list_(pa.int32())), ("first_target", pa.int32())]))
    found = Counter(pair for part in near_pairs(table, window) for pair in zip(*(side.tolist() for side in part), strict=True))
    whole = sum((plain_pairs(sequence, window) for sequence in sequences), Counter())
    if window <= max_history + 1 - stride:
        assert found == whole
    else:
        assert not found - whole, "no pair may count more often than it is there; those across the cut of a window are lost"


@pytest.mark.parametrize(("block_pairs", "chunk_pairs"), [(1 << 24, 1 << 22), (100, 50)])
@pytest.mark.parametrize("most", [3, 32])
def test_the_most_frequent_partners_are_those_of_a_plain_count(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_pairs: int, chunk_pairs: int, most: int
) -> None:
    monkeypatch.setattr(cooccurrence, "_BLOCK_PAIRS", block_pairs)
    monkeypatch.setattr(cooccurrence, "_CHUNK_PAIRS", chunk_pairs)
    monkeypatch.setattr(cooccurrence, "MAX_COOCCURRENCES", most)
    expected: dict[int, Counter[int]] = {}
    for sequence in train_sequences(dataset):
        for (one, other), count in plain_pairs(sequence, 2).items():
            expected.setdefault(one, Counter())[other] += count
            expected.setdefault(other, Counter())[one] += count
    found = Cooccurrences.read(dataset, ItemFeatures.read(dataset), 2, tmp_path / "scratch")
    items, counts = found.of(np.arange(1, dataset.manifest.num_items + 1))
    for item in range(1, dataset.manifest.num_items + 1):
        best = sorted(expected.get(item, Counter()).items(), key=lambda pair: (-pair[1], pair[0]))[:most]
        own = [(int(partner), int(count)) for partner, count in zip(items[item - 1], counts[item - 1], strict=True) if partner]
        assert own == best


def test_an_item_without_text_is_nobodys_partner(dataset: Dataset, tmp_path: Path) -> None:
    catalogue = ItemFeatures.read(dataset)
    catalogue = replace(catalogue, has_text=catalogue.has_text.clone())
    catalogue.has_text[7] = False
    found = Cooccurrences.read(dataset, catalogue, 2, tmp_path / "scratch")
    assert found.items.size
    assert 7 not in found.items
    assert not found.of(np.array([7]))[0].any()


def test_where_there_are_no_pairs_the_error_says_what_would_work(dataset: Dataset, tmp_path: Path) -> None:
    catalogue = ItemFeatures.read(dataset)
    catalogue = replace(catalogue, has_text=catalogue.has_text.clone())
    catalogue.has_text[:] = False
    with pytest.raises(UserError, match=r"pretraining.objectives=\['masked'\] would work"):
        Cooccurrences.read(dataset, catalogue, 2, tmp_path / "scratch")
