"""Queries: which words are kept, which samples get a query, and the layout of a batch with queries."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.config import load_config
from recsys.data.batch import PADDING_SAMPLE, Batch, Collator
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.reader import Reader, Share
from recsys.data.sequences import Sequences
from recsys.data.text.queries import (
    EVALUATION_VARIANT,
    MAX_WORDS,
    NO_HISTORY_RATE,
    NUM_VARIANTS,
    QueryDraws,
    QueryTexts,
    drop_words,
    read_queries,
)
from recsys.schema import TRAIN_SCHEMA
from recsys.store import Storage
from tests.datasets import make_dataset, wish

NOTHING = (torch.zeros(0, dtype=torch.long), torch.zeros(0))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("store"))), num_users=70)


def test_kept_words_are_the_texts_own_in_their_order() -> None:
    words = [f"w{number:02d}" for number in range(50)]
    counts = Counter()
    for item in range(400):
        kept = drop_words(" ".join(words), item, item % 3).split()
        assert 1 <= len(kept) <= MAX_WORDS
        assert kept == sorted(set(kept))
        assert kept[-1] <= "w31"
        counts[len(kept)] += 1
    assert set(counts) == set(range(1, MAX_WORDS + 1))


def test_a_query_has_a_word_wherever_the_text_has_and_never_two_of_one() -> None:
    assert {drop_words(" only\n", item, 0) for item in range(20)} == {"only"}
    assert {len(drop_words("two words", item, 0).split()) for item in range(50)} == {1, 2}
    assert drop_words("  ", 1, 0) == ""


def test_an_evaluation_asks_with_words_that_training_does_not_draw() -> None:
    text = " ".join(f"w{number}" for number in range(30))
    trained = {drop_words(text, item, variant) for item in range(50) for variant in range(NUM_VARIANTS)}
    asked = {drop_words(text, item, EVALUATION_VARIANT) for item in range(50)}
    assert not {query for query in trained & asked if len(query.split()) > 3}


def test_rows_are_variant_by_variant() -> None:
    texts = ["", "a b c d e", "f g h i j"]
    queries = QueryTexts(texts)
    assert len(queries) == len(list(queries)) == 3 * NUM_VARIANTS
    for variant in range(NUM_VARIANTS):
        assert queries[3 * variant : 3 * variant + 3] == [drop_words(text, item, variant) for item, text in enumerate(texts)]
    assert queries[0] == ""
    with pytest.raises(IndexError):
        queries[3 * NUM_VARIANTS]


def draws_of(dataset: Dataset, epoch: int, world_size: int, micro_batch_size: int, rate: float = 0.5) -> list[tuple[int, int, int]]:
    """Return (target item, row of its query, whether without history) for an epoch, from the batches of all ranks."""
    values = {"training.global_batch_size": 24, "training.micro_batch_size": micro_batch_size, "training.num_workers": world_size}
    config = load_config().with_values({**values, "model.query_rate": rate})
    catalogue, found = ItemFeatures.read(dataset), []
    for rank in range(world_size):
        reader = Reader(dataset, catalogue, config, Share(rank, world_size, config.training.accumulation_steps(world_size)))
        for batch in (batch for batches in reader.steps(epoch) for batch in batches):
            assert batch.query_texts is not None
            assert batch.histories.query_places is not None
            targets = batch.items[batch.targets[len(batch.targets) - len(batch.query_texts) :]]
            made = batch.query_texts < NUM_VARIANTS * (catalogue.num_items + 1)
            assert (batch.query_texts % (catalogue.num_items + 1))[made].tolist() == targets[torch.from_numpy(made)].tolist()
            typed = batch.query_texts[~made] - NUM_VARIANTS * (catalogue.num_items + 1)
            assert (catalogue.num_items - typed).tolist() == targets[torch.from_numpy(~made)].tolist()
            has_no_history = [int(place == _start(batch, int(place))) for place in batch.histories.query_places]
            found += list(zip(targets.tolist(), batch.query_texts.tolist(), has_no_history, strict=True))
    return sorted(found)


def _start(batch: Batch, place: int) -> int:
    """Return the position where the history of `place` begins."""
    begin = 0
    for number, length in batch.histories.groups:
        if place < begin + number * length:
            return begin + (place - begin) // length * length
        begin += number * length
    raise AssertionError(place)


@pytest.mark.parametrize("has_queries", [False, True])
def test_the_queries_of_an_epoch_are_the_same_on_any_number_of_ranks(tmp_path: Path, has_queries: bool) -> None:
    dataset = make_dataset(Storage(str(tmp_path)), num_users=70, has_queries=has_queries)
    expected = draws_of(dataset, 0, 1, 24)
    assert draws_of(dataset, 0, 2, 6) == draws_of(dataset, 0, 3, 4) == expected
    assert draws_of(dataset, 1, 1, 24) != expected


def test_as_many_samples_are_asked_as_the_rate_says() -> None:
    number = 20_000
    scalars = {"sample_id": np.arange(number), "first_target": np.ones(number, np.int64)}
    rows = Sequences({"items": np.array([3, 1], np.int32)}, np.zeros(number, np.int64), np.full(number, 2), scalars)
    has_text = torch.tensor([False, True, True, True])
    asked = QueryDraws(0.3, 7, has_text)(rows, 2)
    assert len(asked.samples) / number == pytest.approx(0.3, abs=0.02)
    assert (asked.cut_lengths == 0).all()
    assert len(asked.cut_lengths) / len(asked.samples) == pytest.approx(NO_HISTORY_RATE, abs=0.02)
    assert np.bincount(asked.texts // 4) / len(asked.texts) == pytest.approx(np.full(NUM_VARIANTS, 1 / NUM_VARIANTS), abs=0.02)
    assert len(QueryDraws(1.0, 7, has_text)(rows, 2).samples) == number
    assert len(QueryDraws(1.0, 7, ~has_text)(rows, 2).samples) == 0


def rows_of(items: list[list[int]], first_targets: list[int], queries: list[list[int]] | None = None) -> Sequences:
    table = [
        {
            "user_index": row,
            "items": sequence,
            "events": [row % 2] * len(sequence),
            "timestamps": [10 * place for place in range(len(sequence))],
            "values": [float(item) for item in sequence],
            "queries": queries[row] if queries else [0] * len(sequence),
            "first_target": first,
        }
        for row, (sequence, first) in enumerate(zip(items, first_targets, strict=True))
    ]
    return Sequences.from_table(pa.Table.from_pylist(table, TRAIN_SCHEMA), sample_id=np.arange(len(items)))


@pytest.mark.parametrize("group_cost", [0, 1000])
def test_a_query_takes_the_place_after_its_history_and_adds_a_target(dataset: Dataset, group_cost: int) -> None:
    sequences = [[1, 2, 3], [4, 5], list(range(1, 12)), [6, 7, 8, 9]]  # the third has the maximum length
    rows = rows_of(sequences, [1, 1, 5, 3])
    has_text = torch.ones(41, dtype=torch.bool)
    plain = Collator(dataset.manifest, True, group_cost)(rows, *NOTHING)
    draws = QueryDraws(0.9999, 1, has_text)  # gives a query to all four samples, one of them without history
    asked = draws(rows, 3)
    batch = Collator(dataset.manifest, True, group_cost, queries=draws)(rows, *NOTHING, 3)
    num_plain = len(plain.targets)
    assert (len(asked.samples), asked.cut_lengths.tolist()) == (4, [0])
    assert len(batch.targets) == num_plain + 4
    assert batch.valid_counts()[0] == num_plain + 4
    for name in ("targets", "labels", "label_mask"):
        assert torch.equal(getattr(batch, name)[:num_plain], getattr(plain, name)), name
    assert torch.equal(batch.histories.items[batch.target_places[:num_plain]], plain.histories.items[plain.target_places])
    assert torch.equal(batch.target_places[num_plain:], batch.histories.query_places)
    assert (batch.histories.items[batch.histories.query_places] == 0).all()
    assert (batch.histories.events[batch.histories.query_places] == 0).all()
    assert batch.histories.values[batch.histories.query_places].isnan().all()
    for number, (sample, place) in enumerate(zip(asked.samples.tolist(), batch.histories.query_places.tolist(), strict=True)):
        sequence = sequences[sample] if number < 3 else sequences[sample][-1:]
        begin = place - (len(sequence) - 1)
        assert begin == _start(batch, place)
        assert batch.histories.items[begin:place].tolist() == sequence[:-1]
        assert batch.histories.times[place] == (10 * (len(sequence) - 2) if len(sequence) > 1 else 0)
        assert batch.targets[num_plain + number] == sequences[sample][-1]
        last = np.cumsum([len(row) - first for row, first in zip(sequences, [1, 1, 5, 3], strict=True)])[sample] - 1
        assert torch.equal(batch.labels[num_plain + number], plain.labels[last])
        assert torch.equal(batch.label_mask[num_plain + number], plain.label_mask[last])


def test_what_was_typed_is_asked_where_it_was_typed() -> None:
    """Row 0 has queries at two of three targets, row 1 none, row 2 one at a non-target, row 3 one at the last target."""
    number = 6000
    queries = np.array([9, 5, 0, 7] + [0] * 4 + [0, 8, 0, 0] + [0, 0, 0, 6], np.int32)
    starts, first = np.resize(np.arange(4) * 4, number), np.resize([1, 1, 2, 1], number).astype(np.int32)
    flat = {"items": np.arange(1, 17, dtype=np.int32), "queries": queries}
    rows = Sequences(flat, starts, np.full(number, 4), {"sample_id": np.arange(number), "first_target": first})
    has_text = torch.arange(17) > 0
    asked = QueryDraws(0.5, 3, has_text)(rows, 1)
    kinds, typed = asked.samples % 4, asked.texts - NUM_VARIANTS * 17 + 1
    assert len(asked.samples) / number == pytest.approx(0.5, abs=0.03)
    assert set(zip(asked.targets[kinds == 0].tolist(), typed[kinds == 0].tolist(), strict=True)) == {(1, 5), (3, 7)}
    assert (asked.targets[kinds == 0] == 1).mean() == pytest.approx(0.5, abs=0.06)
    assert set(zip(asked.targets[kinds == 3].tolist(), typed[kinds == 3].tolist(), strict=True)) == {(3, 6)}
    for kind, last in ((1, 8), (2, 12)):
        assert (asked.targets[kinds == kind] == 3).all()
        assert set((asked.texts[kinds == kind] % 17).tolist()) == {last}
        assert (asked.texts[kinds == kind] < NUM_VARIANTS * 17).all()
    own, targets = asked.samples[asked.num_whole :], asked.targets[asked.num_whole :]
    assert set(asked.cut_lengths[targets < 3].tolist()) == {0, 1}
    assert (asked.cut_lengths[targets == 3] == 0).all()
    assert (asked.cut_lengths == 0).mean() < 0.5 < (own % 4 == 0).mean()
    without_text = QueryDraws(0.5, 3, ~has_text)(rows, 1)
    assert set((without_text.samples % 4).tolist()) == {0, 3}


def test_a_typed_query_follows_the_history_before_its_target(dataset: Dataset) -> None:
    rows = rows_of([[1, 2, 3, 4], [5, 6, 7]], [1, 1], [[0, 0, 3, 0], [0, 0, 2]])
    draws = QueryDraws(1.0, 5, torch.arange(41) > 0)
    asked = draws(rows, 0)
    assert (asked.samples.tolist(), asked.targets.tolist(), asked.cut_lengths.tolist()) == ([1, 0], [2, 2], [2])
    batch = Collator(dataset.manifest, True, queries=draws)(rows, *NOTHING)
    places = batch.histories.query_places
    assert places is not None
    assert [batch.histories.items[place - 2 : place].tolist() for place in places.tolist()] == [[5, 6], [1, 2]]
    assert batch.histories.times[places].tolist() == [10, 10]
    assert batch.targets[-2:].tolist() == [7, 3]
    assert batch.labels[-2:].tolist() == batch.labels[[4, 1]].tolist()


def test_in_a_shuffled_history_a_query_stays_with_its_target(tmp_path: Path) -> None:
    dataset = make_dataset(Storage(str(tmp_path)), num_users=40, has_queries=True)
    values = {"training.global_batch_size": 40, "training.micro_batch_size": 40, "training.num_workers": 1}
    config = load_config().with_values({**values, "training.shuffle_histories": True, "model.use_gaps": False, "model.query_rate": 0.9})
    catalogue = ItemFeatures.read(dataset)
    (batch,) = next(iter(Reader(dataset, catalogue, config, Share(0, 1, 1)).steps(0)))
    assert batch.query_texts is not None
    typed = batch.query_texts - NUM_VARIANTS * (catalogue.num_items + 1)
    targets = batch.items[batch.targets[-len(typed) :]].numpy()
    assert (typed >= 0).sum() > 20
    assert (catalogue.num_items - typed)[typed >= 0].tolist() == targets[typed >= 0].tolist()


def test_typed_queries_are_rows_behind_those_made_of_texts(tmp_path: Path) -> None:
    dataset = make_dataset(Storage(str(tmp_path)), num_items=20, has_queries=True)
    typed = read_queries(dataset, tmp_path / "scratch")
    assert list(typed) == [wish(item) for item in range(20, 0, -1)]
    texts = QueryTexts(["", "a b", "c"], typed)
    assert len(texts) == 3 * NUM_VARIANTS + 20
    assert texts[3 * NUM_VARIANTS - 1 : 3 * NUM_VARIANTS + 2] == ["c", wish(20), wish(19)]
    assert texts[-1] == wish(1)
    with pytest.raises(IndexError):
        texts[3 * NUM_VARIANTS + 20]


def test_a_rank_without_samples_has_no_query(dataset: Dataset) -> None:
    nobody = PADDING_SAMPLE[:0]
    batch = Collator(dataset.manifest, True, queries=QueryDraws(1.0, 0, torch.arange(41) > 0))(nobody, *NOTHING)
    assert batch.query_texts is not None
    assert len(batch.query_texts) == len(batch.targets) == 0


def test_without_queries_a_batch_knows_nothing_of_them(dataset: Dataset, tmp_path: Path) -> None:
    batch = Collator(dataset.manifest, True)(rows_of([[1, 2, 3]], [1]), *NOTHING)
    assert batch.query_texts is None
    assert batch.histories.query_places is None
    off = load_config(None, ["model.query_rate=0.5", "model.text.mode=off"])
    assert next(iter(Reader(dataset, ItemFeatures.read(dataset), off, Share(0, 1, 2)).steps(0)))[0].query_texts is None
