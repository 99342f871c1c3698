"""Choosing epochs and drawing negatives, without a baseline."""

import numpy as np
import pytest
import torch
from torch import nn

from recsys.baselines.baseline import ValidationRanking, fit, keep_best_epoch
from recsys.baselines.counting import Popularity
from recsys.baselines.training_data import TrainingData, UnseenItems
from recsys.data.items import ItemFeatures
from recsys.store import Storage
from tests.datasets import make_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    dataset = make_dataset(Storage(str(tmp_path_factory.mktemp("store"))))
    return TrainingData.read(dataset, ItemFeatures.read(dataset))


@pytest.mark.parametrize(("qualities", "best"), [([1.0, 3.0, 2.0], 2), ([0.0, 0.0, 0.0], 3), ([2.0, float("nan"), 1.0], 1)])
def test_the_best_epochs_weights_are_kept(qualities: list[float], best: int) -> None:
    module, answers = nn.Linear(1, 1), iter(qualities)

    def train(epoch: int) -> None:
        nn.init.constant_(module.weight, epoch + 1)

    keep_best_epoch(module, len(qualities), train, lambda: next(answers))
    assert module.weight.item() == best
    assert not module.training


def test_fit_finds_the_least_squares() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(5000, 3)
    module, truth = nn.Linear(3, 1), torch.tensor([0.5, -1.0, 2.0])
    fit(module, 5000, lambda samples: (module(inputs[samples]).squeeze(1) - inputs[samples] @ truth).square().mean(), lambda: 0.0, 60, 0.05)
    torch.testing.assert_close(module.weight[0], truth, atol=1e-2, rtol=0)


def test_training_data_is_each_users_first_interactions(data: TrainingData) -> None:
    for row in data.dataset.read_users().to_pylist():
        (items,), (held_out,) = (part[np.array([row["user_index"]])].split("items") for part in (data.train, data.validation))
        begin, end = row["num_train"], row["num_train"] + row["num_validation"]
        assert items.tolist() == row["items"][:begin]
        assert held_out.tolist() == row["items"][begin:end]
        assert set(data.matrix[[row["user_index"]]].indices.tolist()) == set(row["items"][:begin])
    assert data.item_counts.tolist() == data.catalogue.train_count.tolist()
    groups = {row["user_index"]: dict(row["attributes"])["group"] for row in data.dataset.read_users().to_pylist()}
    numbers = {group: {int(data.attributes[user, 0]) for user, own in groups.items() if own == group} for group in ("even", "odd")}
    assert numbers == {"even": {1}, "odd": {2}}


def test_drawn_items_are_ones_the_user_does_not_have(data: TrainingData) -> None:
    users = torch.from_numpy(data.train.owners).repeat(20)
    drawn = UnseenItems(data).draw(users).numpy()
    assert not data.matrix.toarray()[users.numpy(), drawn].any()
    trained = np.flatnonzero(data.item_counts)
    assert set(drawn.tolist()) == set(trained.tolist())


def test_validation_quality_is_the_mean_reciprocal_rank_with_ties_last(data: TrainingData) -> None:
    scores = np.random.default_rng(0).integers(0, 6, data.num_items + 1).astype(np.float32)
    expected = []
    for row in data.dataset.read_users().to_pylist():
        history, target = set(row["items"][: row["num_train"]]), row["items"][row["num_train"]]
        if target not in history:
            others = [item for item in range(1, data.num_items + 1) if item not in history]
            expected.append(1 / sum(scores[item] >= scores[target] for item in others))
    assert ValidationRanking(data)(Popularity(scores)) == pytest.approx(np.mean(expected))
