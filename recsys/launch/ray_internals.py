"""All private names of Ray that this project uses for training, for lack of public ones. A test fails when one of them moves."""

from collections.abc import Callable
from typing import Any

import ray
from ray._private.state import actors
from ray.train import FailureConfig, Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

__all__ = ["RestartingTrainer", "WorkerHealthCheckTimeoutError", "is_preempted", "worker_nodes"]

WORKER_CLASS = "RayTrainWorker"

ShouldRestart = Callable[[TrainingFailedError], bool]


class RestartPolicy(DefaultFailurePolicy):  # type: ignore[misc]
    """Makes Ray Train's controller restart failed workers if `should_restart` returns True, so that the controller keeps running."""

    def __init__(self, failure_config: FailureConfig, should_restart: ShouldRestart) -> None:
        super().__init__(failure_config)
        self._should_restart = should_restart

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Return the decision of `should_restart`, or of Ray's own rules if no workers could be started, since a cluster may still grow."""
        if isinstance(training_failed_error, ControllerError):
            return super().make_decision(training_failed_error)
        return FailureDecision.RETRY if self._should_restart(training_failed_error) else FailureDecision.RAISE


class RestartingTrainer(TorchTrainer):  # type: ignore[misc]
    """A `TorchTrainer` with `RestartPolicy`."""

    def __init__(self, *arguments: Any, should_restart: ShouldRestart, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._should_restart = should_restart

    def _initialize_and_run_controller(self, **settings: Any) -> Result:
        policy = RestartPolicy(self.run_config.failure_config, self._should_restart)
        return super()._initialize_and_run_controller(**settings | {"failure_policy": policy})


def is_preempted() -> bool:
    """Return whether a node of this worker's group will soon be preempted. Ray's public call is a barrier over all workers."""
    return get_train_context().preemption_context.preemption_info is not None


def worker_nodes() -> set[str]:
    """Return the ids of the nodes of this job's training workers, including dead workers."""
    job = ray.get_runtime_context().get_job_id()
    return {actor["Address"]["NodeID"] for actor in actors().values() if (actor["JobID"], actor["ActorClassName"]) == (job, WORKER_CLASS)}
