"""The whole evaluation of a model with random weights: its own results, baselines and comparisons, and refusals."""

import numpy as np
import pytest
import torch

from recsys.baselines import fit_baseline
from recsys.config import Config, load_config
from recsys.config.evaluation import EvaluationConfig
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.evaluation.evaluator import evaluate
from recsys.evaluation.slices import sentence
from recsys.evaluation.users import read_evaluation_users
from recsys.model.recommender import build_recommender
from recsys.predictor import Predictor, top_k
from recsys.report.evaluation import evaluation_page
from recsys.store import Storage
from recsys.train.checkpoints.load_recommender import build_predictor
from tests.datasets import make_dataset

SMALL = {"data.max_history": 10, "model.width": 16, "model.text.mode": "off"}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return load_config().with_values({**SMALL, "run.scratch": str(tmp_path_factory.mktemp("scratch"))})


@pytest.fixture(scope="module")
def dataset(storage: Storage) -> Dataset:
    return make_dataset(storage, num_users=200)


@pytest.fixture(scope="module")
def predictor(config: Config, dataset: Dataset) -> Predictor:
    return predictor_of(config, dataset, seed=0)


def predictor_of(config: Config, dataset: Dataset, seed: int) -> Predictor:
    seeded = config.with_values({"training.seed": seed})
    return build_predictor(seeded, dataset, build_recommender(seeded, dataset, torch.device("cpu")).eval())


def test_a_model_compared_with_itself_and_with_another(config: Config, dataset: Dataset, predictor: Predictor) -> None:
    asked = EvaluationConfig(compare="other", fairness_curve=("other",), checkpoint="own")
    same = evaluate(predictor, dataset, asked, lambda address: predictor)
    for name, found in same["compare"]["metrics"].items():
        assert (found["value"], found["difference"], found["interval_95"], found["p"]) == (same["metrics"][name], 0, (0, 0), 1), name
    assert [point["checkpoint"] for point in same["curve"]] == ["own", "other"]
    assert same["curve"][0]["gaps"] == same["curve"][1]["gaps"] == {"group": same["fairness"]["group"]["gap"]}
    other = predictor_of(config, dataset, seed=1)
    found = evaluate(predictor, dataset, asked, lambda address: other)
    alone = evaluate(other, dataset, EvaluationConfig())
    assert found["metrics"] == same["metrics"]
    assert found["compare"]["metrics"]["ndcg@10"]["other"] == alone["metrics"]["ndcg@10"]
    for name, in_slice in found["compare"]["slices"].items():
        expected = found["slices"][name]["ndcg@10"] - alone["slices"][name]["ndcg@10"]
        assert in_slice["ndcg@10"]["difference"] == pytest.approx(expected)
    difference = found["compare"]["metrics"]["ndcg@10"]["difference"]
    assert difference == pytest.approx(found["metrics"]["ndcg@10"] - alone["metrics"]["ndcg@10"])
    assert difference != 0
    assert f"of other: {difference:+.4f} [" in sentence(found["compare"], "ndcg@10")


def test_the_bound_of_a_point_is_that_of_its_training(config: Config, dataset: Dataset, predictor: Predictor) -> None:
    values = {"fairness.attribute": "group", "fairness.max_gap": 0.25, "fairness.dual_rate": 2.0}
    bound = predictor_of(config.with_values(values), dataset, seed=0)
    curve = evaluate(predictor, dataset, EvaluationConfig(fairness_curve=("bound",)), lambda address: bound)["curve"]
    assert [point["bound"] for point in curve] == [None, {"attribute": "group", "max_gap": 0.25, "dual_rate": 2.0}]


def test_a_checkpoint_of_another_dataset_is_no_peer(storage: Storage, config: Config, dataset: Dataset, predictor: Predictor) -> None:
    stranger = predictor_of(config, make_dataset(storage, seed=5), seed=0)
    for key, value in (("compare", "far"), ("fairness_curve", ("far",))):
        with pytest.raises(UserError, match=rf"evaluation\.{key} = far: was trained on another dataset"):
            evaluate(predictor, dataset, EvaluationConfig(**{key: value}), lambda address: stranger)


def test_popularity_stands_beside_and_its_lift_is_that_over_the_histories(dataset: Dataset, predictor: Predictor) -> None:
    found = evaluate(predictor, dataset, EvaluationConfig(baselines=(), split="test"))["baselines"]
    assert found.keys() == {"popularity"}
    counts = predictor.catalogue.train_count.numpy()[1:]
    percentiles = [((counts < count).sum() + (counts <= count).sum()) / (2 * len(counts)) for count in counts]
    lists, histories = [], []
    for row in dataset.read_users().to_pylist():
        history, target = row["items"][:-1], row["items"][-1]
        if target not in history:
            best = predictor.popular(5, exclude=np.array(history)).items
            lists.append(np.mean([percentiles[item - 1] for item in best]))
            histories.append(np.mean([percentiles[item - 1] for item in history]))
    assert found["popularity"]["popularity_percentile@5"] == pytest.approx(np.mean(lists))
    assert found["popularity"]["popularity_lift@5"] == pytest.approx(np.mean(lists) / np.mean(histories))


def test_a_task_whose_labels_are_all_alike_has_no_metrics_but_a_reason(storage: Storage, config: Config) -> None:
    import dataclasses

    import pyarrow as pa
    import pyarrow.parquet as pq

    dataset = make_dataset(storage, num_users=30, seed=7)
    users = dataset.read_users()
    kinds = pa.array([[0] * len(row) for row in users["events"].to_pylist()], pa.list_(pa.int8()))
    unrated = pa.array([[float("nan")] * len(row) for row in users["values"].to_pylist()], pa.list_(pa.float32()))
    for name, column in (("events", kinds), ("values", unrated)):
        users = users.set_column(users.column_names.index(name), name, column)
    pq.write_table(users, dataset.address(dataset.manifest.users_shards[0]))
    dataset = dataclasses.replace(dataset)
    found = evaluate(predictor_of(config, dataset, seed=0), dataset, EvaluationConfig())
    num_users = found["num_users"]
    assert found["absent_tasks"] == {
        "purchase": f"all {num_users} labels are 0",
        "rating": "no target has a label",
        "like": "no target has a label",
    }
    for metrics in (found["metrics"], *found["baselines"].values()):
        assert not any(name.startswith(("purchase.", "rating.", "like.")) for name in metrics)
    page = evaluation_page({**found, "checkpoint": "c", "metric": "ndcg@10"})
    assert f"purchase: no metrics, since all {num_users} labels are 0." in page


def test_baselines_are_judged_as_the_model_is(dataset: Dataset, predictor: Predictor) -> None:
    asked = EvaluationConfig(baselines=("item_knn", "matrix_factorization", "popularity"), baseline_epochs=1)
    found = evaluate(predictor, dataset, asked)
    assert list(found["baselines"]) == ["popularity", "item_knn", "matrix_factorization"]
    rankings = {name for name in found["metrics"] if "@" in name}
    tasks = found["metrics"].keys() - rankings
    assert rankings == found["baselines"]["popularity"].keys() == found["baselines"]["item_knn"].keys()
    assert {"rating.rmse", "like.auc"} <= found["baselines"]["matrix_factorization"].keys() - rankings <= tasks
    users = read_evaluation_users(dataset, "test")
    baseline = fit_baseline("item_knn", dataset, predictor.catalogue, predictor.config)
    hits = []
    for user in users:  # one user at a time
        scores = baseline.score_catalogue([user.history.items], [user.user_index])
        hits.append(user.targets.items[0] in top_k(scores[0], 10, user.history.items).items)
    assert found["baselines"]["item_knn"]["hr@10"] == pytest.approx(np.mean(hits))
    rated = fit_baseline("matrix_factorization", dataset, predictor.catalogue, predictor.config.model_copy(update={"evaluation": asked}))
    ratings = [rated.score_tasks([user.user_index], user.targets.items, [user.history.items])["rating"][0] for user in users]
    errors = np.array([user.targets.values[0] for user in users]) - np.array(ratings)
    assert found["baselines"]["matrix_factorization"]["rating.rmse"] == pytest.approx(np.sqrt(np.mean(errors**2)), rel=1e-5)
