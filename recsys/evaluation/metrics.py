"""The metrics, as pure functions of ranks and predictions; what is ranked against what is decided in `evaluator.py`."""

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score

Ranks = NDArray[np.int64]
Values = NDArray[np.float64]


def ranking_metrics(ranks: Ranks, cutoffs: tuple[int, ...]) -> dict[str, Values]:
    """Compute each metric per user.

    With R the user's targets, r their ranks from 1 over all unseen items:
    hr@k = 1 if any r <= k; recall@k = |{r <= k}| / |R|; mrr@k = 1 / min r, 0 where min r > k;
    ndcg@k = sum over r <= k of 1 / log2(1 + r), divided by the same sum for ranks 1 .. min(k, |R|).

    Args:
        ranks: (users, most targets of one user), 0 where a user has fewer.

    Returns:
        Name -> (users,).
    """
    is_target = ranks > 0
    num_targets = is_target.sum(1)
    best = np.where(is_target, ranks, np.iinfo(np.int64).max).min(1)
    gains = np.where(is_target, 1.0 / np.log2(1.0 + np.maximum(ranks, 1)), 0.0)
    metrics: dict[str, Values] = {}
    for k in cutoffs:
        is_hit = is_target & (ranks <= k)
        ideal: Values = np.cumsum(1.0 / np.log2(np.arange(2, k + 2)))[np.minimum(num_targets, k) - 1]
        metrics[f"hr@{k}"] = np.asarray(is_hit.any(1), np.float64)
        metrics[f"ndcg@{k}"] = (gains * is_hit).sum(axis=1) / ideal
        metrics[f"mrr@{k}"] = np.where(best <= k, np.reciprocal(best.astype(np.float64)), 0.0)
        metrics[f"recall@{k}"] = np.asarray(is_hit.sum(1) / num_targets)
    return metrics


def coverage(recommended: Ranks, num_items: int) -> float:
    """Share of the catalogue that is recommended to at least one user; 0 in `recommended` is padding."""
    return float(np.count_nonzero(np.unique(recommended)) / num_items)


def bootstrap_interval(values: Values, num_resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean over users (Efron 1979)."""
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(num_resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def task_metrics(kind: str, labels: Values, predictions: Values) -> dict[str, float]:
    """Compute AUC and log loss of a binary task, RMSE of a regression; AUC is left out where there is one class only."""
    if kind == "regression":
        return {"rmse": float(np.sqrt(np.mean((labels - predictions) ** 2)))}
    metrics = {"logloss": float(log_loss(labels, predictions, labels=[0, 1]))}
    if len(np.unique(labels)) == 2:
        metrics["auc"] = float(roc_auc_score(labels, predictions))
    return metrics
