"""The predictor: ranking with ties, exclusions, export and reload, golden scores."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.config import load_config
from recsys.data.manifest import Dataset
from recsys.data.sequences import Sequences
from recsys.errors import UserError
from recsys.exports.files import load_export, write_export
from recsys.model.recommender import Recommender, build_recommender
from recsys.predictor import Predictor, top_k
from recsys.store import Storage
from recsys.train.checkpoints.load_recommender import build_predictor
from tests.datasets import make_dataset
from tests.exports import users_of


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(Storage(str(tmp_path_factory.mktemp("store"))))


@pytest.fixture(scope="module")
def recommender(dataset: Dataset) -> Recommender:
    config = load_config(None, ["model.width=16", "data.max_history=10", "model.text.mode=off"])
    return build_recommender(config, dataset, torch.device("cpu")).eval()


@pytest.fixture(scope="module")
def predictor(dataset: Dataset, recommender: Recommender) -> Predictor:
    config = load_config(None, ["model.width=16", "data.max_history=10", "model.text.mode=off"])
    return build_predictor(config, dataset, recommender)


@pytest.fixture
def exported(predictor: Predictor, recommender: Recommender, dataset: Dataset, tmp_path: Path) -> Path:
    write_export(predictor, recommender.state_dict(), dataset, tmp_path, num_golden=8)
    return tmp_path


@pytest.mark.parametrize(
    ("scores", "k", "exclude", "expected"),
    [
        ([3, 1, 2], 2, [], [1, 3]),
        ([3, 1, 2], 2, [1], [3, 2]),
        ([1, 1, 1, 1], 2, [], [1, 2]),
        ([1, 2, 1, 1], 3, [3], [2, 1, 4]),
        ([1, 2], 9, [], [2, 1]),
        ([1, 2], 3, [1, 2], []),
    ],
)
def test_top_k(scores: list[float], k: int, exclude: list[int], expected: list[int]) -> None:
    ranking = top_k(np.array([-np.inf, *scores], np.float32), k, np.array(exclude, np.int64))
    assert ranking.items.tolist() == expected
    assert ranking.scores.tolist() == [scores[item - 1] for item in expected]


def test_an_answer_does_not_depend_on_who_else_is_asked_for(predictor: Predictor, dataset: Dataset) -> None:
    histories = list(users_of(dataset).values())
    together = predictor.score_catalogue(histories)
    for row, history in zip(together, histories, strict=True):
        torch.testing.assert_close(predictor.score_catalogue([history])[0], row, rtol=1e-5, atol=1e-6)


def test_only_the_recent_history_counts(predictor: Predictor) -> None:
    long = Sequences.of([1] * 5 + list(range(2, 12)), timestamps=list(range(15)))
    torch.testing.assert_close(predictor.encode([long]), predictor.encode([long.last(10)]))


def test_scores_of_candidates_are_those_of_the_catalogue(predictor: Predictor, dataset: Dataset) -> None:
    history = next(iter(users_of(dataset).values()))
    candidates = np.array([5, 1, 30])
    scores = predictor.score([history], [candidates])[0]
    assert set(scores) == {"retrieval", *(task.name for task in predictor.manifest.tasks)}
    np.testing.assert_allclose(scores["retrieval"], predictor.score_catalogue([history])[0].numpy()[candidates], rtol=1e-5, atol=1e-6)
    assert ((scores["like"] > 0) & (scores["like"] < 1)).all()


def test_an_export_answers_as_the_model_did(predictor: Predictor, dataset: Dataset, exported: Path) -> None:
    export = load_export(exported)
    loaded, users = export.predictor, users_of(dataset)
    histories = list(users.values())
    assert {user_id for user_id, _ in export.profiles.items()} == users.keys()
    torch.testing.assert_close(loaded.score_catalogue(histories), predictor.score_catalogue(histories), rtol=0, atol=0)
    candidates = [np.arange(1, 20)] * len(histories)
    for ours, theirs in zip(loaded.score(histories, candidates), predictor.score(histories, candidates), strict=True):
        for name, values in ours.items():
            np.testing.assert_array_equal(values, theirs[name])


def test_an_export_that_scores_otherwise_than_published_is_refused(exported: Path) -> None:
    golden = json.loads((exported / "golden.json").read_text())
    golden[0]["scores"][0] += 0.5
    (exported / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(UserError, match="different scores"):
        load_export(exported)


def test_popularity_is_the_number_of_training_interactions(predictor: Predictor) -> None:
    ranking = predictor.popular(3, np.zeros(0, np.int64))
    counts = predictor.catalogue.train_count
    assert ranking.scores.tolist() == counts.sort(descending=True).values[:3].tolist()
