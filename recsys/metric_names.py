"""The names of metrics, which direction is better, and whether a result may replace another. Pure functions."""

import math
from collections.abc import Mapping

RANKING_METRICS = ("hr", "ndcg", "mrr", "recall")
"""Metrics of the ranks of a user's targets, written as `ndcg@10`."""

LIST_METRICS = ("coverage", "novelty", "popularity_percentile", "popularity_lift", "intra_list_diversity", "gini")
"""Metrics of the recommended lists, written as `coverage@10`."""

SHARE_SUFFIX = "_share"
"""Ends the name of a task's mean label among the targets in the lists, written as `like_share@10`."""

TASK_METRICS = ("auc", "uauc", "logloss", "ece", "rmse")
"""Metrics of a task's predictions, written as `click.auc`."""

_LOWER_IS_BETTER = {"logloss", "ece", "rmse", "popularity_percentile", "popularity_lift", "gini"}


def is_lower_better(metric: str) -> bool:
    """Return whether a smaller value of the metric is better."""
    return metric.rpartition(".")[2].partition("@")[0] in _LOWER_IS_BETTER


def oriented(value: float, metric: str) -> float:
    """Return the value with a sign such that higher is better."""
    return -value if is_lower_better(metric) else value


def broken_guards(changes: Mapping[str, float], guards: Mapping[str, float]) -> list[str]:
    """Return the guarded metrics whose change is worse than the guard allows, or is not a number; both are new minus old."""
    return [
        name
        for name, allowed in guards.items()
        if not oriented(changes.get(name, math.nan), name) >= oriented(allowed, name) - 1e-12  # tolerates the rounding of a difference
    ]
