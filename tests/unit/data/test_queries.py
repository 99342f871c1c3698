"""Queries: which words are kept, which samples are asked, and how a batch with queries is laid out."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.config import load_config
from recsys.data.batch import Batch, Collator
from recsys.data.item_features import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.queries import ALONE_RATE, EVALUATION_VARIANT, MAX_WORDS, NUM_VARIANTS, QueryDraws, QueryTexts, drop_words
from recsys.data.reader import Reader, Share
from recsys.data.rows import Rows
from recsys.schema import TRAIN_SCHEMA
from recsys.storage import Storage
from tests.datasets import make_dataset

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
    """List (sample, row of its query, whether without history) of an epoch, by the batches of all ranks."""
    values = {"training.global_batch_size": 24, "training.micro_batch_size": micro_batch_size, "training.num_workers": world_size}
    config = load_config().with_values({**values, "model.query_rate": rate})
    catalogue, found = ItemFeatures.read(dataset), []
    for rank in range(world_size):
        reader = Reader(dataset, catalogue, config, Share(rank, world_size, config.training.accumulation_steps))
        for batch in (batch for batches in reader.steps(epoch) for batch in batches):
            assert batch.query_texts is not None
            assert batch.histories.query_places is not None
            targets = batch.items[batch.targets[len(batch.targets) - len(batch.query_texts) :]]
            assert (batch.query_texts % (catalogue.num_items + 1)).tolist() == targets.tolist()
            is_alone = [int(place == _start(batch, int(place))) for place in batch.histories.query_places]
            found += list(zip(targets.tolist(), batch.query_texts.tolist(), is_alone, strict=True))
    return sorted(found)


def _start(batch: Batch, place: int) -> int:
    """Find where the history of a place begins."""
    begin = 0
    for number, length in batch.histories.groups:
        if place < begin + number * length:
            return begin + (place - begin) // length * length
        begin += number * length
    raise AssertionError(place)


def test_the_queries_of_an_epoch_are_the_same_on_any_number_of_ranks(dataset: Dataset) -> None:
    expected = draws_of(dataset, 0, 1, 24)
    assert draws_of(dataset, 0, 2, 6) == draws_of(dataset, 0, 3, 4) == expected
    assert draws_of(dataset, 1, 1, 24) != expected


def test_as_many_samples_are_asked_as_the_rate_says() -> None:
    number = 20_000
    rows = Rows(
        np.arange(number), np.ones(number, np.int32), np.zeros(number, np.int64), np.full(number, 2), {"items": np.array([3, 1], np.int32)}
    )
    has_text = torch.tensor([False, True, True, True])
    asked = QueryDraws(0.3, 7, has_text)(rows, 2)
    assert len(asked.samples) / number == pytest.approx(0.3, abs=0.02)
    assert asked.num_alone / len(asked.samples) == pytest.approx(ALONE_RATE, abs=0.02)
    assert np.bincount(asked.texts // 4) / len(asked.texts) == pytest.approx(np.full(NUM_VARIANTS, 1 / NUM_VARIANTS), abs=0.02)
    assert len(QueryDraws(1.0, 7, has_text)(rows, 2).samples) == number
    assert len(QueryDraws(1.0, 7, ~has_text)(rows, 2).samples) == 0


def rows_of(items: list[list[int]], first_targets: list[int]) -> Rows:
    table = [
        {
            "user_index": row,
            "items": sequence,
            "events": [row % 2] * len(sequence),
            "timestamps": [10 * place for place in range(len(sequence))],
            "values": [float(item) for item in sequence],
            "first_target": first,
        }
        for row, (sequence, first) in enumerate(zip(items, first_targets, strict=True))
    ]
    return Rows.from_table(pa.Table.from_pylist(table, TRAIN_SCHEMA), np.arange(len(items)))


@pytest.mark.parametrize("group_cost", [0, 1000])
def test_a_query_takes_the_place_after_its_history_and_adds_a_target(dataset: Dataset, group_cost: int) -> None:
    sequences = [[1, 2, 3], [4, 5], list(range(1, 12)), [6, 7, 8, 9]]  # the third is as long as histories get
    rows = rows_of(sequences, [1, 1, 5, 3])
    has_text = torch.ones(41, dtype=torch.bool)
    plain = Collator(dataset.manifest, True, group_cost)(rows, *NOTHING)
    draws = QueryDraws(0.9999, 1, has_text)  # of these four, one is asked without its history
    asked = draws(rows, 3)
    batch = Collator(dataset.manifest, True, group_cost, queries=draws)(rows, *NOTHING, 3)
    num_plain = len(plain.targets)
    assert (len(asked.samples), asked.num_alone) == (4, 1)
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
        sequence = sequences[sample] if number < 4 - asked.num_alone else sequences[sample][-1:]
        begin = place - (len(sequence) - 1)
        assert begin == _start(batch, place)
        assert batch.histories.items[begin:place].tolist() == sequence[:-1]
        assert batch.histories.times[place] == (10 * (len(sequence) - 2) if len(sequence) > 1 else 0)
        assert batch.targets[num_plain + number] == sequences[sample][-1]
        last = np.cumsum([len(row) - first for row, first in zip(sequences, [1, 1, 5, 3], strict=True)])[sample] - 1
        assert torch.equal(batch.labels[num_plain + number], plain.labels[last])
        assert torch.equal(batch.label_mask[num_plain + number], plain.label_mask[last])


def test_a_rank_without_samples_has_no_query(dataset: Dataset) -> None:
    nobody = Rows.join([])
    batch = Collator(dataset.manifest, True, queries=QueryDraws(1.0, 0, torch.arange(41) > 0))(nobody, *NOTHING)
    assert batch.query_texts is not None
    assert len(batch.query_texts) == len(batch.targets) == 0


def test_without_queries_a_batch_knows_nothing_of_them(dataset: Dataset, tmp_path: Path) -> None:
    batch = Collator(dataset.manifest, True)(rows_of([[1, 2, 3]], [1]), *NOTHING)
    assert batch.query_texts is None
    assert batch.histories.query_places is None
    off = load_config(None, ["model.query_rate=0.5", "model.text.mode=off"])
    assert next(iter(Reader(dataset, ItemFeatures.read(dataset), off, Share(0, 1, 2)).steps(0)))[0].query_texts is None
