"""Where a run is; saving and loading it is `checkpoint.py`'s."""

import math

from pydantic import BaseModel, ConfigDict

from recsys.config import Config
from recsys.train.failures import Failure


class Incident(BaseModel):
    """A return to a checkpoint: why, to which step, and what it cost.

    `seconds` runs from that checkpoint, or from the start of the process that trains since then where that is another one, to the end of
    the first new step: work that was lost, and the parts of the restart that follow.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    causes: tuple[Failure, ...]
    step: int
    seconds: float
    start_seconds: float
    load_seconds: float
    seek_seconds: float


class TrainingState(BaseModel):
    """Where a run is: everything the loop needs to go on besides the engine's and the random generators' state.

    Seconds are those of steps that count: what a kill took back is not among them, but in `wall_seconds`. `saved_at` is seconds since 1970.
    """

    model_config = ConfigDict(extra="forbid")

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
    best_metric: float | None = None
    best_step: int | None = None
    epochs_without_improvement: int = 0
    validation: dict[str, float] = {}
    duals: list[float] = []

    def record_validation(self, metrics: dict[str, float], metric: str) -> None:
        """Note an epoch's validation and whether it is the best so far."""
        self.validation = metrics
        if self.best_metric is None or metrics[metric] > self.best_metric:
            self.best_metric, self.best_step, self.epochs_without_improvement = metrics[metric], self.step, 0
        else:
            self.epochs_without_improvement += 1

    @property
    def goodput(self) -> float:
        """The share of the run's whole time that went into steps that count, without waiting for data."""
        return (self.train_seconds - self.data_wait_seconds) / max(self.wall_seconds, 1e-9)

    def is_finished(self, config: Config) -> bool:
        """Tell whether nothing is left to do: all epochs or steps done, or validation no longer improving."""
        training = config.training
        patience = training.early_stopping_patience or math.inf
        is_stopped_early = self.epochs_without_improvement >= patience
        return self.epoch >= training.epochs or self.step >= (training.max_steps or math.inf) or is_stopped_early
