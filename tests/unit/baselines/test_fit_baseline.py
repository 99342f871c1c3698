"""Every baseline finds planted structure, ignores held-out data, is deterministic, and scores every user."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest

from recsys.baselines import Baseline, fit_baseline
from recsys.baselines.content import ContentMatch
from recsys.config import Config, load_config
from recsys.config.evaluation import BaselineName
from recsys.data.items import ItemFeatures
from recsys.data.manifest import Dataset
from recsys.store import Storage
from tests.datasets import make_dataset

NAMES: tuple[BaselineName, ...] = get_args(BaselineName)
POPULAR: tuple[BaselineName, ...] = ("popularity", "recent_popularity")
PREDICTING: tuple[BaselineName, ...] = ("matrix_factorization", "factorization_machine")
CHOSEN: tuple[BaselineName, ...] = ("item_knn", "content_tfidf", "content_minilm", "hybrid")
"""They only have settings, which the validation targets choose; no seed changes them."""
CLICK_MODELS: tuple[BaselineName, ...] = ("din", "dcn")
"""They predict binary tasks and rank nothing."""


@dataclass(frozen=True)
class WithUsers(Dataset):
    """A dataset with a replaced table of users."""

    users: pa.Table

    def read_users(self, columns: list[str] | None = None) -> pa.Table:
        return self.users if columns is None else self.users.select(columns)


def with_users(dataset: Dataset, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Dataset:
    table = dataset.read_users()
    rows = [change(row) for row in table.to_pylist()]
    return WithUsers(dataset.storage, dataset.uri, dataset.manifest, pa.Table.from_pylist(rows, table.schema))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("store"))), num_users=300, num_items=60, max_history=20)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    values = {
        "model.width": 16,
        "data.max_history": 20,
        "model.text.mode": "off",
        "run.scratch": str(tmp_path_factory.mktemp("scratch")),
        "training.global_batch_size": 64,
        "training.micro_batch_size": 32,
        "evaluation.baseline_epochs": 25,
        "optimizer.learning_rate": 5e-3,
    }
    return load_config().with_values(values)


def fit(name: BaselineName, dataset: Dataset, config: Config) -> Baseline:
    return fit_baseline(name, dataset, ItemFeatures.read(dataset, Path(config.run.scratch)), config)


def ask(baseline: Baseline, dataset: Dataset) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Score the catalogue for each user, and every task for each user with the first ten items."""
    rows = dataset.read_users().to_pylist()
    histories = [np.array(row["items"][: row["num_train"]]) for row in rows]
    users = [row["user_index"] for row in rows]
    items = np.tile(np.arange(1, 11), len(users))
    tasks = baseline.score_tasks(np.repeat(users, 10).tolist(), items, [history for history in histories for _ in range(10)])
    return baseline.score_catalogue(histories, users) if baseline.ranks else np.zeros((len(users), 1)), tasks or {}


def mean_reciprocal_rank(baseline: Baseline, dataset: Dataset) -> float:
    scores, _ = ask(baseline, dataset)
    found = []
    for row, one in zip(dataset.read_users().to_pylist(), scores, strict=True):
        history, target = row["items"][: row["num_train"]], row["items"][-1]
        if target not in history:
            one[history] = -np.inf
            found.append(1 / (one >= one[target]).sum())
    return float(np.mean(found))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*POPULAR, *CLICK_MODELS)])
def test_a_baseline_that_knows_users_beats_popularity_where_users_differ(name: BaselineName, dataset: Dataset, config: Config) -> None:
    popular = mean_reciprocal_rank(fit("popularity", dataset, config), dataset)
    assert mean_reciprocal_rank(fit(name, dataset, config), dataset) > 1.4 * popular


@pytest.mark.parametrize("name", NAMES)
def test_what_is_held_out_for_the_test_changes_nothing(name: BaselineName, dataset: Dataset, config: Config) -> None:
    def change(row: dict[str, Any]) -> dict[str, Any]:
        begin = row["num_train"] + row["num_validation"]
        return row | {
            "items": [*row["items"][:begin], *(1 for _ in row["items"][begin:])],
            "values": [*row["values"][:begin], *(5.0 for _ in row["values"][begin:])],
            "events": [*row["events"][:begin], *(1 for _ in row["events"][begin:])],
            "timestamps": [*row["timestamps"][:begin], *(2_000_000_000 for _ in row["timestamps"][begin:])],
        }

    short = config.with_values({"evaluation.baseline_epochs": 2})
    scores, tasks = ask(fit(name, dataset, short), dataset)
    others, other_tasks = ask(fit(name, with_users(dataset, change), short), dataset)
    np.testing.assert_array_equal(scores, others)
    assert tasks.keys() == other_tasks.keys()
    for task, predicted in tasks.items():
        np.testing.assert_array_equal(predicted, other_tasks[task])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("matrix_factorization", *CHOSEN, *CLICK_MODELS)])
def test_validation_interactions_train_nothing(name: BaselineName, dataset: Dataset, config: Config) -> None:
    def change(row: dict[str, Any]) -> dict[str, Any]:
        begin = row["num_train"]
        return row | {"items": [*row["items"][:begin], *(1 for _ in row["items"][begin:])], "values": [1.0 for _ in row["values"]]}

    only_epoch = config.with_values({"evaluation.baseline_epochs": 1})  # fixes the number of epochs, so that there is nothing to choose
    scores, _ = ask(fit(name, dataset, only_epoch), dataset)
    others, _ = ask(fit(name, with_users(dataset, change), only_epoch), dataset)
    np.testing.assert_array_equal(scores, others)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_tells_the_outcome(name: BaselineName, dataset: Dataset, config: Config) -> None:
    short = config.with_values({"evaluation.baseline_epochs": 2})
    scores, tasks = ask(fit(name, dataset, short), dataset)
    again, tasks_again = ask(fit(name, dataset, short), dataset)
    np.testing.assert_array_equal(scores, again)
    for task, predicted in tasks.items():
        np.testing.assert_array_equal(predicted, tasks_again[task])
    if name not in (*POPULAR, *CHOSEN):
        other, other_tasks = ask(fit(name, dataset, short.with_values({"training.seed": 1})), dataset)
        is_same = np.array_equal(tasks["like"], other_tasks["like"]) if name in CLICK_MODELS else np.array_equal(scores, other)
        assert not is_same


@pytest.mark.parametrize("name", NAMES)
def test_unknown_users_and_empty_histories_get_an_answer(name: BaselineName, dataset: Dataset, config: Config) -> None:
    baseline = fit(name, dataset, config.with_values({"evaluation.baseline_epochs": 1}))
    nothing = np.zeros(0, np.int64)
    for histories in ([nothing, np.array([3, 8]), np.arange(1, 60)], [nothing, nothing, nothing]) if baseline.ranks else ():
        scores = baseline.score_catalogue(histories, [10_000, -7, 0])
        assert scores.shape == (3, dataset.manifest.num_items + 1)
        assert scores.dtype == np.float32
        assert np.isneginf(scores[:, 0]).all()
        assert np.isfinite(scores[:, 1:]).all()
    if baseline.ranks:
        np.testing.assert_array_equal(scores[0], scores[1])
    predicted = baseline.score_tasks([10_000, -7], np.array([1, 2]), [nothing, nothing])
    assert (predicted is not None) == (name in (*PREDICTING, *CLICK_MODELS))
    for answers in (predicted or {}).values():
        assert np.isfinite(answers).all()


@pytest.mark.parametrize("name", NAMES)
def test_interactions_may_have_no_values_and_users_no_attributes(name: BaselineName, dataset: Dataset, config: Config) -> None:
    bare = with_users(dataset, lambda row: row | {"values": [None] * len(row["items"]), "attributes": []})
    manifest = dataset.manifest.model_copy(update={"tasks": (), "has_time": False, "event_kinds": ("interaction",)})
    timeless = WithUsers(bare.storage, bare.uri, manifest, bare.read_users())
    baseline = fit(name, timeless, config.with_values({"evaluation.baseline_epochs": 1}))
    assert np.isfinite(ask(baseline, timeless)[0][:, 1:]).all()
    assert baseline.score_tasks([0], np.array([1]), [np.array([2])]) is None


def with_tastes(dataset: Dataset) -> Dataset:
    """Plant values: even users like genres with an even number, odd users the others; every third user rates higher."""

    def change(row: dict[str, Any]) -> dict[str, Any]:
        likes = np.array(row["items"]) % 5 % 2 == row["user_index"] % 2
        values = 3 + 1.2 * np.where(likes, 1, -1) + (0.5 if row["user_index"] % 3 == 0 else 0)
        return row | {"values": values.tolist(), "attributes": [("group", "even" if row["user_index"] % 2 == 0 else "odd")]}

    changed = with_users(dataset, change)
    values = np.concatenate([row["values"][: row["num_train"]] for row in changed.read_users().to_pylist()])
    moments = {"value_mean": float(values.mean()), "value_std": float(values.std())}
    return WithUsers(changed.storage, changed.uri, changed.manifest.model_copy(update=moments), changed.read_users())


@pytest.mark.parametrize("name", PREDICTING)
def test_values_and_likes_that_follow_taste_are_predicted(name: BaselineName, dataset: Dataset, config: Config) -> None:
    planted = with_tastes(dataset)
    predicted = fit(name, planted, config.with_values({"evaluation.baseline_epochs": 60}))
    rows = planted.read_users().to_pylist()
    users, items = [row["user_index"] for row in rows], np.array([row["items"][-1] for row in rows])
    truth = np.array([row["values"][-1] for row in rows])
    answers = predicted.score_tasks(users, items, [np.zeros(0, np.int64)] * len(users))
    assert answers is not None
    assert answers.keys() == {"purchase", "rating", "like"}
    assert np.sqrt(np.mean((answers["rating"] - truth) ** 2)) < 0.7 * truth.std()
    assert answers["rating"].min() >= np.float32(1.8) - 1e-4
    assert answers["rating"].max() <= np.float32(4.7) + 1e-4
    is_liked = truth >= 4.0
    assert answers["like"][is_liked].mean() > answers["like"][~is_liked].mean() + 0.3
    assert ((answers["like"] >= 0) & (answers["like"] <= 1)).all()


@pytest.mark.parametrize("name", CLICK_MODELS)
def test_likes_that_follow_taste_are_predicted(name: BaselineName, dataset: Dataset, config: Config) -> None:
    planted = with_tastes(dataset)
    predicted = fit(name, planted, config.with_values({"evaluation.baseline_epochs": 200}))
    rows = planted.read_users().to_pylist()
    users, items = [row["user_index"] for row in rows], np.array([row["items"][-1] for row in rows])
    answers = predicted.score_tasks(users, items, [np.array(row["items"][:-1]) for row in rows])
    assert answers is not None
    assert answers.keys() == {"purchase", "like"}
    is_liked = np.array([row["values"][-1] for row in rows]) >= 4.0
    assert answers["like"][is_liked].mean() > answers["like"][~is_liked].mean() + 0.3
    assert ((answers["like"] >= 0) & (answers["like"] <= 1)).all()


def test_a_factorization_machine_tells_a_new_item_by_its_categories_and_a_new_user_by_attributes(dataset: Dataset, config: Config) -> None:
    planted = with_tastes(dataset)

    def is_new(item: int) -> bool:
        return item % 10 in (3, 4)  # item 24, for example, has categories that even users like; item 13 those that odd users like

    def change(row: dict[str, Any]) -> dict[str, Any]:
        num = row["num_train"] if row["user_index"] < 250 else 0
        old = [place for place, item in enumerate(row["items"][:num]) if not is_new(item)]
        columns = {name: [row[name][place] for place in old] for name in ("items", "events", "timestamps", "values")}
        return row | columns | {"num_train": len(old), "num_validation": 0}

    fitted = fit("factorization_machine", with_users(planted, change), config.with_values({"evaluation.baseline_epochs": 60}))
    answers = fitted.score_tasks([260, 261, 260, 261], np.array([24, 24, 13, 13]), [np.zeros(0, np.int64)] * 4)
    assert answers is not None
    even_on_even, odd_on_even, even_on_odd, odd_on_odd = answers["rating"].tolist()
    assert even_on_even > odd_on_even + 0.5
    assert odd_on_odd > even_on_odd + 0.5


def test_recent_popularity_counts_what_is_taken_lately(dataset: Dataset, config: Config) -> None:
    def change(row: dict[str, Any]) -> dict[str, Any]:
        num = row["num_train"]
        return row | {"items": [1] * (num - 1) + [2] * (len(row["items"]) - num + 1)}

    planted = with_users(dataset, change)
    timeless = WithUsers(planted.storage, planted.uri, planted.manifest.model_copy(update={"has_time": False}), planted.read_users())
    (scores,) = fit("popularity", planted, config).score_catalogue([np.zeros(0, np.int64)], [0])
    assert scores[1] > scores[2] > scores[3]
    (scores,) = fit("recent_popularity", timeless, config).score_catalogue([np.zeros(0, np.int64)], [0])
    assert scores[2] == pytest.approx(300, abs=1)  # the last tenth of each user's interactions, here one
    times = np.concatenate([row["timestamps"][: row["num_train"]] for row in dataset.read_users().to_pylist()])
    latest = np.quantile(times, 0.9)
    expected = np.zeros(dataset.manifest.num_items + 1)
    for row in dataset.read_users().to_pylist():
        for item, time in zip(row["items"][: row["num_train"]], row["timestamps"], strict=False):
            expected[item] += time >= latest
    (scores,) = fit("recent_popularity", dataset, config).score_catalogue([np.zeros(0, np.int64)], [0])
    np.testing.assert_array_equal(np.floor(scores[1:]), expected[1:])


def test_content_matches_what_its_plain_formula_matches(dataset: Dataset, config: Config) -> None:
    catalogue = ItemFeatures.read(dataset, Path(config.run.scratch))
    baseline = fit("content_tfidf", dataset, config)
    assert isinstance(baseline, ContentMatch)
    history = np.array([3, 8, 21])
    vectors = baseline.vectors.toarray()
    weights = 0.5 ** (np.array([2, 1, 0]) / baseline.half_life)
    expected = vectors @ (weights @ vectors[history]) + baseline.popularity
    np.testing.assert_allclose(baseline.score([history], np.array([0]))[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors[1:], axis=1), 1, rtol=1e-5)
    assert len(catalogue.texts) == len(vectors)
