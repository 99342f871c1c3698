"""Lists that a blend of scores decides: against a plain formula, and the same offline and served."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.config import Config, load_config
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.evaluation.decisions.refusals import refuse_unknown_tasks
from recsys.evaluation.evaluator import RETRIEVAL_ALONE, evaluate
from recsys.evaluation.ranking import lists_by
from recsys.evaluation.users import read_evaluation_users
from recsys.exports.files import load_export, write_export
from recsys.exports.profiles import ArrowProfiles
from recsys.model.recommender import build_recommender
from recsys.model.text.catalogue_text import SINGLE_PROCESS
from recsys.objectives.next_item import NextItem
from recsys.predictor import Predictor, top_k
from recsys.store import Storage
from recsys.train.checkpoints.load_recommender import build_predictor
from serve.answers.answering import Answerer
from serve.api.protocol import ModelInfo, RecommendRequest
from tests.datasets import make_dataset

BLEND = {"retrieval": 0.5, "like": 2.0, "purchase*like": 3.0, "rating": -0.2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("store"))), num_users=80)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    values = {"data.max_history": 10, "model.width": 16, "model.text.mode": "off", "run.scratch": str(tmp_path_factory.mktemp("scratch"))}
    return load_config().with_values(values)


def predictor_of(config: Config, dataset: Dataset, **ranking: object) -> Predictor:
    given = config.with_values({f"ranking.{key}": value for key, value in ranking.items()})
    model = build_recommender(given, dataset, torch.device("cpu")).eval()
    for parameter in model.ranker.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return build_predictor(given, dataset, model)


def test_the_blend_is_the_plain_sum(config: Config, dataset: Dataset) -> None:
    predictor = predictor_of(config, dataset, num_candidates=12, blend=BLEND)
    users = read_evaluation_users(dataset, "test")
    histories, seen = [user.history for user in users], [user.seen for user in users]
    retrieval = predictor.score_catalogue(histories).numpy()
    for user, ranking in enumerate(predictor.recommend(histories, 12, seen)):
        best = top_k(retrieval[user], 12, seen[user]).items
        (scores,) = predictor.score([histories[user]], [best])
        logs = torch.log_softmax(torch.from_numpy(retrieval[user, 1:]), 0).numpy()[best - 1]
        expected = 0.5 * logs + 2.0 * scores["like"] + 3.0 * scores["purchase"] * scores["like"] - 0.2 * scores["rating"]
        order = np.argsort(-expected, kind="stable")
        np.testing.assert_allclose(ranking.scores, expected[order], rtol=1e-4, atol=1e-5)
        assert set(ranking.items.tolist()) == set(best.tolist())
        np.testing.assert_allclose(ranking.parts["like"], scores["like"][order], rtol=1e-4, atol=1e-5)


def test_candidates_come_first_and_the_rest_keeps_the_order_of_retrieval(config: Config, dataset: Dataset) -> None:
    predictor = predictor_of(config, dataset, num_candidates=5, blend=BLEND)
    users = read_evaluation_users(dataset, "test")
    retrieval = predictor.score_catalogue([user.history for user in users]).numpy()
    for user, row, plain in zip(users, lists_by(predictor)(users), retrieval, strict=True):
        whole, before = top_k(row, 40, user.seen).items, top_k(plain, 40, user.seen).items
        assert set(whole[:5].tolist()) == set(before[:5].tolist())
        assert whole[5:].tolist() == before[5:].tolist()
        for k in (3, 5, 20):
            (ranking,) = predictor.recommend([user.history], k, [user.seen])
            assert ranking.items.tolist() == whole[:k].tolist()
            assert (np.diff(ranking.scores) <= 0).all()


def test_evaluation_prints_retrieval_alone_beside_and_no_candidates_change_nothing(config: Config, dataset: Dataset) -> None:
    plain = evaluate(predictor_of(config, dataset), dataset, config.evaluation)
    blended = evaluate(predictor_of(config, dataset, num_candidates=20, blend=BLEND), dataset, config.evaluation)
    only = evaluate(predictor_of(config, dataset, num_candidates=20), dataset, config.evaluation)
    alone = blended["baselines"][RETRIEVAL_ALONE]
    assert RETRIEVAL_ALONE not in plain["baselines"]
    assert alone == only["baselines"][RETRIEVAL_ALONE] == {name: plain["metrics"][name] for name in alone}
    assert only["metrics"] == plain["metrics"]
    assert blended["metrics"]["ndcg@10"] != alone["ndcg@10"]
    assert 0 <= blended["metrics"]["like_share@10"] <= 1


def test_the_served_list_is_the_evaluated_one_with_its_scores(config: Config, dataset: Dataset, tmp_path: Path) -> None:
    predictor = predictor_of(config, dataset, num_candidates=15, blend=BLEND)
    profiles = ArrowProfiles.of_users(dataset.read_users())
    tasks = [task.name for task in dataset.manifest.tasks]
    kinds = list(dataset.manifest.event_kinds)
    info = ModelInfo(
        version="v",
        alias="a",
        dataset_fingerprint="f",
        num_items=40,
        tasks=tasks,
        event_kinds=kinds,
        takes_queries=False,
        metrics={},
        code_version=None,
    )
    answerer = Answerer(predictor, profiles, info)
    for index in range(20):
        history = profiles.find(f"user-{index}")
        assert history is not None
        (answer,) = answerer.recommend([RecommendRequest(user_id=f"user-{index}", limit=10, include=["scores"])])
        (ranking,) = predictor.recommend([history], 10, [np.unique(history.items)])
        items = json.loads(answer.body)["items"]
        assert [item["item_id"] for item in items] == [predictor.catalogue.item_ids[item] for item in ranking.items]
        np.testing.assert_allclose([item["score"] for item in items], ranking.scores, atol=1e-6)
        assert items[0]["scores"].keys() == {"retrieval", *tasks}


def test_a_version_with_a_blend_is_published_and_loaded(config: Config, dataset: Dataset, tmp_path: Path) -> None:
    given = config.with_values({"ranking.num_candidates": 15, "ranking.blend": BLEND})
    model = build_recommender(given, dataset, torch.device("cpu")).eval()
    predictor = build_predictor(given, dataset, model)
    write_export(predictor, model.state_dict(), dataset, tmp_path, num_golden=16)
    loaded = load_export(tmp_path).predictor
    history = read_evaluation_users(dataset, "test")[0].history
    (before,), (after,) = (each.recommend([history], 20, [history.items]) for each in (predictor, loaded))
    assert before.items.tolist() == after.items.tolist()
    np.testing.assert_allclose(before.scores, after.scores, atol=1e-6)


def test_unknown_scores_and_empty_blends_are_refused(config: Config, dataset: Dataset) -> None:
    predictor = predictor_of(config, dataset, num_candidates=5, blend={"retrieval": 1.0, "click": 1.0})
    user = read_evaluation_users(dataset, "test")[0]
    with pytest.raises(UserError, match=r"'click' is not a score of this model; its scores: retrieval, purchase, rating, like"):
        predictor.recommend([user.history], 5, [user.seen])
    with pytest.raises(UserError, match=r"ranking\.blend must have a weight other than 0"):
        load_config(None, ["ranking.blend={retrieval=0.0}"])


def test_a_task_that_needs_another_is_their_product(config: Config, dataset: Dataset) -> None:
    needing = config.with_values({"model.ranker.needs": {"like": "purchase"}})
    predictor, plain = predictor_of(needing, dataset), predictor_of(config, dataset)
    plain.ranker.load_state_dict(predictor.ranker.state_dict())
    history = read_evaluation_users(dataset, "test")[0].history
    items = np.arange(1, 41)
    (both,), (apart,) = (each.score([history], [items]) for each in (predictor, plain))
    np.testing.assert_allclose(both["purchase"], apart["purchase"], rtol=1e-6)
    np.testing.assert_allclose(both["like"], apart["like"] * apart["purchase"], rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranking.num_candidates": 5, "ranking.blend": {"click*like": 1.0}}, "ranking.blend: the dataset has no task 'click'"),
        ({"model.ranker.task_weights": {"click": 2.0}}, "model.ranker.task_weights: the dataset has no task 'click'"),
        ({"model.ranker.needs": {"like": "like"}}, "model.ranker.needs: like needs like"),
        ({"model.ranker.needs": {"like": "purchase", "purchase": "like"}}, "model.ranker.needs: like needs purchase needs like"),
        ({"model.ranker.needs": {"like": "rating"}}, "model.ranker.needs: like needs rating"),
    ],
)
def test_tasks_that_do_not_exist_are_refused_before_training(
    config: Config, dataset: Dataset, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.").replace("*", r"\*")):
        refuse_unknown_tasks(dataset, config.with_values(settings))


def test_single_tasks_have_weights_of_their_own(config: Config, dataset: Dataset) -> None:
    weighted = config.with_values({"model.ranker.task_weight": 0.5, "model.ranker.task_weights": {"like": 4.0}})
    objective = NextItem(weighted, dataset, torch.device("cpu"), SINGLE_PROCESS)
    assert objective.weights == {"retrieval": 1.0, "purchase": 0.5, "rating": 0.5, "like": 2.0}
