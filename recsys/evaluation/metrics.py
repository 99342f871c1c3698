"""Ranking metrics as pure functions of ranks and lists; task metrics are in `tasks.py`.

Shapes: U users, T maximum number of targets per user, I items, k list length.
"""

import numpy as np
from scipy.sparse import csr_array

from recsys.arrays import Floats, Integers
from recsys.schema import PADDING_ITEM


def ranking_metrics(ranks: Integers, cutoffs: tuple[int, ...]) -> dict[str, Floats]:
    """Compute each metric per user.

    With R the user's targets, r their ranks from 1 over all unseen items:
    hr@k = 1 if any r <= k; recall@k = |{r <= k}| / |R|; mrr@k = 1 / min r, 0 where min r > k;
    ndcg@k = sum over r <= k of 1 / log2(1 + r), divided by the same sum for ranks 1 .. min(k, |R|).

    Args:
        ranks: (U, T), 0 where a user has fewer.

    Returns:
        Name -> (U,).
    """
    is_target = ranks > 0
    num_targets = is_target.sum(1)
    best = np.where(is_target, ranks, np.iinfo(np.int64).max).min(1)
    gains = np.where(is_target, 1.0 / np.log2(1.0 + np.maximum(ranks, 1)), 0.0)
    metrics: dict[str, Floats] = {}
    for k in cutoffs:
        is_hit = is_target & (ranks <= k)
        metrics[f"hr@{k}"] = np.asarray(is_hit.any(1), np.float64)
        metrics[f"ndcg@{k}"] = (gains * is_hit).sum(axis=1) / _discounts(k)[np.minimum(num_targets, k) - 1]
        metrics[f"mrr@{k}"] = np.where(best <= k, np.reciprocal(best.astype(np.float64)), 0.0)
        metrics[f"recall@{k}"] = np.asarray(is_hit.sum(1) / num_targets)
    return metrics


def random_metrics(num_targets: Integers, num_candidates: Integers, cutoffs: tuple[int, ...]) -> dict[str, Floats]:
    """Compute the exact expectation of `ranking_metrics` for a random order of each user's candidates.

    With R targets among n candidates, the first r ranks hold none with probability prod over j < r of (n - R - j) / (n - j), and any one
    rank holds one with probability R / n.

    Args:
        num_targets: (U,) at least 1.
        num_candidates: (U,) at least `num_targets`.
    """
    places = np.arange(max(cutoffs))
    left = (num_candidates[:, None] - places).astype(np.float64)  # (U, k) candidates left at each rank
    none_so_far = np.cumprod(np.clip(left - num_targets[:, None], 0, None) / np.maximum(left, 1), axis=1)
    is_first = -np.diff(none_so_far, axis=1, prepend=1.0)  # this rank holds the first target
    share = num_targets / num_candidates
    metrics: dict[str, Floats] = {}
    for k in cutoffs:
        num_ranks = np.minimum(k, num_candidates)
        metrics[f"hr@{k}"] = np.asarray(1.0 - none_so_far[:, k - 1])
        metrics[f"ndcg@{k}"] = share * _discounts(k)[num_ranks - 1] / _discounts(k)[np.minimum(num_targets, k) - 1]
        metrics[f"mrr@{k}"] = (is_first[:, :k] / (places[:k] + 1)).sum(axis=1)
        metrics[f"recall@{k}"] = np.asarray(num_ranks / num_candidates)
    return metrics


def _discounts(k: int) -> Floats:
    """Return the sums of 1 / log2(1 + r) over the ranks 1 .. n, for n = 1 .. k."""
    return np.cumsum(1.0 / np.log2(np.arange(2, k + 2)))


def coverage(recommended: Integers, num_items: int) -> float:
    """Return the share of the catalogue that is recommended to at least one user; 0 in `recommended` is padding."""
    return float(np.count_nonzero(np.unique(recommended)) / num_items)


def gini(recommended: Integers, num_items: int) -> float:
    """Return the Gini coefficient of recommendations over the catalogue: 0 if all items are equally frequent, 1 - 1 / I if only one occurs.

    With counts x_1 <= .. <= x_I: sum over i of (2 i - I - 1) x_i, divided by I times their sum (Gini 1912).
    """
    counts = np.sort(np.bincount(recommended[recommended != PADDING_ITEM], minlength=num_items + 1)[1:])
    weights = 2 * np.arange(1, num_items + 1) - num_items - 1
    return float((weights * counts).sum() / (num_items * counts.sum()))


def information(train_count: Integers) -> Floats:
    """Return each item's self-information -log2((c + 1) / (sum of c + I)), c its training interactions (I + 1,).

    One is added to each count (Laplace), so that the novelty of a cold item is finite. The mean over a list is its novelty (Zhou et al.
    2010).
    """
    counts = train_count[1:]
    return np.concatenate([[0.0], -np.log2((counts + 1) / (counts.sum() + len(counts)))])


def popularity_percentiles(train_count: Integers) -> Floats:
    """Return the share of the catalogue with fewer training interactions than each item, plus half the share with as many (I + 1,)."""
    from scipy.stats import rankdata  # half a second, which a training worker need not spend

    return np.concatenate([[0.0], (rankdata(train_count[1:]) - 0.5) / (len(train_count) - 1)])


def list_mean(values: Floats, recommended: Integers) -> Floats:
    """Average values of items (I + 1,) over each user's list (U, k); an empty list gives 0."""
    is_item = recommended != PADDING_ITEM
    means: Floats = np.where(is_item, values[recommended], 0.0).sum(1) / np.maximum(is_item.sum(1), 1)
    return means


def intra_list_diversity(recommended: Integers, vectors: csr_array) -> Floats:
    """Return 1 - the mean cosine over all pairs of a user's list (U, k); a list of one item gives 0.

    The sum over ordered pairs of unit vectors v is |sum of v|^2 - sum of |v|^2.

    Args:
        vectors: (I + 1, C) rows of norm 1, or 0 for an item without content, which is similar to no other.
    """
    num_users, k = recommended.shape
    is_item = recommended != PADDING_ITEM
    entries = (is_item.ravel().astype(np.float64), recommended.ravel(), np.arange(num_users + 1) * k)
    members = csr_array(entries, shape=(num_users, vectors.shape[0]))
    totals = members @ vectors
    own = members @ np.asarray(vectors.multiply(vectors).sum(axis=1)).ravel()
    num_items = is_item.sum(1)
    pairs = np.maximum(num_items * (num_items - 1), 1)
    similarity = (np.asarray(totals.multiply(totals).sum(axis=1)).ravel() - own) / pairs
    return np.where(num_items > 1, 1.0 - similarity, 0.0)
