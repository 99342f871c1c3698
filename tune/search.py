"""Search hyperparameters: Optuna proposes values, ASHA stops weak trials early, each trial is a full distributed training run."""

import hashlib
import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from recsys.config import Config
from recsys.errors import UserError
from recsys.launch.command import run_verb
from recsys.launch.head import connect
from recsys.store import Storage
from tune.select import Trial, leaderboard, winner
from tune.space import trial_config

if TYPE_CHECKING:
    from recsys.data.manifest import Dataset


def run(config: Config) -> dict[str, Any]:
    """Run `search.num_trials` trials on `data.dataset` and return the winner and the leaderboard.

    The result is stored, so submitting the same search again returns it.
    """
    from recsys.data.manifest import Dataset  # imported here so that config errors do not wait for torch
    from recsys.launch.checks import check_training

    check_training(config, *config.search.text_mode)
    storage = Storage.from_config(config.storage)
    dataset = Dataset.open(storage, config.data.dataset)
    config = dataset.complete(config)
    identity = _identify(config, dataset)
    kept = storage.uri("runs", config.run.name, f"search-{identity}.json")
    if not storage.exists(kept):
        begin = time.monotonic()
        with connect(config):
            from tune.trials import run_trials

            samples = run_trials(config, storage, identity)
        trials = [_read_trial(trial_config(config, identity, sample), storage, dataset, sample, status) for sample, status in samples]
        result = _describe(config, trials) | {"seconds": round(time.monotonic() - begin, 2)}
        storage.create(kept, json.dumps(result).encode())
    return dict(json.loads(storage.read_bytes(kept)))


def _identify(config: Config, dataset: "Dataset") -> str:
    """Hash everything that a search's result depends on."""
    sections = config.model_dump(mode="json", include={"model", "optimizer", "training", "fairness", "ranking", "search", "evaluation"})
    content = [dataset.manifest.fingerprint, config.data.max_history, sections]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _describe(config: Config, trials: list[Trial]) -> dict[str, Any]:
    metric = config.evaluation.metric
    best = winner(trials, metric)
    if best is None:
        raise UserError(f"search of run {config.run.name}: no trial reached a finite {metric}; the trials' errors are in the log file")
    chosen = {"trial": best.name, "config": best.values, "metrics": {metric: best.metric}, "checkpoint": best.checkpoint}
    ordered = [asdict(trial) for trial in leaderboard(trials, metric)]
    return {"num_trials": len(trials), "metric": metric, "winner": chosen, "leaderboard": ordered}


def _read_trial(trial: Config, storage: Storage, dataset: "Dataset", sample: dict[str, Any], status: str) -> Trial:
    """Read a trial's result from its checkpoints, which outlive the search."""
    from recsys.train.checkpoints.checkpoint_store import CheckpointStore

    checkpoints = CheckpointStore(storage, trial, dataset)
    newest = checkpoints.newest()
    state = newest.state if newest else None
    checkpoint = checkpoints.uri(state.best_step) if state and state.best_step is not None else None
    return Trial(trial.run.name, sample, status, state.epoch if state else 0, state.best_metric if state else None, checkpoint)


if __name__ == "__main__":
    run_verb("tune.search", run, __doc__)
