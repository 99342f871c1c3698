"""The diversity curve: quality of re-ranked lists, and the vectors that define item similarity."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from recsys.config.evaluation import EvaluationConfig
from recsys.data.items import ItemFeatures
from recsys.data.sequences import Sequences
from recsys.errors import UserError
from recsys.evaluation.diversity import content_vectors, diversity_curve
from recsys.evaluation.metrics import intra_list_diversity
from recsys.evaluation.ranking import rank_users
from recsys.evaluation.users import EvaluationUser, target_items
from recsys.store import Storage
from tests.datasets import make_dataset
from tests.users import evaluation_user

NUM_ITEMS = 60


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> ItemFeatures:
    return ItemFeatures.read(make_dataset(Storage(str(tmp_path_factory.mktemp("store"))), num_items=NUM_ITEMS))


@pytest.fixture(scope="module")
def users() -> list[EvaluationUser]:
    generator = np.random.default_rng(0)
    items = [generator.permutation(np.arange(1, NUM_ITEMS + 1)).tolist() for _ in range(40)]
    return [evaluation_user(number, Sequences.of(row[:4]), Sequences.of(row[4:6]), {}, 0) for number, row in enumerate(items)]


def score(batch: list[EvaluationUser]) -> np.ndarray:
    """Return random scores, with higher ones for targets."""
    scores = np.stack([np.random.default_rng(user.user_index).random(NUM_ITEMS + 1) for user in batch]).astype(np.float32)
    for row, user in zip(scores, batch, strict=True):
        row[user.targets.items] += 0.6
    return scores


@pytest.mark.parametrize("method", ["mmr", "dpp"])
def test_more_weight_gives_more_diverse_lists_and_costs_quality(catalogue: ItemFeatures, users: list[EvaluationUser], method: str) -> None:
    config = EvaluationConfig(diversity=(0.2, 0.6, 0.9), diversity_method=method, metric="ndcg@5", cutoffs=(5, 20), batch_size=16)
    ranked, vectors = rank_users(score, users, config), content_vectors(catalogue)
    curve = diversity_curve(ranked, target_items(users), vectors, config)
    assert [point["weight"] for point in curve] == [0, 0.2, 0.6, 0.9]
    diversities = [point["intra_list_diversity@5"] for point in curve]
    assert diversities == sorted(diversities)
    assert diversities[-1] > diversities[0] + 0.1
    assert curve[-1]["ndcg@5"] < curve[0]["ndcg@5"]
    # With weight 0 the lists are the model's own.
    assert curve[0]["ndcg@5"] == pytest.approx(plain_ndcg(ranked.top[:, :5], users))
    assert curve[0]["intra_list_diversity@5"] == pytest.approx(intra_list_diversity(ranked.top[:, :5], vectors).mean())


def plain_ndcg(lists: np.ndarray, users: list[EvaluationUser]) -> float:
    hits = np.array([np.isin(row, user.targets.items) for row, user in zip(lists, users, strict=True)])
    return float((hits / np.log2(np.arange(2, 7))).sum(1).mean() / (1 + 1 / np.log2(3)))


def test_users_with_fewer_items_than_the_list_is_long(catalogue: ItemFeatures) -> None:
    few = [evaluation_user(0, Sequences.of(range(4, NUM_ITEMS + 1)), Sequences.of([2]), {}, 0)]
    config = EvaluationConfig(diversity=(0.5,))
    curve = diversity_curve(rank_users(score, few, config), target_items(few), content_vectors(catalogue), config)
    assert [point["coverage@10"] for point in curve] == [3 / NUM_ITEMS] * 2


def test_items_are_described_by_categories_else_vectors_else_text(catalogue: ItemFeatures) -> None:
    def cosines(vectors: csr_array | None) -> np.ndarray:
        assert vectors is not None
        return (vectors @ vectors.T).toarray()

    by_category = cosines(content_vectors(catalogue))
    for first, second in ((1, 2), (1, 6), (6, 16), (11, 1)):
        own, other = (set(catalogue.categories[item].tolist()) - {0} for item in (first, second))
        expected = len(own & other) / np.sqrt(len(own) * len(other)) if own and other else 0
        assert by_category[first, second] == pytest.approx(expected)
    assert by_category[0, 0] == by_category[11, 11] == 0  # padding, and an item without categories
    given = torch.randn(NUM_ITEMS + 1, 3, generator=torch.manual_seed(0))
    plain = replace(catalogue, categories=torch.zeros_like(catalogue.categories), vectors=given)
    assert cosines(content_vectors(plain))[3, 5] == pytest.approx(torch.cosine_similarity(given[3], given[5], dim=0).item(), abs=1e-6)
    by_text = cosines(content_vectors(replace(plain, vectors=torch.zeros(NUM_ITEMS + 1, 0))))
    assert by_text[1, 1] == pytest.approx(1)
    assert by_text[2, 7] > by_text[2, 8] > 0  # same genre; different genres
    assert content_vectors(replace(plain, vectors=torch.zeros(NUM_ITEMS + 1, 0), has_text=torch.zeros_like(plain.has_text))) is None


def test_without_anything_to_tell_items_apart_by_there_is_no_curve(users: list[EvaluationUser]) -> None:
    ranked = rank_users(score, users, EvaluationConfig())
    with pytest.raises(UserError, match="no categories, vectors or text"):
        diversity_curve(ranked, target_items(users), None, EvaluationConfig())
