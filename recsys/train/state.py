"""Where a run is; saving and loading it is `checkpoint.py`'s."""

import math

from pydantic import BaseModel, ConfigDict

from recsys.config import Config


class TrainingState(BaseModel):
    """Where a run is: everything the loop needs to go on besides the engine's and the random generators' state."""

    model_config = ConfigDict(extra="forbid")

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    samples_seen: int = 0
    train_seconds: float = 0.0
    data_wait_seconds: float = 0.0
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

    def is_finished(self, config: Config) -> bool:
        """Tell whether nothing is left to do: all epochs or steps done, or validation no longer improving."""
        training = config.training
        patience = training.early_stopping_patience or math.inf
        is_stopped_early = self.epochs_without_improvement >= patience
        return self.epoch >= training.epochs or self.step >= (training.max_steps or math.inf) or is_stopped_early
