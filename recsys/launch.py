"""The one door to Ray Train: a config becomes a group of workers that run the training loop, restarted when one dies."""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ray
import ray.train
from ray._private.state import actors
from ray.exceptions import RayActorError
from ray.train import FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.errors import StoreError, UserError
from recsys.runtime import PRIVATE, connect
from recsys.storage import Storage
from recsys.train.checkpoint import read_manifest
from recsys.train.checkpoint_store import CheckpointStore
from recsys.train.failures import Failure, Kind, TrainingError, describe, root_cause
from recsys.train.loop import train
from recsys.train.ownership import Ownership
from recsys.train.recommending import Recommending
from recsys.train.report import REPORT_NAME, make_report
from recsys.train.reporter import Metrics, Request
from recsys.train.restarts import Restarts
from recsys.train.state import TrainingState
from recsys.train.trainable import MakeTrainable, MicroBatch

logger = logging.getLogger(__name__)
STOP_POLL_SECONDS = 1.0
RESIZE_POLL_SECONDS = 15.0
STALE_CAPACITY = ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
"""After a node is lost Ray first tries to place workers on it; it gives that up after so many seconds, by default 60."""

HEALTH_CHECK = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
"""So often the controller looks after the workers, by default every 2 s."""

WORKER = "RayTrainWorker"
"""What Ray Train calls the class of its workers."""

DOOR_SECONDS = 1.0
"""A node that takes no connection for so long is gone."""

Fit = Callable[[Config, Restarts], None]


class RayReporter:
    """Hands each epoch's metrics to Ray Train, and through its callbacks to a search; learns who wants the run to stop or to save."""

    def __init__(self, ownership: Ownership) -> None:
        self._ownership, self._is_asked, self._has_saved = ownership, False, False
        if ray.train.get_context().get_world_rank() == 0:
            threading.Thread(target=self._watch, name="stop", daemon=True).start()

    def step(self, step: int, losses: Metrics, batches: Sequence[MicroBatch]) -> None:
        """Do nothing: reporting to Ray is a barrier, too dear for every step."""

    def request(self) -> Request:
        """Pass on what the owner was asked for, and once that a node will soon be taken away.

        Ray's public call for the latter is a barrier of its own, too dear for every step; the loop agrees on requests in any case.
        """
        if self._is_asked:
            return Request.STOP
        if self._has_saved or get_train_context().preemption_context.preemption_info is None:
            return Request.NONE
        self._has_saved = True
        return Request.SAVE

    def _watch(self) -> None:
        while not self._is_asked:
            time.sleep(STOP_POLL_SECONDS)
            with contextlib.suppress(Exception):  # a store that is out of order is found by those who need it
                self._is_asked = self._ownership.is_asked_to_stop()

    def report(self, metrics: Metrics) -> None:
        """Report the metrics; Ray keeps no checkpoint of its own, the store has them."""
        ray.train.report(metrics)


def launch(config: Config, callbacks: Sequence[Any] = (), make: MakeTrainable = Recommending) -> dict[str, Any]:
    """Train what `make` builds on a cluster, and return what `jobs.train` prints.

    A run that is finished is not started again, and one that was killed goes on from its newest checkpoint.

    Raises:
        UserError: the run's name is taken by another config or dataset, another process trains it, or the workers met a user's mistake.
    """
    storage = Storage.from_config(config.storage)
    dataset = Dataset.open(storage, config.data.dataset)
    config = dataset.adopt(config)
    checkpoints = CheckpointStore(storage, config, dataset)
    begin = time.monotonic()
    _check_resume(checkpoints, config)
    if finished_state(checkpoints, config) is None:
        with connect(config):
            _check_resources(config)
            ownership = Ownership(storage, config.run.name)
            with ownership.held(config.run.lease_seconds), _stopped_by_signal(ownership):
                _check_resume(checkpoints, config)
                _train_to_the_end(config, storage, ownership, partial(_fit, callbacks=callbacks, make=make))
    state = finished_state(checkpoints, config)
    if state is None:
        raise RuntimeError(f"run {config.run.name} ended without a final checkpoint")
    best = checkpoints.uri(state.best_step or state.step)
    report = storage.uri("runs", config.run.name, REPORT_NAME)
    storage.write_bytes(report, make_report(config.run.name, state).encode())
    return {
        "run": config.run.name,
        "checkpoint": best,
        "steps": state.step,
        "samples_seen": state.samples_seen,
        "seconds": round(time.monotonic() - begin, 2),
        "samples_per_second": round(state.samples_seen / max(state.train_seconds, 1e-9), 1),
        "data_wait": round(state.data_wait_seconds / max(state.train_seconds, 1e-9), 4),
        "checkpoint_stall": round(state.checkpoint_stall_seconds / max(state.train_seconds, 1e-9), 4),
        "goodput": round(state.goodput, 4),
        "incidents": [incident.model_dump() for incident in state.incidents],
        "skipped_steps": state.skipped_steps,
        "validation": read_manifest(storage, best).state.validation,
        "report": report,
    }


def finished_state(checkpoints: CheckpointStore, config: Config) -> TrainingState | None:
    """Return the final state if nothing of the run is left to do.

    Raises:
        UserError: the run's checkpoints are of another config or dataset.
    """
    newest = checkpoints.newest()
    if newest is None:
        return None
    checkpoints.check_compatible(newest)
    return newest.state if newest.state.is_finished(config) else None


@contextlib.contextmanager
def _stopped_by_signal(ownership: Ownership) -> Iterator[None]:
    """Turn the first SIGTERM into a request to stop; a second one ends this process at once."""

    def ask(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        logger.warning("SIGTERM: stopping after the step under way and its checkpoint")
        threading.Thread(target=_ask_to_stop, args=(ownership,), name="stop").start()  # the interrupted code may be in the store's client

    if threading.current_thread() is not threading.main_thread():  # a trial of a search, whose driver has the signals
        yield
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ask_to_stop(ownership: Ownership) -> None:
    while True:
        try:
            return ownership.ask_to_stop()
        except UserError as error:  # the store may come back before the time to end is over
            logger.warning("SIGTERM: %s", error)
            time.sleep(STOP_POLL_SECONDS)


def _check_resume(checkpoints: CheckpointStore, config: Config) -> None:
    """Hold to `run.resume`; restarts of workers are not its concern.

    Raises:
        UserError: the run has a checkpoint and must not, or has none and must.
    """
    resume = config.run.resume
    if resume == "auto":
        return
    has_checkpoint = bool(checkpoints.steps())
    if has_checkpoint and resume == "never":
        raise UserError(
            f'run.resume = never: run {config.run.name} has checkpoints; choose another run.name, or run.resume="auto" to go on'
        )
    if not has_checkpoint and resume == "must":
        raise UserError(f'run.resume = must: run {config.run.name} has no checkpoint; correct run.name, or run.resume="auto" to start it')


def _train_to_the_end(config: Config, storage: Storage, ownership: Ownership, fit: Fit) -> None:
    """Start the workers, again where that may help, until the run is done.

    Raises:
        UserError: what went wrong can be mended by a person.
        RuntimeError: anything else went wrong, too often or in the same way again.
    """
    lost = ownership.lost
    causes = () if lost is None else (Failure(kind="driver_lost", message=f"{lost} ended without a word"),)
    restarts = Restarts(config, storage, ownership, causes)
    restarts.begin()
    while True:
        trouble: Exception
        try:
            fit(config, restarts)
            return
        except (TrainingFailedError, RayActorError) as error:
            trouble = error
        if restarts.read().given_up is None and restarts.after(failure_of(trouble)):  # it was the controller that failed
            continue
        attempt = restarts.read()
        failure = attempt.causes[-1]
        if failure.is_explained:
            raise UserError(failure.message) from None
        raise RuntimeError(f"run {config.run.name}: {failure}; stopped, since {attempt.given_up}") from trouble


class RestartPolicy(DefaultFailurePolicy):  # type: ignore[misc]
    """Has Ray Train's controller, when workers fail, start others as `Restarts` says; so it need not be started again itself."""

    def __init__(self, failure_config: FailureConfig, restarts: Restarts) -> None:
        super().__init__(failure_config)
        self._restarts = restarts

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Follow Ray's own rules where no workers could be started, since a cluster may still grow."""
        if isinstance(training_failed_error, ControllerError):
            return super().make_decision(training_failed_error)
        return FailureDecision.RETRY if self._restarts.after(failure_of(training_failed_error)) else FailureDecision.RAISE


class RestartingTrainer(TorchTrainer):  # type: ignore[misc]
    """Ray's trainer with a policy of our own, for which Ray has no public place."""

    def __init__(self, *arguments: Any, restarts: Restarts, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._restarts = restarts

    def _initialize_and_run_controller(self, **settings: Any) -> Result:
        policy = RestartPolicy(self.run_config.failure_config, self._restarts)
        return super()._initialize_and_run_controller(**settings | {"failure_policy": policy})


def failure_of(error: Exception) -> Failure:
    """Tell what failed, out of Ray's wrappers."""
    if isinstance(error, RayActorError):
        return Failure(kind="driver_lost", message=f"Ray Train's controller: {' '.join(str(error).split())[:300]}")
    if isinstance(error, PreemptionError):
        return Failure(kind="preempted", message=str(error))
    if not isinstance(error, WorkerGroupError) or not error.worker_failures:
        return Failure(kind="exception", message=" ".join(str(error).split()))
    failure = root_cause(_failure_of_worker(rank, failure) for rank, failure in error.worker_failures.items())
    if failure.kind in ("worker_lost", "collective") and (lost := _lost_node()):
        return Failure(kind="node_lost", message=lost)
    return failure


def _failure_of_worker(rank: int, error: BaseException) -> Failure:
    cause = getattr(error, "cause", None) or getattr(error, "health_check_failure", None) or error
    if isinstance(cause, TrainingError):
        return cause.failure
    message = " ".join(str(cause).split())
    if isinstance(cause, RayActorError):
        kind: Kind = "preempted" if cause.preempted else "node_lost" if "its node has died" in message else "worker_lost"
        return Failure(kind=kind, message=message[:300], rank=rank)
    if isinstance(cause, WorkerHealthCheckTimeoutError):
        return Failure(kind="hang", message=message[:300], rank=rank)
    return describe(cause, rank, None, "")


def _lost_node() -> str | None:
    """Name a node with workers of this job that is gone: Ray learns that only after a while, but its door is closed at once."""
    job = ray.get_runtime_context().get_job_id()
    hosts = {actor["Address"]["NodeID"] for actor in actors().values() if (actor["JobID"], actor["ActorClassName"]) == (job, WORKER)}
    for node in (node for node in ray.nodes() if node["Alive"] and node["NodeID"] in hosts):
        try:
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=DOOR_SECONDS).close()
        except OSError as error:
            return f"node {node['NodeID'][:12]} at {node['NodeManagerAddress']} takes no connection ({error})"
    return None


def _check_resources(config: Config) -> None:
    """Refuse what a private Ray will never have; a cluster may still grow.

    Raises:
        UserError: there are not enough GPUs.
    """
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.training.use_gpu and os.environ.get(PRIVATE) and num_gpus < config.training.min_workers:
        raise UserError(
            f"training.num_workers = {config.training.min_workers} with training.use_gpu = true: this machine has {num_gpus} GPUs; "
            "set training.use_gpu=false, or RAY_ADDRESS to a cluster with GPUs"
        )


def _fit(config: Config, restarts: Restarts, callbacks: Sequence[Any], make: MakeTrainable) -> None:
    """Run the workers until they are done or are not to be started again. Ray's own records go to the run's folder under a new name.

    With a name that Ray knows it would resume by rules of its own; where a run goes on is decided by the checkpoints.
    """
    training, storage = config.training, Storage.from_config(config.storage)
    os.environ.setdefault(*HEALTH_CHECK)
    if training.is_elastic:
        os.environ.setdefault(*STALE_CAPACITY)
    records = storage.uri("runs", config.run.name, "ray")
    filesystem, path = storage.locate(records)
    trainer = RestartingTrainer(
        partial(_run_worker, make, config, restarts),
        restarts=restarts,
        scaling_config=ScalingConfig(
            num_workers=(training.min_workers, training.max_workers) if training.is_elastic else training.max_workers,
            elastic_resize_monitor_interval_s=RESIZE_POLL_SECONDS,
            use_gpu=training.use_gpu,
            resources_per_worker={"CPU": training.cpus_per_worker} | ({"GPU": 1} if training.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:8],
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
            callbacks=list(callbacks),
        ),
        torch_config=TorchConfig(backend="nccl" if training.use_gpu else "gloo"),
    )
    try:
        trainer.fit()
    finally:
        with contextlib.suppress(StoreError):  # it would hide what the workers met
            storage.delete_tree(records)


def _run_worker(make: MakeTrainable, config: Config, restarts: Restarts) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    storage, attempt = Storage.from_config(config.storage), restarts.read()
    reporter = RayReporter(Ownership(storage, config.run.name, attempt.token))
    train(config, Dataset.open(storage, config.data.dataset), reporter, make, attempt)
