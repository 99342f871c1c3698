"""Re-ranking compared with plain greedy searches that follow the definition literally."""

import numpy as np
import pytest

from recsys.arrays import Floats
from recsys.evaluation.diversity import OWN_SHARE, dpp, mmr

NUM_USERS, NUM_CANDIDATES, WIDTH = 4, 9, 5


@pytest.fixture(scope="module")
def relevance() -> Floats:
    return np.random.default_rng(0).random((NUM_USERS, NUM_CANDIDATES))


@pytest.fixture(scope="module")
def similarity() -> Floats:
    vectors = np.random.default_rng(1).normal(size=(NUM_USERS, NUM_CANDIDATES, WIDTH))
    vectors[:, 3] = vectors[:, 2]  # two identical items
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    return vectors @ vectors.transpose(0, 2, 1)


def plain_mmr(relevance: Floats, similarity: Floats, weight: float, k: int) -> list[int]:
    taken: list[int] = []
    while len(taken) < k:
        left = [item for item in range(len(relevance)) if item not in taken]
        nearest = {item: max((similarity[item][other] for other in taken), default=0.0) for item in left}
        taken.append(max(left, key=lambda item: (1 - weight) * relevance[item] - weight * nearest[item]))
    return taken


def plain_dpp(relevance: Floats, similarity: Floats, weight: float, k: int) -> list[int]:
    kernel = (1 - OWN_SHARE) * similarity + OWN_SHARE * np.eye(len(similarity))

    def log_det(items: list[int]) -> float:
        return np.linalg.slogdet(kernel[np.ix_(items, items)])[1] if items else 0.0

    taken: list[int] = []
    while len(taken) < k:
        left = [item for item in range(len(relevance)) if item not in taken]
        gain = {item: log_det([*taken, item]) - log_det(taken) for item in left}
        taken.append(max(left, key=lambda item: (1 - weight) * relevance[item] + weight * gain[item]))
    return taken


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(("fast", "plain"), [(mmr, plain_mmr), (dpp, plain_dpp)])
def test_greedy_choice(relevance: Floats, similarity: Floats, weight: float, fast, plain) -> None:
    found = fast(relevance, similarity, weight, NUM_CANDIDATES)  # more candidates than dimensions
    for user in range(NUM_USERS):
        assert found[user].tolist() == plain(relevance[user], similarity[user], weight, NUM_CANDIDATES)


@pytest.mark.parametrize("rerank", [mmr, dpp])
def test_without_weight_the_order_is_that_of_relevance(relevance: Floats, similarity: Floats, rerank) -> None:
    assert rerank(relevance, similarity, 0.0, 5).tolist() == np.argsort(-relevance, axis=1)[:, :5].tolist()
    assert rerank(relevance, similarity, 0.0, 50).shape == (NUM_USERS, NUM_CANDIDATES)


@pytest.mark.parametrize("rerank", [mmr, dpp])
def test_what_is_no_candidate_comes_last(relevance: Floats, similarity: Floats, rerank) -> None:
    padded = np.concatenate([relevance, np.full((NUM_USERS, 2), -np.inf)], axis=1)
    wider = np.zeros((NUM_USERS, NUM_CANDIDATES + 2, NUM_CANDIDATES + 2))
    wider[:, :NUM_CANDIDATES, :NUM_CANDIDATES] = similarity
    expected = rerank(relevance, similarity, 0.5, NUM_CANDIDATES)
    assert rerank(padded, wider, 0.5, NUM_CANDIDATES).tolist() == expected.tolist()
