"""The trials of a search on Ray Tune: each a whole distributed training run that a driver starts; the result is kept in the store."""

import hashlib
import json
import logging
import time
from dataclasses import asdict
from typing import Any

import ray
from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from recsys.config import Config
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.launch import launch
from recsys.runtime import connect
from recsys.storage import Storage
from recsys.train.checkpoint_store import CheckpointStore
from tune.select import Trial, concurrent_trials, leaderboard, winner
from tune.space import search_space, trial_config

logger = logging.getLogger(__name__)


def search(config: Config) -> dict[str, Any]:
    """Run `search.num_trials` trials on `data.dataset` and return the winner and the leaderboard.

    The result is kept in the store, so that the same search submitted again returns it.
    """
    storage = Storage.from_config(config.storage)
    dataset = Dataset.open(storage, config.data.dataset)
    config = dataset.adopt(config)
    identity = _identify(config, dataset)
    kept = storage.uri("runs", config.run.name, f"search-{identity}.json")
    if not storage.exists(kept):
        begin = time.monotonic()
        with connect(config):
            samples = _run_trials(config, storage, identity)
        trials = [_read_trial(trial_config(config, identity, sample), storage, dataset, sample, status) for sample, status in samples]
        result = _describe(config, trials) | {"seconds": round(time.monotonic() - begin, 2)}
        storage.create(kept, json.dumps(result).encode())
    return dict(json.loads(storage.read_bytes(kept)))


def _identify(config: Config, dataset: Dataset) -> str:
    """Hash what a search's result depends on."""
    sections = config.model_dump(mode="json", include={"model", "optimizer", "training", "fairness", "search", "evaluation"})
    content = [dataset.manifest.fingerprint, config.data.max_history, sections]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _describe(config: Config, trials: list[Trial]) -> dict[str, Any]:
    best = winner(trials)
    if best is None:
        raise UserError(
            f"search of run {config.run.name}: no trial reached a finite {config.evaluation.metric}; see the trials' errors above"
        )
    for rank, trial in enumerate(leaderboard(trials), start=1):
        logger.info(
            "%d. %s %s after %d epochs (%s): %s", rank, config.evaluation.metric, trial.metric, trial.epochs, trial.status, trial.values
        )
    return {
        "num_trials": len(trials),
        "metric": config.evaluation.metric,
        "winner": {
            "trial": best.name,
            "config": best.values,
            "metrics": {config.evaluation.metric: best.metric},
            "checkpoint": best.checkpoint,
        },
        "leaderboard": [asdict(trial) for trial in leaderboard(trials)],
    }


def _run_trials(config: Config, storage: Storage, identity: str) -> list[tuple[dict[str, Any], str]]:
    """Run the trials; return each one's sampled values and how it ended."""
    search, training = config.search, config.training
    resources = ray.cluster_resources()
    cpus = 1 + training.max_workers * training.cpus_per_worker  # a trial's own driver takes one
    gpus = training.max_workers * training.use_gpu
    limit = concurrent_trials(resources.get("CPU", 0), resources.get("GPU", 0), cpus, gpus, search.max_concurrent)
    records = storage.uri("runs", config.run.name, "ray-search")
    filesystem, path = storage.locate(records)
    tuner = Tuner(
        _train_trial(config, identity),
        param_space=search_space(search),
        tune_config=TuneConfig(
            metric=config.evaluation.metric,
            mode="max",
            num_samples=search.num_trials,
            search_alg=ConcurrencyLimiter(OptunaSearch(seed=search.seed), max_concurrent=limit),
            scheduler=ASHAScheduler(
                time_attr="epoch",
                max_t=training.epochs,
                grace_period=min(search.grace_epochs, training.epochs),
                reduction_factor=search.reduction_factor,
            ),
        ),
        run_config=RunConfig(
            name=f"{config.run.name}-search".replace("/", "."),
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=0),
            verbose=1,
        ),
    )
    try:
        return [(result.config or {}, _status(result, training.epochs)) for result in tuner.fit()]
    finally:
        storage.delete_tree(records)


def _train_trial(config: Config, identity: str) -> Any:
    """Return the function that Tune runs as a trial: a driver that launches a whole training run."""
    base, given = config.model_dump_json(), config.given

    def train_trial(sample: dict[str, Any]) -> None:
        base_config = Config.model_validate_json(base).as_given(given)
        result = launch(trial_config(base_config, identity, sample), callbacks=[TuneReportCallback()])
        ray.tune.report({"epoch": base_config.training.epochs, **result["validation"]})

    return train_trial


def _status(result: Any, epochs: int) -> str:
    if result.error is not None:
        return "failed"
    return "finished" if (result.metrics or {}).get("epoch", 0) >= epochs else "stopped"


def _read_trial(trial: Config, storage: Storage, dataset: Dataset, sample: dict[str, Any], status: str) -> Trial:
    """Read what a trial reached from its checkpoints, which outlive the search."""
    checkpoints = CheckpointStore(storage, trial, dataset)
    newest = checkpoints.newest()
    state = newest.state if newest else None
    checkpoint = checkpoints.uri(state.best_step) if state and state.best_step is not None else None
    return Trial(trial.run.name, sample, status, state.epoch if state else 0, state.best_metric if state else None, checkpoint)
