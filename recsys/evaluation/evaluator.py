"""Full-ranking evaluation of anything that scores the whole catalogue; the metrics' formulas are in `metrics.py`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.config import EvaluationConfig
from recsys.data.batch import task_labels
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.evaluation.metrics import bootstrap_interval, coverage, ranking_metrics, task_metrics
from recsys.predictor import History, Predictor, top_k
from recsys.schema import RANK_TIE_RULE, TIE_RULE

ScoreCatalogue = Callable[[Sequence[History]], Tensor]
"""Histories of B users -> scores of every item (B, I + 1)."""

PROTOCOL = f"every item ranked, seen items removed; {TIE_RULE}; {RANK_TIE_RULE}"
MIN_SLICE_USERS = 10
MAX_GROUPS = 25


@dataclass(frozen=True)
class EvaluationUser:
    """One user's history before the split's cut, and the targets after it that were not seen before."""

    history: History
    targets: History
    values: NDArray[np.float32]  # of the targets, NaN where missing
    attributes: dict[str, str]


@dataclass(frozen=True)
class Ranked:
    """Per user: the ranks of the targets, from 1, 0 where a user has fewer; and the top items, 0 where there are fewer."""

    ranks: NDArray[np.int64]  # (users, targets)
    top: NDArray[np.int64]  # (users, k)

    @classmethod
    def join(cls, parts: Sequence["Ranked"]) -> "Ranked":
        """Put the users of several parts together."""
        return cls(_rectangle([row for part in parts for row in part.ranks]), _rectangle([row for part in parts for row in part.top]))


def read_evaluation_users(dataset: Dataset, split: str) -> list[EvaluationUser]:
    """Read the users that have a target in the split; a target that the user had seen before counts as none.

    Raises:
        UserError: there is no such user.
    """
    users = []
    for row in dataset.read_users().to_pylist():
        begin = row["num_train"] if split == "validation" else row["num_train"] + row["num_validation"]
        end = begin + row["num_validation"] if split == "validation" else len(row["items"])
        full = History.of(row["items"], row["events"], row["timestamps"])
        seen = set(row["items"][:begin])
        new = [position for position in range(begin, end) if full.items[position] not in seen]
        if begin == 0 or not new:
            continue
        targets = History(full.items[new], full.events[new], full.timestamps[new])
        history = History(full.items[:begin], full.events[:begin], full.timestamps[:begin])
        users.append(EvaluationUser(history, targets, np.asarray(row["values"], np.float32)[new], dict(row["attributes"] or [])))
    if not users:
        raise UserError(f"{dataset.uri}: no user has a {split} target; with data.split = leave_one_out users need 3 interactions")
    return users


def batches(users: Sequence[EvaluationUser], size: int) -> Iterator[Sequence[EvaluationUser]]:
    """Cut the users into batches."""
    for begin in range(0, len(users), size):
        yield users[begin : begin + size]


def rank_users(score: ScoreCatalogue, users: Sequence[EvaluationUser], config: EvaluationConfig) -> Ranked:
    """Rank every user's targets over the whole catalogue."""
    k = max(config.cutoffs)
    ranks, tops = [], []
    for batch in batches(users, config.batch_size):
        scores = score([user.history for user in batch]).numpy()
        if np.isnan(scores).any():
            raise ValueError("the model scores an item NaN")
        for row, user in zip(scores, batch, strict=True):
            ranks.append(target_ranks(row, user))
            tops.append(top_k(row, k, user.history.items).items)
    return Ranked(_rectangle(ranks), _rectangle(tops))


def target_ranks(scores: NDArray[np.float32], user: EvaluationUser) -> NDArray[np.int64]:
    """Rank each distinct target among the unseen items: 1 + those that score higher, or the same at a lower index."""
    unseen = scores.copy()
    unseen[user.history.items] = -np.inf
    targets = np.unique(user.targets.items)
    own = unseen[targets][:, None]
    is_before = (unseen > own) | ((unseen == own) & (np.arange(len(unseen)) < targets[:, None]) & np.isfinite(unseen))
    ranks: NDArray[np.int64] = 1 + is_before.sum(1)
    return ranks


def summarise(ranked: Ranked, config: EvaluationConfig, num_items: int) -> dict[str, float]:
    """Average each metric over users and add coverage@k."""
    metrics = {name: float(values.mean()) for name, values in ranking_metrics(ranked.ranks, config.cutoffs).items()}
    return metrics | {f"coverage@{k}": coverage(ranked.top[:, :k], num_items) for k in config.cutoffs}


def evaluate_tasks(predictor: Predictor, users: Sequence[EvaluationUser], batch_size: int) -> dict[str, dict[str, float]]:
    """Compute every task's metrics over the targets that have its label."""
    manifest = predictor.manifest
    if not manifest.tasks:
        return {}
    scored: list[dict[str, NDArray[np.float32]]] = []
    for batch in batches(users, batch_size):
        scored += predictor.score([user.history for user in batch], [user.targets.items for user in batch])
    events = torch.from_numpy(np.concatenate([user.targets.events for user in users]))
    values = torch.from_numpy(np.concatenate([user.values for user in users]))
    labels, mask = (array.numpy() for array in task_labels(manifest, events, values))
    metrics = {}
    for column, task in enumerate(manifest.tasks):
        has_label = mask[:, column] > 0
        predictions = np.concatenate([scores[task.name] for scores in scored])[has_label].astype(np.float64)
        truth = labels[has_label, column].astype(np.float64)
        if task.kind == "regression":
            truth = truth * manifest.value_std + manifest.value_mean
        if len(truth):
            metrics[task.name] = {"num_labels": int(has_label.sum()), **task_metrics(task.kind, truth, predictions)}
    return metrics


def evaluate_slices(
    ranked: Ranked, users: Sequence[EvaluationUser], train_count: Tensor, config: EvaluationConfig
) -> dict[str, dict[str, Any]]:
    """Average the main metric and its hit rate over groups of users: by history length, cold target, and attribute."""
    cutoff = int(config.metric.partition("@")[2])
    per_user = ranking_metrics(ranked.ranks, (cutoff,))
    names = dict.fromkeys((config.metric, f"hr@{cutoff}"))
    result = {}
    for name, is_member in _slices(users, train_count).items():
        if is_member.sum() >= MIN_SLICE_USERS:
            result[name] = {"num_users": int(is_member.sum()), **{metric: float(per_user[metric][is_member].mean()) for metric in names}}
    return result


def _slices(users: Sequence[EvaluationUser], train_count: Tensor) -> dict[str, NDArray[np.bool_]]:
    lengths = np.array([len(user.history.items) for user in users])
    slices = {"history 1-10": lengths <= 10, "history 11-50": (lengths > 10) & (lengths <= 50), "history over 50": lengths > 50}
    counts = train_count.numpy()
    slices["cold target"] = np.array([(counts[user.targets.items] == 0).any() for user in users])
    for attribute in sorted({name for user in users for name in user.attributes}):
        values = np.array([user.attributes.get(attribute) or "" for user in users])
        groups = np.unique(values)
        if len(groups) <= MAX_GROUPS:
            slices |= {f"{attribute} {group or 'unknown'}": values == group for group in groups}
    return slices


def evaluate(predictor: Predictor, dataset: Dataset, config: EvaluationConfig) -> dict[str, Any]:
    """Evaluate a predictor on a split, popularity beside it."""
    users = read_evaluation_users(dataset, config.split)
    train_count = predictor.catalogue.train_count
    ranked = rank_users(predictor.score_catalogue, users, config)
    popularity = rank_users(popularity_scorer(predictor), users, config)
    main = ranking_metrics(ranked.ranks, config.cutoffs)[config.metric]
    num_items = predictor.catalogue.num_items
    return {
        "split": config.split,
        "protocol": PROTOCOL,
        "num_users": len(users),
        "metrics": {**summarise(ranked, config, num_items), **_flat(evaluate_tasks(predictor, users, config.batch_size))},
        "interval_95": {config.metric: bootstrap_interval(main)},
        "baselines": {"popularity": summarise(popularity, config, num_items)},
        "slices": evaluate_slices(ranked, users, train_count, config),
    }


def popularity_scorer(predictor: Predictor) -> ScoreCatalogue:
    """Return the baseline that scores every item by its training interactions."""
    return lambda histories: predictor.popularity.expand(len(histories), -1)


def _flat(tasks: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{task}.{name}": value for task, metrics in tasks.items() for name, value in metrics.items()}


def _rectangle(rows: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    width = max((len(row) for row in rows), default=0)
    rectangle = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        rectangle[index, : len(row)] = row
    return rectangle
