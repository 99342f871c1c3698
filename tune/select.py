"""Pure functions that choose the winner, order the leaderboard and limit concurrent trials."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from recsys.metric_names import oriented


@dataclass(frozen=True)
class Trial:
    """The result of one trial; `metric` and `checkpoint` are those of its best epoch, or None if it has none."""

    name: str
    values: dict[str, Any]
    status: str
    epochs: int
    metric: float | None
    checkpoint: str | None


def leaderboard(trials: Iterable[Trial], metric: str) -> list[Trial]:
    """Sort from best to worst by the metric of this name, then by the trials' names; trials without a finite metric come last."""
    return sorted(trials, key=lambda trial: (-oriented(trial.metric or 0.0, metric) if _is_valid(trial) else math.inf, trial.name))


def winner(trials: Iterable[Trial], metric: str) -> Trial | None:
    """Return the best trial by the metric of this name, or None if no trial has a finite metric and a checkpoint."""
    return next(filter(_is_valid, leaderboard(trials, metric)), None)


def concurrent_trials(num_cpus: float, num_gpus: float, cpus_per_trial: float, gpus_per_trial: float, limit: int | None) -> int:
    """Return how many trials fit at a time, by the scarcer of CPUs and GPUs and at most `limit`; at least one."""
    fitting = [num_cpus // cpus_per_trial] + ([num_gpus // gpus_per_trial] if gpus_per_trial else []) + ([limit] if limit else [])
    return max(1, int(min(fitting)))


def _is_valid(trial: Trial) -> bool:
    return trial.metric is not None and math.isfinite(trial.metric) and trial.checkpoint is not None
