"""Launches a run: decides whether it starts or resumes, holds its lease, and returns its result. Imports Ray only if workers must start."""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.launch.head import connect
from recsys.objectives.objective import ObjectiveFactory
from recsys.report.pages import TRAINING, write_report
from recsys.store import Storage
from recsys.train.checkpoints.checkpoint_store import CheckpointStore
from recsys.train.checkpoints.lease import Lease
from recsys.train.checkpoints.manifest import read_manifest
from recsys.train.state import TrainingState

logger = logging.getLogger(__name__)
RETRY_SECONDS = 1.0


def launch(config: Config, make: ObjectiveFactory, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train the objective built by `make` on a cluster, and return the result that `jobs.train` prints.

    A finished run is not started again; a killed run resumes from its newest checkpoint.

    Raises:
        UserError: the run has another config or dataset, another process trains it, or the failure is user-fixable.
    """
    storage = Storage.from_config(config.storage)
    dataset = Dataset.open(storage, config.data.dataset)
    config = dataset.complete(config)
    checkpoints = CheckpointStore(storage, config, dataset)
    begin = time.monotonic()
    _check_resume(checkpoints, config)
    if _finished_state(checkpoints, config) is None:
        with connect(config):
            from recsys.launch.workers import check_resources, train_to_the_end

            check_resources(config)
            lease = Lease(storage, config.run.name)
            with lease.held(config.run.lease_seconds), _stopped_by_signal(lease):
                _check_resume(checkpoints, config)
                train_to_the_end(config, storage, lease, make, callbacks)
    state = _finished_state(checkpoints, config)
    if state is None:
        raise RuntimeError(f"run {config.run.name} ended without a final checkpoint")
    best = checkpoints.uri(state.best_step or state.step)
    report = write_report(storage, storage.uri("runs", config.run.name), TRAINING, state.numbers(config.run.name))
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


def _finished_state(checkpoints: CheckpointStore, config: Config) -> TrainingState | None:
    """Return the final state if the run is finished; raise a UserError for checkpoints of another config or dataset."""
    newest = checkpoints.newest()
    if newest is None:
        return None
    checkpoints.check_compatible(newest)
    return newest.state if newest.state.is_finished(config) else None


@contextlib.contextmanager
def _stopped_by_signal(lease: Lease) -> Iterator[None]:
    """Turn the first SIGTERM into a request to stop; a second one terminates this process at once."""

    def ask(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        logger.warning("SIGTERM: stopping after the current step and its checkpoint")
        threading.Thread(target=_ask_to_stop, args=(lease,), name="stop").start()  # the signal may interrupt the store's client

    if threading.current_thread() is not threading.main_thread():  # a trial of a search: its driver handles signals
        yield
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ask_to_stop(lease: Lease) -> None:
    while True:
        try:
            return lease.ask_to_stop()
        except UserError as error:  # the store may recover within the grace period
            logger.warning("SIGTERM: %s", error)
            time.sleep(RETRY_SECONDS)


def _check_resume(checkpoints: CheckpointStore, config: Config) -> None:
    """Raise a UserError if `run.resume` forbids checkpoints that exist or requires missing ones. Does not apply to worker restarts."""
    resume = config.run.resume
    if resume == "never" and checkpoints.steps():
        raise UserError(
            f'run.resume = never: run {config.run.name} has checkpoints; choose another run.name, or run.resume="auto" to continue'
        )
    if resume == "must" and not checkpoints.steps():
        raise UserError(f'run.resume = must: run {config.run.name} has no checkpoint; correct run.name, or run.resume="auto" to start it')
