"""What re-ranking for diversity gains and costs; the ways to re-rank are in `reranking.py`."""

from typing import Any

import numpy as np
from scipy.sparse import csr_array

from recsys.config import EvaluationConfig
from recsys.errors import UserError
from recsys.evaluation.metrics import Integers, Values, coverage, intra_list_diversity, ranking_metrics
from recsys.evaluation.ranking import NUM_CANDIDATES, Ranked
from recsys.evaluation.reranking import METHODS


def diversity_curve(ranked: Ranked, targets: Integers, vectors: csr_array | None, config: EvaluationConfig) -> list[dict[str, Any]]:
    """Re-rank each user's best NUM_CANDIDATES items by every weight, 0 first; return what the lists are worth then.

    Args:
        targets: (users, targets) in the order of `ranked.ranks`.

    Raises:
        UserError: the catalogue says nothing that items could be alike in.
    """
    if vectors is None:
        raise UserError("evaluation.diversity: the catalogue has no categories, vectors or text to tell items apart by; leave it empty")
    cutoff = int(config.metric.partition("@")[2])
    curve = []
    for weight in sorted({0.0, *config.diversity}):
        lists = _rerank(ranked, vectors, config, weight, cutoff)
        curve.append(
            {
                "weight": weight,
                config.metric: float(ranking_metrics(_ranks_in(lists, targets), (cutoff,))[config.metric].mean()),
                f"intra_list_diversity@{cutoff}": float(intra_list_diversity(lists, vectors).mean()),
                f"coverage@{cutoff}": coverage(lists, vectors.shape[0] - 1),
            }
        )
    return curve


def _rerank(ranked: Ranked, vectors: csr_array, config: EvaluationConfig, weight: float, k: int) -> Integers:
    """Return the re-ranked lists (users, k), 0 where a user has fewer candidates."""
    lists = []
    for begin in range(0, len(ranked.top), config.batch_size):
        top = ranked.top[begin : begin + config.batch_size, :NUM_CANDIDATES]
        relevance = _relevance(ranked.top_scores[begin : begin + config.batch_size, :NUM_CANDIDATES].astype(np.float64), top > 0)
        rows = [vectors[items] for items in top]
        similarity = np.stack([(own @ own.T).toarray() for own in rows])
        chosen = METHODS[config.diversity_method](relevance, similarity, weight, k)
        is_left = np.arange(chosen.shape[1]) < (top > 0).sum(1)[:, None]
        lists.append(np.where(is_left, np.take_along_axis(top, chosen, axis=1), 0))
    return np.concatenate(lists)


def _relevance(scores: Values, is_item: Any) -> Values:
    """Scale each user's scores to 0 .. 1, so that a weight means the same for every user and model; -inf for padding."""
    low = np.where(is_item, scores, np.inf).min(axis=1, keepdims=True)
    high = np.where(is_item, scores, -np.inf).max(axis=1, keepdims=True)
    return np.where(is_item, (scores - low) / np.maximum(high - low, np.finfo(np.float64).tiny), -np.inf)


def _ranks_in(lists: Integers, targets: Integers) -> Integers:
    """Find the rank of each target in its user's list; one beyond the list where it is not in it, 0 where there is no target."""
    is_here = targets[:, :, None] == lists[:, None, :]  # (U, T, k)
    ranks: Integers = np.where(is_here.any(2), 1 + is_here.argmax(2), lists.shape[1] + 1)
    return np.where(targets > 0, ranks, 0)
