"""The training state: everything a resumed run needs besides weights, optimizer and random generators."""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, model_validator

from recsys.config import Config
from recsys.errors import UserError
from recsys.metric_names import broken_guards, oriented
from recsys.train.failures import Failure

SCORE = "score"
"""The name under which `TrainingState.score` is reported."""


class Incident(BaseModel, frozen=True, extra="forbid"):
    """A return to a checkpoint: its causes, the checkpoint's step, and its cost.

    `seconds` is the time from the checkpoint to the end of the first new step: lost work and the restart, whose parts follow. If the
    owner was lost too, the time between its last heartbeat and the next owner's start is not included.
    """

    causes: tuple[Failure, ...]
    step: int
    seconds: float
    start_seconds: float
    load_seconds: float
    seek_seconds: float


class Epoch(BaseModel, frozen=True, extra="forbid"):
    """An epoch's last step, mean losses, validation of the main metric, speed, and the guards that it broke."""

    step: int
    losses: dict[str, float]
    metric: str
    validation: float
    samples_per_second: float
    broken_guards: tuple[str, ...] = ()


class TrainingState(BaseModel, extra="forbid"):
    """The progress of a run.

    `history` has an entry per validation; `loss_sums`, `epoch_samples` and `epoch_seconds` belong to the current epoch. `skipped_steps`
    are steps (from 0) that made no update because a loss or a gradient was not finite. Seconds are those of steps that were not lost;
    `wall_seconds` includes lost work. `saved_at` is in seconds since 1970. `objective` is the objective's own state. `best_guarded` is the
    best value so far of each guarded metric.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    samples_seen: int = 0
    train_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    checkpoint_stall_seconds: float = 0.0
    wall_seconds: float = 0.0
    saved_at: float = 0.0
    incidents: list[Incident] = []
    skipped_steps: list[int] = []
    history: list[Epoch] = []
    loss_sums: dict[str, float] = {}
    epoch_samples: int = 0
    epoch_seconds: float = 0.0
    best_metric: float | None = None
    best_guarded: dict[str, float] = {}
    best_step: int | None = None
    epochs_without_improvement: int = 0
    validation: dict[str, float] = {}
    objective: dict[str, list[float]] = {}

    @model_validator(mode="before")
    @classmethod
    def _read_release_0_1(cls, data: Any) -> Any:
        """Accept checkpoints of release 0.1, which stored the objective's state as `duals`."""
        if isinstance(data, dict) and "duals" in data:
            data = data.copy()
            data["objective"] = {"duals": data.pop("duals")}
        return data

    def record_step(self, losses: dict[str, float], num_samples: int, seconds: float, wait_seconds: float) -> None:
        """Count a step; a skipped step has no losses."""
        self.step += 1
        self.step_in_epoch += 1
        self.samples_seen += num_samples
        self.train_seconds += seconds
        self.data_wait_seconds += wait_seconds
        self.epoch_samples += num_samples
        self.epoch_seconds += seconds
        for name, loss in losses.items():
            self.loss_sums[name] = self.loss_sums.get(name, 0.0) + loss * num_samples

    def record_validation(self, metrics: dict[str, float], metric: str, guards: Mapping[str, float] = {}) -> None:
        """Record an epoch's validation and mean losses, and whether it is the best so far.

        An epoch in which a guarded metric is further behind its best value so far than `guards` allow is not the best.

        Raises:
            UserError: the validation lacks the metric or a guarded one.
        """
        if missing := [name for name in (metric, *guards) if name not in metrics]:
            raise UserError(f"evaluation.metric, evaluation.guards: '{missing[0]}' is not among the validation's: {', '.join(metrics)}")
        self.validation = metrics
        losses = {name: total / max(1, self.epoch_samples) for name, total in self.loss_sums.items()}
        speed = self.epoch_samples / max(self.epoch_seconds, 1e-9)
        for name in guards:
            self.best_guarded[name] = _better(self.best_guarded.get(name), metrics[name], name)
        broken = broken_guards({name: metrics[name] - self.best_guarded[name] for name in guards}, guards)
        epoch = Epoch(
            step=self.step,
            losses=losses,
            metric=metric,
            validation=metrics[metric],
            samples_per_second=speed,
            broken_guards=tuple(broken),
        )
        self.history.append(epoch)
        self.loss_sums, self.epoch_samples, self.epoch_seconds = {}, 0, 0.0
        is_better = self.best_metric is None or oriented(metrics[metric], metric) > oriented(self.best_metric, metric)
        if is_better and not broken:
            self.best_metric, self.best_step, self.epochs_without_improvement = metrics[metric], self.step, 0
        else:
            self.epochs_without_improvement += 1

    @property
    def score(self) -> float:
        """The last epoch's main metric, oriented so that higher is better; the best so far if it is higher only by breaking a guard."""
        last = self.history[-1]
        score = oriented(last.validation, last.metric)
        if not last.broken_guards or self.best_metric is None:
            return score
        return min(score, oriented(self.best_metric, last.metric))

    @property
    def goodput(self) -> float:
        """The share of the run's wall time spent in steps that were not lost, without waiting for data."""
        return (self.train_seconds - self.data_wait_seconds) / max(self.wall_seconds, 1e-9)

    def numbers(self, run: str) -> dict[str, Any]:
        """Return the numbers of the report, as in `training.json`."""
        parts = {
            "steps": self.train_seconds - self.data_wait_seconds,
            "waiting for data": self.data_wait_seconds,
            "checkpoints": self.checkpoint_stall_seconds,
            "incidents": sum(incident.seconds for incident in self.incidents),
        }
        return {
            "run": run,
            **self.model_dump(mode="json"),
            "incidents": [{**incident.model_dump(), "causes": [str(cause) for cause in incident.causes]} for incident in self.incidents],
            "samples_per_second": self.samples_seen / max(self.train_seconds, 1e-9),
            "goodput": self.goodput,
            "seconds_by_part": {**parts, "validation, start, end": max(0.0, self.wall_seconds - sum(parts.values()))},
        }

    def is_finished(self, config: Config) -> bool:
        """Return whether the run is done: all epochs or steps, or early stopping."""
        training = config.training
        patience = training.early_stopping_patience or math.inf
        is_stopped_early = self.epochs_without_improvement >= patience
        return self.epoch >= training.epochs or self.step >= (training.max_steps or math.inf) or is_stopped_early


def _better(best: float | None, value: float, metric: str) -> float:
    return value if best is None or oriented(value, metric) > oriented(best, metric) else best
