"""Metrics of task predictions for (user, target) pairs: AUC, log loss, RMSE, calibration error."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recsys.arrays import Floats, Integers, Mask, Scores
from recsys.data.labels.tasks import task_labels
from recsys.data.manifest import DatasetManifest
from recsys.evaluation.significance import Interval, measure_intervals
from recsys.evaluation.users import EvaluationUser, batches
from recsys.predictor import Predictor

NUM_BINS = 15
_SMALLEST = np.finfo(np.float64).tiny

Measure = Callable[[Floats], float]
"""Number of times that each user counts (U,) -> a metric. Ones give the metric itself, the counts of a resample that of the resample."""


def task_measures(kind: str, labels: Floats, predictions: Floats, owners: Integers) -> dict[str, Measure]:
    """Return the metrics of a task: rmse of a regression; logloss, ece, auc and uauc of probabilities.

    AUC and UAUC are left out if no two labels can be compared.

    Args:
        owners: (N,) the user of each label.
    """
    if kind == "regression":
        squares = (labels - predictions) ** 2
        return {"rmse": lambda counts: float(np.sqrt(_mean(squares, counts[owners])))}
    likelihood = np.where(labels > 0, predictions, 1 - predictions)
    surprise = -np.log(np.maximum(likelihood, np.finfo(np.float32).eps))
    measures: dict[str, Measure] = {
        "logloss": lambda counts: _mean(surprise, counts[owners]),
        "ece": lambda counts: calibration_error(labels, predictions, counts[owners]),
    }
    if len(np.unique(labels)) == 2:
        measures["auc"] = auc_measure(labels, predictions, owners)
    users, areas = user_auc(labels, predictions, owners)
    if len(users):
        measures["uauc"] = lambda counts: _mean(areas, counts[users])
    return measures


def _mean(values: Floats, weights: Floats) -> float:
    """Return the weighted mean; NaN for a resample without any of the values, which intervals leave out."""
    total = weights.sum()
    return float(weights @ values / total) if total else float("nan")


def calibration_error(labels: Floats, predictions: Floats, weights: Floats) -> float:
    """Compute the expected calibration error over 15 bins of equal width (Naeini et al. 2015).

    The sum over bins of their share of the predictions x |mean label - mean prediction|.
    """
    bins = np.minimum((predictions * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    total = weights.sum()
    return float(np.abs(np.bincount(bins, weights * (labels - predictions), NUM_BINS)).sum() / total) if total else float("nan")


def auc_measure(labels: Floats, predictions: Floats, owners: Integers) -> Measure:
    """Return the AUC as a function of user counts, ties counting half (Mann and Whitney 1947); predictions are sorted only once."""
    order = np.argsort(predictions, kind="stable")
    sorted_predictions, is_positive, users = predictions[order], labels[order] > 0, owners[order]
    starts = np.flatnonzero(np.diff(sorted_predictions, prepend=-np.inf))  # of each distinct prediction

    def measure(counts: Floats) -> float:
        weights = counts[users]
        positive, negative = (np.add.reduceat(np.where(is_class, weights, 0.0), starts) for is_class in (is_positive, ~is_positive))
        below = np.cumsum(negative) - negative / 2
        num_pairs = positive.sum() * negative.sum()
        return float(positive @ below / num_pairs) if num_pairs else float("nan")

    return measure


def user_auc(labels: Floats, predictions: Floats, owners: Integers) -> tuple[Integers, Floats]:
    """Compute the AUC of each user who has labels of both classes; their unweighted mean is the UAUC."""
    from scipy.stats import rankdata  # half a second, which a training worker need not spend

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


Predictions = dict[str, NDArray[np.float32]]
PredictTasks = Callable[[Sequence[EvaluationUser]], Predictions | None]
"""Users -> per task, one number for each target of each user, in their order; None: no task is predicted."""


def predict_by(predictor: Predictor) -> PredictTasks:
    """Return a function that predicts tasks with a predictor."""

    def predict(users: Sequence[EvaluationUser]) -> Predictions | None:
        if not predictor.manifest.tasks:
            return None
        scored = predictor.score([user.history for user in users], [user.targets.items for user in users])
        return {task.name: np.concatenate([scores[task.name] for scores in scored]) for task in predictor.manifest.tasks}

    return predict


@dataclass(frozen=True)
class TaskMeasures:
    """The metrics of tasks by `task.metric`, the number of labels per task, and the reason why a task has no metrics."""

    num_users: int
    num_labels: dict[str, int]
    measures: dict[str, Measure]
    absent: dict[str, str]

    def values(self) -> dict[str, float]:
        """Compute the metrics, and add the numbers of labels as `task.num_labels`."""
        return {**self.num_labels, **{name: measure(np.ones(self.num_users)) for name, measure in self.measures.items()}}

    def intervals(self) -> dict[str, Interval]:
        """Compute the metrics' 95 % intervals over resampled users."""
        return measure_intervals(self.measures, self.num_users)


def predict_all(predict: PredictTasks, users: Sequence[EvaluationUser], batch_size: int) -> Predictions:
    """Predict the tasks for all targets of all users, in batches; empty if no task is predicted."""
    parts = [predict(batch) or {} for batch in batches(users, batch_size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else {})}


@dataclass(frozen=True)
class Labelled:
    """M predictions of each task with the labels, the mask of those that exist, and the user of each, numbered from 0."""

    predictions: Predictions  # (M,) by task
    labels: Scores  # (M, T)
    mask: Scores  # (M, T)
    owners: Integers  # (M,)

    def where(self, is_kept: Mask) -> "Labelled":
        """Return some of them."""
        predictions = {name: values[is_kept] for name, values in self.predictions.items()}
        return Labelled(predictions, self.labels[is_kept], self.mask[is_kept], self.owners[is_kept])


def labelled_targets(predictions: Predictions, manifest: DatasetManifest, users: Sequence[EvaluationUser]) -> Labelled:
    """Return the predictions of all users' targets with their labels."""
    events, values = (np.concatenate([getattr(user.targets, name) for user in users]) for name in ("events", "values"))
    labels, mask = task_labels(manifest, events, values)
    return Labelled(predictions, labels, mask, np.repeat(np.arange(len(users)), [len(user.targets.items) for user in users]))


def measure_tasks(labelled: Labelled, manifest: DatasetManifest, num_users: int) -> TaskMeasures:
    """Compare predictions with the existing labels."""
    labels, mask, owners, predictions = labelled.labels, labelled.mask, labelled.owners, labelled.predictions
    found = TaskMeasures(num_users, {}, {}, {})
    for column, task in enumerate(manifest.tasks):
        has_label = mask[:, column] > 0
        truth = labels[has_label, column].astype(np.float64)
        if task.name not in predictions:
            continue
        if not len(truth):
            found.absent[task.name] = "no target has a label"
            continue
        if task.kind == "binary" and (truth == truth[0]).all():
            found.absent[task.name] = f"all {len(truth)} labels are {truth[0]:g}"
            continue
        if task.kind == "regression":
            truth = truth * manifest.value_std + manifest.value_mean
        predicted = predictions[task.name][has_label].astype(np.float64)
        found.num_labels[f"{task.name}.num_labels"] = len(truth)
        for name, measure in task_measures(task.kind, truth, predicted, owners[has_label]).items():
            found.measures[f"{task.name}.{name}"] = measure
    return found
