"""The metrics of tasks, as pure functions of labels, predictions and how much each user counts; those of rankings are in `metrics.py`.

Shapes: N labels, U users.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

NUM_BINS = 15
_SMALLEST = np.finfo(np.float64).tiny

Values = NDArray[np.float64]
Integers = NDArray[np.int64]
Measure = Callable[[Values], float]
"""How often each user counts (U,) -> a metric; all ones give its value, counts of a resample what the resample gives."""


def task_measures(kind: str, labels: Values, predictions: Values, owners: Integers) -> dict[str, Measure]:
    """Tell what a task is judged by: rmse of a regression; logloss, ece, auc and uauc of probabilities.

    AUC and UAUC are left out where no two labels can be compared.

    Args:
        owners: (N,) the user of each label.
    """
    if kind == "regression":
        squares = (labels - predictions) ** 2
        return {"rmse": lambda counts: float(np.sqrt(np.average(squares, weights=counts[owners])))}
    likelihood = np.where(labels > 0, predictions, 1 - predictions)
    surprise = -np.log(np.maximum(likelihood, np.finfo(np.float32).eps))
    measures: dict[str, Measure] = {
        "logloss": lambda counts: float(np.average(surprise, weights=counts[owners])),
        "ece": lambda counts: calibration_error(labels, predictions, counts[owners]),
    }
    if len(np.unique(labels)) == 2:
        measures["auc"] = auc_measure(labels, predictions, owners)
    users, areas = user_auc(labels, predictions, owners)
    if len(users):
        measures["uauc"] = lambda counts: float(counts[users] @ areas / max(counts[users].sum(), _SMALLEST))
    return measures


def calibration_error(labels: Values, predictions: Values, weights: Values) -> float:
    """Compute the expected calibration error over 15 bins of equal width (Naeini et al. 2015).

    The sum over bins of their share of the predictions x |mean label - mean prediction|.
    """
    bins = np.minimum((predictions * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    return float(np.abs(np.bincount(bins, weights * (labels - predictions), NUM_BINS)).sum() / weights.sum())


def auc_measure(labels: Values, predictions: Values, owners: Integers) -> Measure:
    """Make the share of (positive, negative) pairs in the right order, ties half (Mann and Whitney 1947); sorted once for all weights."""
    order = np.argsort(predictions, kind="stable")
    sorted_predictions, is_positive, users = predictions[order], labels[order] > 0, owners[order]
    starts = np.flatnonzero(np.diff(sorted_predictions, prepend=-np.inf))  # of each distinct prediction

    def measure(counts: Values) -> float:
        weights = counts[users]
        positive, negative = (np.add.reduceat(np.where(is_class, weights, 0.0), starts) for is_class in (is_positive, ~is_positive))
        below = np.cumsum(negative) - negative / 2
        return float(positive @ below / max(positive.sum() * negative.sum(), _SMALLEST))

    return measure


def user_auc(labels: Values, predictions: Values, owners: Integers) -> tuple[Integers, Values]:
    """Compute the AUC of each user who has labels of both classes; their plain mean, each user counting the same, is the UAUC."""
    order = np.argsort(owners, kind="stable")
    users, areas = [], []
    for own in np.split(order, np.flatnonzero(np.diff(owners[order])) + 1):
        is_positive = labels[own] > 0
        num_positive = int(is_positive.sum())
        num_pairs = num_positive * (len(own) - num_positive)
        if num_pairs:
            rank_sum = rankdata(predictions[own])[is_positive].sum()
            users.append(owners[own[0]])
            areas.append((rank_sum - num_positive * (num_positive + 1) / 2) / num_pairs)
    return np.array(users, np.int64), np.array(areas)
