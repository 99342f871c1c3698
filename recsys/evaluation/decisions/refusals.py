"""Refuses metrics that a dataset cannot give, before any worker starts. Does not import torch, so that it answers at once."""

from recsys.config import Config
from recsys.config.evaluation import EvaluationConfig
from recsys.config.ranking import RETRIEVAL
from recsys.data.labels.tasks import task_labels
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.evaluation.exposures import ExposedTargets
from recsys.evaluation.users import TargetRules, find_users
from recsys.metric_names import SHARE_SUFFIX


def refuse_absent_metrics(dataset: Dataset, split: str, config: EvaluationConfig) -> None:
    """Check that the split has targets with the labels that the metric and the guards need; reads users only until they are found.

    Raises:
        UserError: no user has a target; or a metric's task is absent or of another kind, or its labels are missing or all equal.
    """
    tasks = {task.name: column for column, task in enumerate(dataset.manifest.tasks)}
    find_users(dataset, split, TargetRules.of(dataset.manifest, config))
    for metric in (config.metric, *config.guards):
        name, _, measure = metric.rpartition(".")
        if SHARE_SUFFIX + "@" in metric:
            name, measure = metric.partition(f"{SHARE_SUFFIX}@")[0], "share"
        if not name:
            continue
        if name not in tasks:
            known = ", ".join(tasks) or "none"
            raise UserError(f"evaluation.metric = '{metric}': the dataset has no task '{name}'; its tasks: {known}; ndcg@10 would work")
        kind = dataset.manifest.tasks[tasks[name]].kind
        if (measure == "rmse") != (kind == "regression"):
            possible = "rmse" if kind == "regression" else "auc"
            raise UserError(f"evaluation.metric = '{metric}': '{name}' is a {kind} task; {name}.{possible} would work")
        if not _has_labels(dataset, split, config, tasks[name], measure):
            reasons = {"rmse": "no target has a value", "uauc": "no user has labels of both classes", "share": "no target has a label"}
            lacking = reasons.get(measure, "all labels are equal")
            raise UserError(f"evaluation.metric = '{metric}': {lacking} in the {split} data; ndcg@10 would work")


def refuse_unknown_tasks(dataset: Dataset, config: Config) -> None:
    """Check that the tasks that `ranking.blend`, `model.ranker.task_weights` and `model.ranker.needs` name exist.

    Raises:
        UserError: one does not, or a task needs itself or a task of values.
    """
    kinds = {task.name: task.kind for task in dataset.manifest.tasks}
    ranker, ranking = config.model.ranker, config.ranking
    parts = [part for name in ranking.blend for part in name.split("*") if ranking.num_candidates and part != RETRIEVAL]
    named = {"ranking.blend": parts, "model.ranker.task_weights": list(ranker.task_weights)}
    named["model.ranker.needs"] = [*ranker.needs, *ranker.needs.values()]
    for key, names in named.items():
        for name in names:
            if name not in kinds:
                raise UserError(f"{key}: the dataset has no task '{name}'; its tasks: {', '.join(kinds) or 'none'}")
    for name in ranker.needs:
        chain = [name]
        while chain[-1] in ranker.needs and len(chain) <= len(ranker.needs):
            chain.append(ranker.needs[chain[-1]])
        if chain.count(chain[-1]) > 1 or any(kinds[each] != "binary" for each in chain):
            raise UserError(f"model.ranker.needs: {' needs '.join(chain)}; tasks of events need tasks of other events")


def _has_labels(dataset: Dataset, split: str, config: EvaluationConfig, column: int, measure: str) -> bool:
    """Return whether the labels of a task suffice for a metric: those of targets and, unless lists are measured, of exposures."""
    found: set[float] = set()
    by_user: dict[int, set[float]] = {}
    for user in find_users(dataset, split, TargetRules.of(dataset.manifest, config)):
        labels, mask = (array[:, column] for array in task_labels(dataset.manifest, user.targets.events, user.targets.values))
        own = set(labels[mask > 0].tolist())
        by_user[user.user_index], found = own, found | own
        if len(own if measure == "uauc" else found) >= (1 if measure in ("rmse", "share") else 2):
            return True
    if measure == "share" or dataset.manifest.tasks[column].name not in dataset.manifest.exposure_tasks:
        return False
    exposed = ExposedTargets.read(dataset, split)
    is_known = exposed.mask[:, column] > 0
    for owner, label in zip(exposed.owners[is_known].tolist(), exposed.labels[is_known, column].tolist(), strict=True):
        by_user.setdefault(owner, set()).add(label)
    is_enough = any(len(own) == 2 for own in by_user.values())
    return is_enough if measure == "uauc" else len(set().union(*by_user.values())) == 2
