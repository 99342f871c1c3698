"""The reader: the plan's samples in the plan's order, from any position, for any number of ranks."""

import dataclasses

import numpy as np
import pytest
import torch

from recsys.config import Config, load_config
from recsys.data.draws import NegativeSampler
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.data.reader import Reader, Share
from recsys.errors import UserError
from recsys.store import Storage
from tests.datasets import make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("store"))), num_users=70)


def config(**values: object) -> Config:
    base = {"training.global_batch_size": 24, "training.micro_batch_size": 4, "training.num_workers": 1, "training.shuffle_row_groups": 2}
    return load_config().with_values({**base, **{key.replace("__", "."): value for key, value in values.items()}})


def read(dataset: Dataset, settings: Config, share: Share, first_step: int = 0) -> list[list[int]]:
    reader = Reader(dataset, ItemFeatures.read(dataset), settings, share)
    return [[sample for batch in batches for sample in batch.sample_ids.tolist() if sample >= 0] for batches in reader.steps(0, first_step)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_together_read_each_step_of_the_plan(dataset: Dataset, world_size: int) -> None:
    settings = config()
    plan = Reader(dataset, ItemFeatures.read(dataset), settings, Share(0, 1, 6)).plan(0)
    shares = [read(dataset, settings, Share(rank, world_size, 6 // world_size)) for rank in range(world_size)]
    for step in range(plan.num_steps):
        assert sorted(sample for share in shares for sample in share[step]) == sorted(plan.step_ids(step).tolist())


def test_every_store_gives_the_same(dataset: Dataset, any_storage: Storage) -> None:
    stored = make_dataset(any_storage, num_users=70)
    assert stored.manifest.fingerprint == dataset.manifest.fingerprint
    assert read(stored, config(), Share(0, 1, 6)) == read(dataset, config(), Share(0, 1, 6))


def test_reading_goes_on_from_any_step(dataset: Dataset) -> None:
    whole = read(dataset, config(), Share(0, 1, 6))
    assert read(dataset, config(), Share(0, 1, 6), first_step=2) == whole[2:]


def test_rows_are_those_that_the_ids_name(dataset: Dataset) -> None:
    settings = config()
    tables = [dataset.read_shard(shard, ["items", "first_target"]) for shard in dataset.manifest.train_shards]
    rows = [tuple(row.values()) for table in tables for row in table.to_pylist()]
    reader = Reader(dataset, ItemFeatures.read(dataset), settings, Share(0, 1, 6))
    for batches in reader.steps(0):
        for batch in batches:
            own = [rows[sample] for sample in batch.sample_ids.tolist() if sample >= 0]
            assert batch.items[batch.targets].tolist() == [item for items, first in own for item in items[first:]]
            history = batch.items[batch.histories.items]
            assert sorted(history[history != 0].tolist()) == sorted(item for items, _ in own for item in items[:-1])


def test_histories_are_shuffled_where_that_is_asked_alike_on_any_number_of_ranks(dataset: Dataset) -> None:
    def histories(settings: Config, epoch: int, num_ranks: int) -> dict[int, tuple[int, ...]]:
        found = {}
        for rank in range(num_ranks):
            reader = Reader(dataset, ItemFeatures.read(dataset), settings, Share(rank, num_ranks, 24 // num_ranks))
            for batch in (batch for batches in reader.steps(epoch) for batch in batches if len(batch.targets)):
                found[int(batch.sample_ids[0])] = tuple(batch.items[batch.targets].tolist())
        return found

    values: dict[str, object] = {"training__micro_batch_size": 1, "model__use_gaps": False}
    shuffled = config(**values, training__shuffle_histories=True)
    first, in_order = histories(shuffled, 0, 1), histories(config(**values), 0, 1)
    assert histories(shuffled, 0, 2) == first
    assert sum(first[sample] != in_order[sample] for sample in first) > len(first) / 2
    assert sum(first[sample] != targets for sample, targets in histories(shuffled, 1, 1).items()) > len(first) / 2


def test_an_error_of_the_reading_thread_reaches_the_training_thread(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> None:
    broken = make_dataset(Storage(str(tmp_path_factory.mktemp("store"))), num_users=70)
    broken.storage.delete(f"{broken.uri}/{broken.manifest.train_shards[1].path}")
    with pytest.raises(UserError, match=r"1\.parquet"):
        read(broken, config(), Share(0, 1, 6))


@pytest.mark.parametrize("id_dropout", [0.0, 0.3])
def test_uniform_negatives_are_of_the_items_that_training_saw_where_others_learn_from_text_alone(
    dataset: Dataset, id_dropout: float
) -> None:
    features = ItemFeatures.read(dataset)
    counts = torch.ones_like(features.train_count).index_fill(0, torch.tensor([0, 2, 5]), 0)
    settings = config(model__loss__kind="sampled", model__loss__num_negatives=20000, model__id_dropout=id_dropout)
    indices, log_q = NegativeSampler(dataclasses.replace(features, train_count=counts), settings).draw(epoch=1, step=3)
    expected = [item for item in range(1, len(counts)) if id_dropout == 0 or item not in (2, 5)]
    assert indices.unique().tolist() == expected
    torch.testing.assert_close(log_q, torch.full_like(log_q, 1 / len(expected)).log())


def test_negatives_are_the_same_on_every_rank_and_follow_popularity(dataset: Dataset) -> None:
    features = ItemFeatures.read(dataset)
    settings = config(model__loss__kind="sampled", model__loss__negatives="popularity", model__loss__num_negatives=20000)
    indices, log_q = NegativeSampler(features, settings).draw(epoch=1, step=3)
    again, _ = NegativeSampler(features, settings).draw(epoch=1, step=3)
    assert (indices == again).all()
    share = features.train_count.double() / features.train_count.sum()
    np.testing.assert_allclose(np.bincount(indices, minlength=len(share)) / 20000, share, atol=0.01)
    np.testing.assert_allclose(log_q.exp(), share[indices], rtol=1e-5)
