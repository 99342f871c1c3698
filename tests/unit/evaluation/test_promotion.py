"""Which version is served: the decision as a pure function, and two versions on the users of one dataset."""

from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.config import Config, load_config
from recsys.config.evaluation import EvaluationConfig
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.evaluation.decisions.promotion import Change, Guest, Rule, compare_versions, decide
from recsys.evaluation.users import read_evaluation_users
from recsys.model.recommender import build_recommender
from recsys.predictor import Predictor
from recsys.store import Storage
from recsys.train.checkpoints.load_recommender import build_predictor
from tests.datasets import make_dataset

SMALL = {"data.max_history": 10, "model.width": 16, "model.text.mode": "off"}


@pytest.mark.parametrize(
    ("metric", "new", "old", "interval", "no_worse", "better"),
    [
        ("ndcg@10", 0.20, 0.10, (0.05, 0.15), True, True),
        ("ndcg@10", 0.10, 0.10, (0.00, 0.00), True, False),
        ("ndcg@10", 0.09, 0.10, (-0.02, 0.00), True, False),
        ("ndcg@10", 0.05, 0.10, (-0.08, -0.02), False, False),
        ("ndcg@10", float("nan"), 0.10, (float("nan"), float("nan")), False, False),
        ("rating.rmse", 0.9, 1.0, (-0.2, 0.0), True, True),
        ("rating.rmse", 1.05, 1.0, (-0.01, 0.1), True, False),
        ("rating.rmse", 1.2, 1.0, (0.1, 0.3), False, False),
        ("coverage@10", 0.5, 0.5, None, True, False),
        ("coverage@10", 0.4, 0.5, None, False, False),
        ("gini@10", 0.4, 0.5, None, True, True),
    ],
)
def test_the_decision(metric: str, new: float, old: float, interval: tuple[float, float] | None, no_worse: bool, better: bool) -> None:
    changes = {metric: Change(new, old, interval)}
    expected: dict[Rule, bool] = {"if_no_worse": no_worse, "if_better": better}
    for rule, is_chosen in expected.items():
        chosen, reason = decide(changes, metric, {}, rule)
        assert chosen is is_chosen
        assert metric in reason


def test_a_guard_keeps_a_better_version_out() -> None:
    changes = {"ndcg@10": Change(0.2, 0.1, (0.05, 0.15)), "click.auc": Change(0.69, 0.70, (-0.02, 0.0))}
    assert decide(changes, "ndcg@10", {"click.auc": -0.02}, "if_no_worse")[0]
    chosen, reason = decide(changes, "ndcg@10", {"click.auc": -0.002}, "if_no_worse")
    assert not chosen
    assert reason.startswith("breaks evaluation.guards: click.auc 0.6900 against 0.7000")


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return load_config().with_values({**SMALL, "run.scratch": str(tmp_path_factory.mktemp("scratch"))})


def predictor_of(config: Config, dataset: Dataset, seed: int = 0) -> Predictor:
    seeded = config.with_values({"training.seed": seed})
    return build_predictor(seeded, dataset, build_recommender(seeded, dataset, torch.device("cpu")).eval())


def test_the_same_model_is_no_worse_than_itself_by_any_metric(config: Config, storage: Storage, tmp_path: Path) -> None:
    dataset = make_dataset(storage, num_users=150)
    predictor, other = predictor_of(config, dataset), predictor_of(config, dataset, seed=1)
    for metric in ("ndcg@10", "coverage@10", "intra_list_diversity@5", "purchase.auc", "rating.rmse"):
        asked = EvaluationConfig(metric=metric, guards={"like.logloss": 0.0})
        same = compare_versions(predictor, predictor, dataset, asked, tmp_path)
        assert list(same) == [metric, "like.logloss"]
        assert all(change.difference == 0 and change.interval in (None, (0, 0)) for change in same.values())
        found = compare_versions(predictor, other, dataset, asked, tmp_path)[metric]
        back = compare_versions(other, predictor, dataset, asked, tmp_path)[metric]
        assert found.difference == -back.difference != 0
    with pytest.raises(UserError, match=r"'sale.auc' is not given by both versions"):
        compare_versions(predictor, other, dataset, EvaluationConfig(metric="sale.auc"), tmp_path)


def test_a_version_of_a_smaller_catalogue_answers_by_ids(config: Config, storage: Storage) -> None:
    small, large = make_dataset(storage, num_users=150, num_items=30), make_dataset(storage, num_users=150, num_items=40, seed=1)
    predictor = predictor_of(config, small)
    users = read_evaluation_users(large, "validation")
    guest = Guest.of(predictor, large, ["", *large.catalogue["item_id"].to_pylist()])
    scores = guest.score(users)
    assert scores.shape == (len(users), 41)
    known = [predictor.item_index.get(item_id, 0) for item_id in large.catalogue["item_id"].to_pylist()]
    assert known == [*range(1, 31), *[0] * 10]  # the first 30 items of both catalogues have the same ids
    assert np.isneginf(scores[:, 31:]).all()
    for user, row in zip(users, scores, strict=True):
        kept = np.flatnonzero(user.history.items <= 30)
        history = user.history
        if not len(kept):
            assert (row[1:31] == predictor.popularity.numpy()[1:]).all()
            continue
        alone = type(history).of(history.items[kept], history.events[kept], history.timestamps[kept], history.values[kept])
        np.testing.assert_allclose(row[1:31], predictor.score_catalogue([alone]).numpy()[0, 1:], atol=1e-5)
        assert guest.knows(user).tolist() == (user.targets.items <= 30).tolist()
