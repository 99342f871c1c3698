"""The one door to Ray Train: a config becomes a group of workers that run the training loop, restarted when one dies."""

import contextlib
import json
import logging
import os
import signal
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError, WorkerGroupError

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.errors import StoreError, UserError
from recsys.runtime import PRIVATE, connect
from recsys.storage import Storage
from recsys.train.checkpoint import read_manifest
from recsys.train.checkpoint_store import CheckpointStore
from recsys.train.clock import Attempt
from recsys.train.failures import Failure, Kind, TrainingError, delay_seconds, describe, reason_to_stop, root_cause
from recsys.train.loop import train
from recsys.train.ownership import Ownership
from recsys.train.recommending import Recommending
from recsys.train.reporter import Metrics, Request
from recsys.train.state import TrainingState
from recsys.train.trainable import MakeTrainable, MicroBatch

logger = logging.getLogger(__name__)
STOP_POLL_SECONDS = 1.0
Fit = Callable[[Config, Storage, Attempt], None]


class RayReporter:
    """Hands each epoch's metrics to Ray Train, and through its callbacks to a search; learns who wants the run to stop."""

    def __init__(self, ownership: Ownership) -> None:
        self._ownership, self._is_asked = ownership, False
        if ray.train.get_context().get_world_rank() == 0:
            threading.Thread(target=self._watch, name="stop", daemon=True).start()

    def step(self, step: int, losses: Metrics, batches: Sequence[MicroBatch]) -> None:
        """Do nothing: reporting to Ray is a barrier, too dear for every step."""

    def request(self) -> Request:
        """Pass on what the owner was asked for."""
        return Request.STOP if self._is_asked else Request.NONE

    def _watch(self) -> None:
        while not self._is_asked:
            time.sleep(STOP_POLL_SECONDS)
            with contextlib.suppress(UserError):  # a store that is out of order is found by those who need it
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
    if finished_state(checkpoints, config) is None:
        with connect(config):
            _check_resources(config)
            ownership = Ownership(storage, config.run.name)
            with ownership.held(config.run.lease_seconds), _stopped_by_signal(ownership):
                _check_resume(checkpoints, config)
                _train_to_the_end(config, storage, checkpoints, ownership, partial(_fit, callbacks=callbacks, make=make))
    state = finished_state(checkpoints, config)
    if state is None:
        raise RuntimeError(f"run {config.run.name} ended without a final checkpoint")
    best = checkpoints.uri(state.best_step or state.step)
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
        "validation": read_manifest(storage, best).state.validation,
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
        threading.Thread(target=ownership.ask_to_stop, name="stop").start()  # the interrupted code may be in the store's client

    if threading.current_thread() is not threading.main_thread():  # a trial of a search, whose driver has the signals
        yield
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_resume(checkpoints: CheckpointStore, config: Config) -> None:
    """Hold to `run.resume`; restarts of workers are not its concern.

    Raises:
        UserError: the run has a checkpoint and must not, or has none and must.
    """
    has_checkpoint, resume = bool(checkpoints.steps()), config.run.resume
    if has_checkpoint and resume == "never":
        raise UserError(
            f'run.resume = never: run {config.run.name} has checkpoints; choose another run.name, or run.resume="auto" to go on'
        )
    if not has_checkpoint and resume == "must":
        raise UserError(f'run.resume = must: run {config.run.name} has no checkpoint; correct run.name, or run.resume="auto" to start it')


def _train_to_the_end(config: Config, storage: Storage, checkpoints: CheckpointStore, ownership: Ownership, fit: Fit) -> None:
    """Start the workers, again where that may help, until the run is done.

    Raises:
        UserError: what went wrong can be mended by a person.
        RuntimeError: anything else went wrong, too often or in the same way again.
    """
    lost = ownership.lost
    causes = [] if lost is None else [Failure(kind="driver_lost", message=f"{lost} ended without a word")]
    failures: list[Failure] = []
    newest, owned_since = checkpoints.steps()[-1:], time.time()
    while True:
        trouble: Exception
        try:
            ownership.check()
            if ownership.is_asked_to_stop():
                raise UserError(f"run {config.run.name} was asked to stop; the same command goes on from its newest checkpoint")
            fit(config, storage, Attempt(token=ownership.token, causes=(*causes, *failures), owned_since=owned_since))
            return
        except TrainingFailedError as error:
            failure, trouble = failure_of(error), error
        except StoreError as error:
            failure, trouble = Failure(kind="store", message=str(error)), error
        with contextlib.suppress(StoreError):
            if (hung := ownership.take_hangs()) and failure.kind in ("worker_lost", "collective"):
                ranks = f"ranks {', '.join(map(str, hung))} ended no step within training.hang_seconds = {config.training.hang_seconds}"
                failure = Failure(kind="hang", message=f"{ranks}; those that waited for another count too")
            if (found := checkpoints.steps()[-1:]) != newest:
                newest, causes, failures = found, [], []
        failures = [*failures, failure]
        reason = reason_to_stop(failures, config.training.max_failures)
        if reason is not None:
            if failure.is_explained:
                raise UserError(failure.message) from None
            raise RuntimeError(f"run {config.run.name}: {failure}; stopped, since {reason}") from trouble
        delay = delay_seconds(failures)
        logger.warning("%s; starting again in %.0f s from the newest checkpoint", failure, delay)
        time.sleep(delay)


def failure_of(error: TrainingFailedError) -> Failure:
    """Tell what failed, out of Ray's wrappers."""
    if isinstance(error, PreemptionError):
        return Failure(kind="preempted", message=str(error))
    if not isinstance(error, WorkerGroupError) or not error.worker_failures:
        return Failure(kind="exception", message=" ".join(str(error).split()))
    return root_cause(_failure_of_worker(rank, failure) for rank, failure in error.worker_failures.items())


def _failure_of_worker(rank: int, error: BaseException) -> Failure:
    cause = getattr(error, "cause", None) or getattr(error, "health_check_failure", None) or error
    if isinstance(cause, TrainingError):
        return cause.failure
    message = " ".join(str(cause).split())
    if isinstance(cause, RayActorError):
        kind: Kind = "preempted" if cause.preempted else "node_lost" if "its node has died" in message else "worker_lost"
        return Failure(kind=kind, message=message[:300], rank=rank)
    return describe(cause, rank, None, "")


def _check_resources(config: Config) -> None:
    """Refuse what a private Ray will never have; a cluster may still grow.

    Raises:
        UserError: there are not enough GPUs.
    """
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    if config.training.use_gpu and os.environ.get(PRIVATE) and num_gpus < config.training.num_workers:
        raise UserError(
            f"training.num_workers = {config.training.num_workers} with training.use_gpu = true: this machine has {num_gpus} GPUs; "
            "set training.use_gpu=false, or RAY_ADDRESS to a cluster with GPUs"
        )


def _fit(config: Config, storage: Storage, attempt: Attempt, callbacks: Sequence[Any], make: MakeTrainable) -> None:
    """Run the workers until they are done or one fails. Ray's own records go to the run's folder under a name of this attempt.

    With a name that Ray knows it would resume by rules of its own; where a run goes on is decided by the checkpoints.
    """
    training = config.training
    records = storage.uri("runs", config.run.name, "ray")
    filesystem, path = storage.locate(records)
    trainer = TorchTrainer(
        partial(_run_worker, make),
        train_loop_config={"config": config.model_dump_json(), "attempt": attempt.model_dump_json()},
        scaling_config=ScalingConfig(
            num_workers=training.num_workers,
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


def _run_worker(make: MakeTrainable, settings: dict[str, str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    config = Config.model_validate(json.loads(settings["config"]))
    attempt = Attempt.model_validate_json(settings["attempt"])
    storage = Storage.from_config(config.storage)
    reporter = RayReporter(Ownership(storage, config.run.name, attempt.token))
    train(config, Dataset.open(storage, config.data.dataset), reporter, make, attempt)
