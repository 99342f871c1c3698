"""The metrics of tasks, as pure functions of labels and predictions; those of rankings are in `metrics.py`."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.metrics import log_loss, roc_auc_score

NUM_BINS = 15

Values = NDArray[np.float64]


def task_metrics(kind: str, labels: Values, predictions: Values, owners: NDArray[np.int64]) -> dict[str, float]:
    """Compute what a task is judged by; AUC and UAUC are left out where no two labels can be compared.

    rmse of a regression; logloss, auc, uauc and ece of probabilities.

    Args:
        owners: (N,) the user of each label.
    """
    if kind == "regression":
        return {"rmse": float(np.sqrt(np.mean((labels - predictions) ** 2)))}
    metrics = {
        "logloss": float(log_loss(labels, predictions, labels=[0, 1])),
        "ece": calibration_error(labels, predictions),
    }
    if len(np.unique(labels)) == 2:
        metrics["auc"] = float(roc_auc_score(labels, predictions))
    per_user = user_auc(labels, predictions, owners)
    return metrics | ({"uauc": float(per_user.mean())} if len(per_user) else {})


def calibration_error(labels: Values, predictions: Values) -> float:
    """Compute the expected calibration error over 15 bins of equal width (Naeini et al. 2015).

    The sum over bins of their share of the predictions x |mean label - mean prediction|.
    """
    bins = np.minimum((predictions * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    return float(np.abs(np.bincount(bins, labels - predictions, NUM_BINS)).sum() / len(labels))


def user_auc(labels: Values, predictions: Values, owners: NDArray[np.int64]) -> Values:
    """Compute the AUC of each user who has labels of both classes; their plain mean, each user counting the same, is the UAUC.

    The share of (positive, negative) pairs that are in the right order, ties half (Mann and Whitney 1947).
    """
    order = np.argsort(owners, kind="stable")
    bounds = np.flatnonzero(np.diff(owners[order])) + 1
    found = []
    for own in np.split(order, bounds):
        is_positive = labels[own] > 0
        num_positive = int(is_positive.sum())
        num_pairs = num_positive * (len(own) - num_positive)
        if num_pairs:
            rank_sum = rankdata(predictions[own])[is_positive].sum()
            found.append((rank_sum - num_positive * (num_positive + 1) / 2) / num_pairs)
    return np.array(found)
