"""Items without any known attributes rank last wherever items are scored."""

from pathlib import Path

import numpy as np
import pytest
import torch

from recsys.config import load_config
from recsys.data.manifest import Dataset
from recsys.data.sequences import Sequences
from recsys.evaluation.ranking import rank_users, score_by
from recsys.exports.profiles import ArrowProfiles
from recsys.model.recommender import build_recommender
from recsys.model.retrieval import RetrievalScores
from recsys.predictor import Predictor
from recsys.store import Storage
from recsys.train.checkpoints.load_recommender import build_predictor
from serve.answers.answering import Answerer
from serve.api.protocol import ModelInfo, RecommendRequest, ScoreRequest
from tests.datasets import make_dataset
from tests.users import evaluation_user

COLD = (3, 17)
CPU = torch.device("cpu")


def test_known_items_score_by_the_product_and_unknown_ones_below_all() -> None:
    torch.manual_seed(0)
    items = torch.randn(30, 8)
    items[[0, 5, 9]] = 0.0
    users = torch.randn(6, 8) * 100
    users[-1] = -items.sum(0)
    scores = RetrievalScores(items)(users)
    known = [index for index in range(30) if index not in (5, 9)]
    torch.testing.assert_close(scores[:, known], users @ items[known].T)
    assert torch.isfinite(scores).all()
    assert (scores[:, [5, 9]] < scores[:, known].min(1, keepdim=True).values).all()
    torch.testing.assert_close(RetrievalScores(items)(users, torch.tensor([9, 2, 5])), scores[:, [9, 2, 5]])
    items[[5, 9]] = 1.0
    torch.testing.assert_close(RetrievalScores(items)(users), users @ items.T)


@pytest.fixture
def predictor(tmp_path: Path) -> Predictor:
    """Return a model with ids only, on a catalogue with two items that do not occur in training."""
    dataset = make_dataset(Storage(str(tmp_path / "store")))
    rows = dataset.catalogue_rows
    counts = rows["train_count"].to_numpy().copy()
    counts[[index - 1 for index in COLD]] = 0
    table = rows.set_column(rows.column_names.index("train_count"), "train_count", [counts])
    import pyarrow.parquet as pq

    pq.write_table(table.cast(rows.schema), dataset.address(dataset.manifest.catalogue_shards[0]))
    dataset = Dataset.open(dataset.storage, dataset.uri)
    settings = ["model.width=16", "model.text.mode=off", "model.use_features=false", f"run.scratch={tmp_path / 'scratch'}"]
    config = load_config(None, settings).with_values({"data.max_history": 10})
    recommender = build_recommender(config, dataset, CPU).eval()
    return build_predictor(config, dataset, recommender)


def test_evaluation_and_service_rank_them_last(predictor: Predictor) -> None:
    histories = [Sequences.of([1, 5, 9]), Sequences.of([2])]
    for ranking in predictor.recommend(histories, 40, [np.zeros(0, np.int64)] * 2):
        assert ranking.items[-2:].tolist() == list(COLD)
        assert len(ranking.items) == 40
    user = evaluation_user(0, histories[0], Sequences.of([COLD[0], 7]), {}, 0)
    ranked = rank_users(score_by(predictor), [user], load_config().evaluation)
    assert ranked.ranks[0, 0] == 40 - 3 - 1
    info = ModelInfo(
        version="v",
        alias="a",
        dataset_fingerprint="f",
        num_items=40,
        tasks=[],
        event_kinds=[],
        takes_queries=False,
        metrics={},
        code_version=None,
    )
    answerer = Answerer(predictor, ArrowProfiles([]), info)
    history = [{"item_id": "item-1"}]
    (answer,) = answerer.recommend([RecommendRequest.model_validate({"history": history, "k": 40, "exclude_seen": False})])
    assert answer.body.rindex(b'"item-17"') > answer.body.rindex(b'"item-3"') > answer.body.rindex(b'"item-40"')
    candidates = [f"item-{index}" for index in range(1, 41)]
    (scored,) = answerer.score([ScoreRequest.model_validate({"history": history, "candidates": candidates})])
    assert scored.status == 200
    whole = predictor.score_catalogue(histories)[0]
    chosen = np.array([3, 2, 17], np.int64)
    np.testing.assert_allclose(predictor.score(histories[:1], [chosen])[0]["retrieval"], whole[chosen].numpy(), rtol=1e-6)
