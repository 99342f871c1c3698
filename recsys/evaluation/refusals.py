"""Refuses metrics that a dataset cannot give, before any worker starts. Does not import torch, so that it answers at once."""

from collections.abc import Iterable

from recsys.data.manifest import Dataset
from recsys.data.tasks import task_labels
from recsys.errors import UserError
from recsys.evaluation.users import find_users


def refuse_absent_metrics(dataset: Dataset, split: str, metrics: Iterable[str]) -> None:
    """Check that the split's targets have the labels of each `task.metric`; reads users only until they are found.

    Raises:
        UserError: the dataset has no such task, the metric is of another kind of task, or the labels are missing or all equal.
    """
    tasks = {task.name: column for column, task in enumerate(dataset.manifest.tasks)}
    for metric in metrics:
        name, _, measure = metric.rpartition(".")
        if not name:
            continue
        if name not in tasks:
            known = ", ".join(tasks) or "none"
            raise UserError(f"evaluation.metric = '{metric}': the dataset has no task '{name}'; its tasks: {known}; ndcg@10 would work")
        kind = dataset.manifest.tasks[tasks[name]].kind
        if (measure == "rmse") != (kind == "regression"):
            possible = "rmse" if kind == "regression" else "auc"
            raise UserError(f"evaluation.metric = '{metric}': '{name}' is a {kind} task; {name}.{possible} would work")
        if not _has_labels(dataset, split, tasks[name], measure):
            lacking = {"rmse": "no target has a value", "uauc": "no user has labels of both classes"}.get(measure, "all labels are equal")
            raise UserError(f"evaluation.metric = '{metric}': {lacking} in the {split} data; ndcg@10 would work")


def _has_labels(dataset: Dataset, split: str, column: int, measure: str) -> bool:
    found: set[float] = set()
    for user in find_users(dataset, split):
        labels, mask = (array[:, column] for array in task_labels(dataset.manifest, user.targets.events, user.targets.values))
        own = set(labels[mask > 0].tolist())
        found = own if measure == "uauc" else found | own
        if len(found) >= (1 if measure == "rmse" else 2):
            return True
    return False
