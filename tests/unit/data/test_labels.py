"""Rates of positives, counted over the training targets, and the negatives that are left out, the same each time."""

import numpy as np
import pytest
import torch

from recsys.config.model import RankerConfig
from recsys.data.batch import Collator
from recsys.data.labels import training
from recsys.data.labels.training import count_labels, keep_negatives, negative_rates
from recsys.data.manifest import Dataset
from recsys.data.sequences import Sequences
from recsys.store import Storage
from tests.datasets import make_dataset

NO_NEGATIVES = torch.zeros(0, dtype=torch.long), torch.zeros(0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("store"))))


def plain_counts(dataset: Dataset) -> tuple[list[float], list[float]]:
    """Count purchases, standardized ratings (summed) and likes over the training targets, sample by sample."""
    positives, labels = np.zeros(3), np.zeros(3)
    for shard in dataset.manifest.train_shards:
        for row in dataset.read_shard(shard).to_pylist():
            targets = slice(row["first_target"], None)
            values = np.array(row["values"][targets])
            standardized = (values - dataset.manifest.value_mean) / dataset.manifest.value_std
            positives += [np.sum(np.array(row["events"][targets]) >= 1), standardized.sum(), (values >= 4).sum()]
            labels += len(values)
    return positives.tolist(), labels.tolist()


def test_labels_are_those_of_the_training_targets(dataset: Dataset) -> None:
    positives, labels = count_labels(dataset)
    expected = plain_counts(dataset)
    assert [task.name for task in dataset.manifest.tasks] == ["purchase", "rating", "like"]
    torch.testing.assert_close(positives, torch.tensor(expected[0], dtype=torch.float64), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(labels, torch.tensor(expected[1], dtype=torch.float64))


def test_a_large_dataset_is_sampled_evenly(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    read_group = training.RowGroupSource.read
    monkeypatch.setattr(training, "MAX_ROW_GROUPS", 3)
    monkeypatch.setattr(training.RowGroupSource, "read", lambda self, group: read.append(group) or read_group(self, group))
    count_labels(dataset)
    last = sum(len(shard.row_groups) for shard in dataset.manifest.train_shards) - 1
    assert read == [0, last // 2, last]


def test_rates_are_the_odds_or_what_leaves_so_many_negatives(dataset: Dataset) -> None:
    (purchases, _, likes), (labels, *_) = plain_counts(dataset)
    odds = [purchases / (labels - purchases), likes / (labels - likes)]
    assert negative_rates(dataset, RankerConfig()).tolist() == [1.0, 1.0, 1.0]
    weighed = negative_rates(dataset, RankerConfig(imbalance="weight")).tolist()
    assert weighed == pytest.approx([odds[0], 1.0, odds[1]])
    sampled = negative_rates(dataset, RankerConfig(imbalance="sample", negatives_per_positive=0.5)).tolist()
    assert sampled == pytest.approx([odds[0] / 2, 1.0, odds[1] / 2])
    assert negative_rates(dataset, RankerConfig(imbalance="sample", negatives_per_positive=100)).tolist() == [1.0, 1.0, 1.0]


def test_kept_negatives_are_a_share_and_depend_on_the_target_alone() -> None:
    labels = (torch.arange(20_000) % 10 == 0).float().unsqueeze(1).expand(-1, 2)
    samples, places = torch.arange(20_000) // 20, torch.arange(20_000) % 20
    rates = torch.tensor([0.2, 1.0])
    kept = keep_negatives(labels, samples, places, rates)
    is_negative = labels[:, 0] == 0
    assert bool(kept[~is_negative].all())
    assert bool(kept[:, 1].all())
    assert float(kept[is_negative, 0].mean()) == pytest.approx(0.2, abs=0.01)
    some = torch.randperm(20_000)[:500]
    torch.testing.assert_close(keep_negatives(labels[some], samples[some], places[some], rates), kept[some])
    other_seed = keep_negatives(labels, samples, places, torch.tensor([0.2, 0.2]))
    assert 0.02 < float((other_seed[is_negative, 0] * other_seed[is_negative, 1]).mean()) < 0.06


def test_a_batch_counts_the_kept_labels_alone(dataset: Dataset) -> None:
    rates = torch.tensor([1.0, 1.0, 0.4])
    table = dataset.read_shard(dataset.manifest.train_shards[0])
    rows = Sequences.from_table(table, sample_id=np.arange(table.num_rows))
    whole, kept = (Collator(dataset.manifest, True, negative_rates=rate)(rows, *NO_NEGATIVES) for rate in (None, rates))
    assert float(kept.labels[kept.label_mask[:, 2] == 0, 2].sum()) == 0
    assert 0.3 < float(kept.label_mask[whole.labels[:, 2] == 0, 2].mean()) < 0.5
    torch.testing.assert_close(kept.label_mask[:, :2], whole.label_mask[:, :2])
    counts = kept.valid_counts()
    assert counts[3] == kept.label_mask[:, 2].sum() < whole.valid_counts()[3]
    assert counts[0] == whole.valid_counts()[0]
    part = Collator(dataset.manifest, True, negative_rates=rates)(rows[3:4], *NO_NEGATIVES)
    begin = int(sum(rows.lengths[:3] - rows.scalars["first_target"][:3]))
    torch.testing.assert_close(part.label_mask, kept.label_mask[begin : begin + len(part.label_mask)])
