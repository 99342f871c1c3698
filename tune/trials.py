"""Runs the trials of a search on Ray Tune; each one is a full distributed training run."""

import logging
import math
from typing import Any

import ray
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from recsys.config import Config
from recsys.launch.driver import launch
from recsys.metric_names import oriented
from recsys.objectives.next_item import NextItem
from recsys.store import Storage
from recsys.terminal import format_settings
from recsys.train.state import SCORE
from tune.select import concurrent_trials
from tune.space import search_space, trial_config

logger = logging.getLogger(__name__)


class ShowTrials(Callback):  # type: ignore[misc]
    """Logs a line for each trial that ends."""

    def __init__(self, config: Config) -> None:
        self._metric, self._num_trials, self._num_ended = config.evaluation.metric, config.search.num_trials, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log the trial's metric."""
        self._num_ended += 1
        last = trial.last_result or {}
        reached = f"{self._metric} {last.get(self._metric, math.nan):.4f} after epoch {last.get('epoch', 0)}"
        logger.info("search: trial %d of %d: %s; %s", self._num_ended, self._num_trials, reached, format_settings(trial.config, 3))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log that the trial failed."""
        self._num_ended += 1
        failed = "search: trial %d of %d failed; its error is in the log file; %s"
        logger.warning(failed, self._num_ended, self._num_trials, format_settings(trial.config, 3))


def run_trials(config: Config, storage: Storage, identity: str) -> list[tuple[dict[str, Any], str]]:
    """Run the trials; return the sampled values and the status of each."""
    search, training = config.search, config.training
    resources = ray.cluster_resources()
    cpus = 1 + training.max_workers * training.cpus_per_worker  # one CPU for the trial's driver
    gpus = training.max_workers * training.use_gpu
    limit = concurrent_trials(resources.get("CPU", 0), resources.get("GPU", 0), cpus, gpus, search.max_concurrent)
    records = storage.uri("runs", config.run.name, "ray-search")
    filesystem, path = storage.locate(records)
    tuner = Tuner(
        _train_trial(config, identity),
        param_space=search_space(search),
        tune_config=TuneConfig(
            metric=SCORE,
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
            callbacks=[ShowTrials(config)],
        ),
    )
    try:
        return [(result.config or {}, _status(result, training.epochs)) for result in tuner.fit()]
    finally:
        storage.delete_tree(records)


def _train_trial(config: Config, identity: str) -> Any:
    """Return the function that Tune runs as a trial: a driver that launches a full training run."""

    def train_trial(sample: dict[str, Any]) -> None:
        result = launch(trial_config(config, identity, sample), NextItem, [TuneReportCallback()])
        score = oriented(result["validation"][config.evaluation.metric], config.evaluation.metric)
        ray.tune.report({"epoch": config.training.epochs, **result["validation"], SCORE: score})

    return train_trial


def _status(result: Any, epochs: int) -> str:
    if result.error is not None:
        return "failed"
    return "finished" if (result.metrics or {}).get("epoch", 0) >= epochs else "stopped"
