"""What is predicted of (user, target) pairs against the labels that the data has; the metrics' formulas are in `task_metrics.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from recsys.data.batch import task_labels
from recsys.data.manifest import DatasetManifest
from recsys.evaluation.significance import Interval, measure_intervals
from recsys.evaluation.task_metrics import Measure, task_measures
from recsys.evaluation.users import EvaluationUser, batches
from recsys.predictor import Predictor

Predictions = dict[str, NDArray[np.float32]]
PredictTasks = Callable[[Sequence[EvaluationUser]], Predictions | None]
"""Users -> of each task that is predicted, one number for every target of every user, in their order; none: it predicts no task."""


def predict_by(predictor: Predictor) -> PredictTasks:
    """Predict tasks by a predictor."""

    def predict(users: Sequence[EvaluationUser]) -> Predictions:
        scored = predictor.score([user.history for user in users], [user.targets.items for user in users])
        return {task.name: np.concatenate([scores[task.name] for scores in scored]) for task in predictor.manifest.tasks}

    return predict


@dataclass(frozen=True)
class TaskMeasures:
    """What tasks are judged by, as `task.metric`, how many labels that rests on, and why a task is not judged."""

    num_users: int
    num_labels: dict[str, int]
    measures: dict[str, Measure]
    absent: dict[str, str]

    def values(self) -> dict[str, float]:
        """Compute the metrics, all users counting once, with the numbers of labels as `task.num_labels`."""
        everyone = np.ones(self.num_users)
        return {**self.num_labels, **{name: measure(everyone) for name, measure in self.measures.items()}}

    def intervals(self) -> dict[str, Interval]:
        """Compute the metrics' 95 % intervals over resampled users."""
        return measure_intervals(self.measures, self.num_users)


def measure_tasks(predict: PredictTasks, manifest: DatasetManifest, users: Sequence[EvaluationUser], batch_size: int) -> TaskMeasures:
    """Predict every task of all targets, and hold the predictions against the labels that there are."""
    parts = [predict(batch) or {} for batch in batches(users, batch_size)] if manifest.tasks else [{}]
    events, values = (torch.from_numpy(np.concatenate([getattr(user.targets, name) for user in users])) for name in ("events", "values"))
    labels, mask = (array.numpy() for array in task_labels(manifest, events, values))
    owners = np.repeat(np.arange(len(users)), [len(user.targets.items) for user in users])
    found = TaskMeasures(len(users), {}, {}, {})
    for column, task in enumerate(manifest.tasks):
        has_label = mask[:, column] > 0
        truth = labels[has_label, column].astype(np.float64)
        if task.name not in parts[0]:
            continue
        if reason := _why_absent(task.kind, truth):
            found.absent[task.name] = reason
            continue
        if task.kind == "regression":
            truth = truth * manifest.value_std + manifest.value_mean
        predictions = np.concatenate([part[task.name] for part in parts])[has_label].astype(np.float64)
        found.num_labels[f"{task.name}.num_labels"] = len(truth)
        for name, measure in task_measures(task.kind, truth, predictions, owners[has_label]).items():
            found.measures[f"{task.name}.{name}"] = measure
    return found


def _why_absent(kind: str, labels: NDArray[np.float64]) -> str | None:
    """Return why a task cannot be judged, or None: it has no labels, or binary labels that are all equal."""
    if not len(labels):
        return "no target has a label"
    if kind == "binary" and (labels == labels[0]).all():
        return f"all {len(labels)} labels are {labels[0]:g}"
    return None
