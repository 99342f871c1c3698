"""What is predicted of (user, target) pairs against the labels that the data has; the metrics' formulas are in `task_metrics.py`."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from recsys.data.batch import task_labels
from recsys.data.manifest import DatasetManifest
from recsys.evaluation.task_metrics import task_metrics
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


def evaluate_tasks(predict: PredictTasks, manifest: DatasetManifest, users: Sequence[EvaluationUser], batch_size: int) -> dict[str, float]:
    """Compute the metrics of every task that is predicted, as `task.metric`, over the targets that have its label."""
    parts = [predict(batch) for batch in batches(users, batch_size)] if manifest.tasks else []
    predictions = {name: np.concatenate([part[name] for part in parts if part]) for name in (parts[0] or {})} if parts else {}
    events, values = (torch.from_numpy(np.concatenate([getattr(user.targets, name) for user in users])) for name in ("events", "values"))
    owners = np.repeat(np.arange(len(users)), [len(user.targets.items) for user in users])
    labels, mask = (array.numpy() for array in task_labels(manifest, events, values))
    metrics: dict[str, float] = {}
    for column, task in enumerate(manifest.tasks):
        has_label = mask[:, column] > 0
        if task.name not in predictions or not has_label.any():
            continue
        truth = labels[has_label, column].astype(np.float64)
        if task.kind == "regression":
            truth = truth * manifest.value_std + manifest.value_mean
        found = task_metrics(task.kind, truth, predictions[task.name][has_label].astype(np.float64), owners[has_label])
        metrics |= {f"{task.name}.{name}": value for name, value in {"num_labels": int(has_label.sum()), **found}.items()}
    return metrics
