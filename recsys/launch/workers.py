"""The Ray Train adapter: starts workers that run the training loop, and restarts them after a failure."""

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError, WorkerGroupError

from recsys.config import Config
from recsys.config.verb_settings import TRIALS
from recsys.data.manifest import Dataset
from recsys.errors import StoreError, UserError
from recsys.launch.head import PRIVATE
from recsys.launch.ray_internals import RestartingTrainer, WorkerHealthCheckTimeoutError, is_preempted, worker_nodes
from recsys.objectives.objective import MicroBatch, ObjectiveFactory
from recsys.store import Storage
from recsys.terminal import mark_lines
from recsys.train.checkpoints.lease import Lease
from recsys.train.failures import Failure, Kind, TrainingError, describe, root_cause
from recsys.train.loop import Trainer
from recsys.train.monitoring.reporter import Metrics, Request
from recsys.train.recovery.restarts import Restarts

logger = logging.getLogger(__name__)
STOP_POLL_SECONDS = 1.0
RESIZE_POLL_SECONDS = 15.0
STALE_CAPACITY = ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
"""After losing a node, Ray first tries to place workers on it, by default for 60 s."""

HEALTH_CHECK = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
"""Interval of the controller's health checks; Ray's default is 2 s."""

CONNECT_SECONDS = 1.0
"""A node that accepts no connection within this time counts as lost."""


class RayReporter:
    """Reports each epoch's metrics to Ray Train, and through its callbacks to a search; receives requests to stop or save."""

    def __init__(self, lease: Lease) -> None:
        self._lease, self._is_asked, self._has_saved = lease, False, False
        if ray.train.get_context().get_world_rank() == 0:
            threading.Thread(target=self._watch, name="stop", daemon=True).start()

    def step(self, step: int, losses: Metrics, batches: Sequence[MicroBatch]) -> None:
        """Do nothing: a report to Ray is a barrier, too expensive for every step."""

    def request(self) -> Request:
        """Return a request to stop if the run's owner has one, or, once, a request to save if a node will soon be preempted.

        Ray's public call for preemption is a barrier, too expensive for every step; the loop already reduces requests over the ranks.
        """
        if self._is_asked:
            return Request.STOP
        if self._has_saved or not is_preempted():
            return Request.NONE
        self._has_saved = True
        return Request.SAVE

    def _watch(self) -> None:
        while not self._is_asked:
            time.sleep(STOP_POLL_SECONDS)
            with contextlib.suppress(Exception):  # store errors are reported where the store is needed
                self._is_asked = self._lease.is_asked_to_stop()

    def report(self, metrics: Metrics) -> None:
        """Report the metrics to Ray without a checkpoint; checkpoints are in the store."""
        ray.train.report(metrics)


def train_to_the_end(config: Config, storage: Storage, lease: Lease, make: ObjectiveFactory, callbacks: Sequence[Any]) -> None:
    """Start the workers, and restart them after failures that may pass, until the run is done.

    Raises:
        UserError: the failure's message explains it without a traceback.
        RuntimeError: any other failure that is too frequent or repeats in the same way.
    """
    lost = lease.lost
    causes = () if lost is None else (Failure(kind="driver_lost", message=f"{lost} ended without an error message"),)
    restarts = Restarts(config, storage, lease, causes)
    restarts.begin()
    while True:
        try:
            return _fit(config, restarts, make, callbacks)
        except (TrainingFailedError, RayActorError) as error:
            if restarts.read().given_up is None and restarts.after(failure_of(error)):  # the controller failed
                continue
            attempt = restarts.read()
            failure = attempt.causes[-1]
            if failure.is_explained:
                raise UserError(failure.message) from None
            raise RuntimeError(f"run {config.run.name}: {failure}; stopped, since {attempt.given_up}") from error


def _should_restart(restarts: Restarts, error: TrainingFailedError) -> bool:
    """Return whether to restart the workers; called in the process of Ray Train's controller."""
    mark_lines()
    return restarts.after(failure_of(error))


def failure_of(error: Exception) -> Failure:
    """Return the `Failure` behind an exception of Ray."""
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
    """Describe a lost node with workers of this job, if any: it cannot be reached before Ray marks it dead."""
    hosts = worker_nodes()
    for node in (node for node in ray.nodes() if node["Alive"] and node["NodeID"] in hosts):
        try:
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            return f"node {node['NodeID'][:12]} at {node['NodeManagerAddress']} cannot be reached ({error})"
    return None


def check_resources(config: Config) -> None:
    """Raise a UserError instead of waiting for GPUs that a private Ray will never have; a cluster may still grow."""
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.training.use_gpu and os.environ.get(PRIVATE) and num_gpus < config.training.min_workers:
        raise UserError(
            f"training.num_workers = {config.training.min_workers} with training.use_gpu = true: this machine has {num_gpus} GPUs; "
            "set training.use_gpu=false, or RAY_ADDRESS to a cluster with GPUs"
        )


def _fit(config: Config, restarts: Restarts, make: ObjectiveFactory, callbacks: Sequence[Any]) -> None:
    """Run the workers until they finish or may not restart. Ray's own records go to the run's folder under a new name.

    With a known name Ray would resume by its own rules; here the checkpoints decide where a run resumes.
    """
    training, storage = config.training, Storage.from_config(config.storage)
    os.environ.setdefault(*HEALTH_CHECK)
    if training.is_elastic:
        os.environ.setdefault(*STALE_CAPACITY)
    records = storage.uri("runs", config.run.name, "ray")
    filesystem, path = storage.locate(records)
    trainer = RestartingTrainer(
        partial(_run_worker, make, config, restarts),
        should_restart=partial(_should_restart, restarts),
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
        with contextlib.suppress(StoreError):  # it must not replace the workers' error
            storage.delete_tree(records)


def _run_worker(make: ObjectiveFactory, config: Config, restarts: Restarts) -> None:
    mark_lines(logging.WARNING if TRIALS in config.run.name else logging.INFO)  # a search shows one line per trial
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    storage, attempt = Storage.from_config(config.storage), restarts.read()
    reporter = RayReporter(Lease(storage, config.run.name, attempt.token))
    Trainer(config, Dataset.open(storage, config.data.dataset), reporter, make, attempt).run()
