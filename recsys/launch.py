"""The one door to Ray Train: a config becomes a group of workers that run the training loop, restarted when one dies."""

import json
import logging
import os
import time
import uuid
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import WorkerGroupError

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.runtime import PRIVATE, connect
from recsys.storage import Storage
from recsys.train.checkpoint import CheckpointStore, read_manifest
from recsys.train.loop import train
from recsys.train.recommending import Recommending
from recsys.train.reporter import Metrics
from recsys.train.state import TrainingState
from recsys.train.trainable import MakeTrainable, MicroBatch

logger = logging.getLogger(__name__)


class RayReporter:
    """Hands each epoch's metrics to Ray Train, and through its callbacks to a search."""

    def step(self, step: int, losses: Metrics, batches: Sequence[MicroBatch]) -> None:
        """Do nothing: reporting to Ray is a barrier, too dear for every step."""

    def report(self, metrics: Metrics) -> None:
        """Report the metrics; Ray keeps no checkpoint of its own, the store has them."""
        ray.train.report(metrics)


def launch(config: Config, callbacks: Sequence[Any] = (), make: MakeTrainable = Recommending) -> dict[str, Any]:
    """Train what `make` builds on a cluster, and return what `jobs.train` prints.

    A run that is finished is not started again, and one that was killed goes on from its newest checkpoint.

    Raises:
        UserError: the run's name is taken by another config or dataset, or the workers met a user's mistake.
    """
    storage = Storage.from_config(config.storage)
    dataset = Dataset.open(storage, config.data.dataset)
    config = dataset.adopt(config)
    checkpoints = CheckpointStore(storage, config, dataset)
    begin = time.monotonic()
    if finished_state(checkpoints, config) is None:
        with connect(config):
            _check_resources(config)
            _fit(config, storage, callbacks, make)
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


def _fit(config: Config, storage: Storage, callbacks: Sequence[Any], make: MakeTrainable) -> None:
    """Run the workers to the end. Ray's own records go to the run's folder under a name of this attempt.

    With a name that Ray knows it would resume by rules of its own; where a run goes on is decided by the checkpoints.
    """
    training = config.training
    attempt = uuid.uuid4().hex[:8]
    records = storage.uri("runs", config.run.name, "ray")
    filesystem, path = storage.locate(records)
    trainer = TorchTrainer(
        partial(_run_worker, make),
        train_loop_config={"config": config.model_dump_json()},
        scaling_config=ScalingConfig(
            num_workers=training.num_workers,
            use_gpu=training.use_gpu,
            resources_per_worker={"CPU": training.cpus_per_worker} | ({"GPU": 1} if training.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=attempt,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=training.max_failures),
            callbacks=list(callbacks),
        ),
        torch_config=TorchConfig(backend="nccl" if training.use_gpu else "gloo"),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            if isinstance(mistake := _cause(failure), UserError):
                raise mistake from None
        raise
    finally:
        storage.delete_tree(records)


def _cause(error: BaseException) -> BaseException:
    """Return what the worker raised, out of Ray's wrappers."""
    return getattr(error, "cause", None) or error.__cause__ or error


def _run_worker(make: MakeTrainable, settings: dict[str, str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    config = Config.model_validate(json.loads(settings["config"]))
    storage = Storage.from_config(config.storage)
    train(config, Dataset.open(storage, config.data.dataset), RayReporter(), make)
