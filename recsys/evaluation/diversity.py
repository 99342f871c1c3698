"""Re-ranking for diversity as pure functions, content vectors for item similarity, and the curve of quality against diversity."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from recsys.arrays import Floats, Integers
from recsys.config.evaluation import EvaluationConfig
from recsys.data.items import ItemFeatures
from recsys.errors import UserError
from recsys.evaluation.metrics import coverage, intra_list_diversity, ranking_metrics
from recsys.evaluation.ranking import NUM_CANDIDATES, Ranked

OWN_SHARE = 0.1
"""Weight of the identity in the kernel of `dpp`. Without it, no list could be longer than the vectors or hold two equal items."""

Rerank = Callable[[Floats, Floats, float, int], Integers]


def content_vectors(catalogue: ItemFeatures) -> csr_array | None:
    """Return content vectors of items: of their categories, else their pretrained vectors, else the words of their texts.

    The model's own vectors are not used: the model would judge itself, and models could not be compared.

    Returns:
        (I + 1, C) rows of norm 1, or 0 for an item without content; None if the catalogue has no content.
    """
    if catalogue.categories.any():
        categories = catalogue.categories.numpy()
        rows, columns = np.nonzero(categories)
        entries = (np.ones(len(rows)), (rows, categories[rows, columns]))
        vectors = csr_array(entries, shape=(len(categories), catalogue.num_categories + 1))
    elif catalogue.vectors.any():
        vectors = csr_array(catalogue.vectors.numpy(), dtype=np.float64)
    elif catalogue.has_text.any():
        from sklearn.feature_extraction.text import HashingVectorizer

        vectors = HashingVectorizer(alternate_sign=False).transform(catalogue.texts)
    else:
        return None
    from sklearn.preprocessing import normalize

    return csr_array(normalize(vectors))


def mmr(relevance: Floats, similarity: Floats, weight: float, k: int) -> Integers:
    """Rank by maximal marginal relevance, which penalizes similarity to the closest item already taken (Carbonell, Goldstein 1998).

    Args:
        relevance: (B, N).
        similarity: (B, N, N).

    Returns:
        Candidates in the order they are taken (B, min(k, N)).
    """
    left = (1 - weight) * relevance
    nearest = np.full(relevance.shape, -np.inf)
    users, taken = np.arange(len(relevance)), []
    for step in range(min(k, relevance.shape[1])):
        gain = left - weight * nearest if step else left
        best = gain.argmax(1)
        taken.append(best)
        left[users, best] = -np.inf
        nearest = np.maximum(nearest, similarity[users, best])
    return np.stack(taken, axis=1)


def dpp(relevance: Floats, similarity: Floats, weight: float, k: int) -> Integers:
    """Rank by the greedy MAP of a determinantal point process: an item's gain is the increase of log det(S).

    S = (1 - OWN_SHARE) `similarity` + OWN_SHARE I. The Cholesky factor grows by a row each step, which costs O(N k) (Chen et al. 2018,
    algorithm 1). Arguments and result as in `mmr`.
    """
    num_users, num_candidates = relevance.shape
    k = min(k, num_candidates)
    left = (1 - weight) * relevance
    residual = np.ones((num_users, num_candidates))  # d^2; the diagonal of S is 1
    factor = np.zeros((k, num_users, num_candidates))  # c
    users, taken = np.arange(num_users), []
    for step in range(k):
        best = (left + weight * np.log(residual)).argmax(1)
        taken.append(best)
        left[users, best] = -np.inf
        done = factor[:step]
        row = (1 - OWN_SHARE) * similarity[users, best] - np.einsum("sb,sbn->bn", done[:, users, best], done)
        factor[step] = row / np.sqrt(residual[users, best])[:, None]
        residual = np.maximum(residual - factor[step] ** 2, OWN_SHARE)
    return np.stack(taken, axis=1)


METHODS: dict[str, Rerank] = {"mmr": mmr, "dpp": dpp}


def diversity_curve(ranked: Ranked, targets: Integers, vectors: csr_array | None, config: EvaluationConfig) -> list[dict[str, Any]]:
    """Re-rank each user's best NUM_CANDIDATES items with each weight, 0 first; return quality, diversity and coverage of the lists.

    Args:
        targets: (users, targets) in the order of `ranked.ranks`.

    Raises:
        UserError: the catalogue has no content to compare items by.
    """
    if vectors is None:
        raise UserError("evaluation.diversity: the catalogue has no categories, vectors or text to tell items apart by; leave it empty")
    cutoff = int(config.ranking_metric.partition("@")[2])
    weights = sorted({0.0, *config.diversity})
    size = config.batch_size
    top, scores = ranked.top[:, :NUM_CANDIDATES], ranked.top_scores[:, :NUM_CANDIDATES].astype(np.float64)
    parts = [
        diversified(top[begin : begin + size], scores[begin : begin + size], vectors, config.diversity_method, weights, cutoff)
        for begin in range(0, len(top), size)
    ]
    return [
        {
            "weight": weight,
            config.ranking_metric: float(ranking_metrics(_ranks_in(lists, targets), (cutoff,))[config.ranking_metric].mean()),
            f"intra_list_diversity@{cutoff}": float(intra_list_diversity(lists, vectors).mean()),
            f"coverage@{cutoff}": coverage(lists, vectors.shape[0] - 1),
        }
        for weight, lists in zip(weights, np.concatenate(parts, axis=1), strict=True)
    ]


def diversified(top: Integers, scores: Floats, vectors: csr_array, method: str, weights: Sequence[float], k: int) -> Integers:
    """Re-rank lists with each weight of diversity; 0 keeps their order.

    Args:
        top: (B, N) items from best to worst, padded with 0; N is at most NUM_CANDIDATES for lists that are to be the same everywhere.
        scores: (B, N).
        vectors: as `content_vectors` returns them.

    Returns:
        (weights, B, min(k, N)), padded with 0.
    """
    is_item = top > 0
    relevance = _relevance(scores, is_item)
    similarity = np.stack([(own @ own.T).toarray() for own in (vectors[items] for items in top)])
    chosen = np.stack([METHODS[method](relevance, similarity, weight, k) for weight in weights])
    lists: Integers = np.take_along_axis(top[None], chosen, axis=2)
    return np.where(np.arange(lists.shape[2]) < is_item.sum(1)[:, None], lists, 0)


def _relevance(scores: Floats, is_item: Any) -> Floats:
    """Scale each user's scores to 0 .. 1, so that a weight means the same for every user and model; -inf for padding."""
    low = np.where(is_item, scores, np.inf).min(axis=1, keepdims=True)
    high = np.where(is_item, scores, -np.inf).max(axis=1, keepdims=True)
    return np.where(is_item, (scores - low) / np.maximum(high - low, np.finfo(np.float64).tiny), -np.inf)


def _ranks_in(lists: Integers, targets: Integers) -> Integers:
    """Return the rank of each target in its user's list: k + 1 if it is not in the list, 0 if there is no target."""
    is_here = targets[:, :, None] == lists[:, None, :]  # (U, T, k)
    ranks: Integers = np.where(is_here.any(2), 1 + is_here.argmax(2), lists.shape[1] + 1)
    return np.where(targets > 0, ranks, 0)
