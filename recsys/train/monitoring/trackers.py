"""Sends metrics to MLflow and Weights & Biases from a thread, so that no server delays a step.

A resumed run continues its record. Environment variables of the services configure their servers (`MLFLOW_TRACKING_URI`,
`WANDB_BASE_URL`, `WANDB_API_KEY`).
"""

import hashlib
import importlib.util
import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recsys.config import Config
from recsys.config.base import leaves
from recsys.errors import UserError
from recsys.store import private_folder

logger = logging.getLogger(__name__)
GRACE_SECONDS = 30.0
"""Maximum wait at the end of a run for metrics that are not sent yet."""


class _MLflow:
    """A run of the experiment `run.project`; on resume it is found by the tag `recsys.run`."""

    def __init__(self, config: Config) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        found = self._client.get_experiment_by_name(config.run.project)
        experiment = found.experiment_id if found else self._client.create_experiment(config.run.project)
        tags = {"recsys.run": _identity(config)}
        (run, *_) = self._client.search_runs([experiment], f"tags.`recsys.run` = '{tags['recsys.run']}'", max_results=1) or [None]
        self._run_id = (run or self._client.create_run(experiment, tags=tags, run_name=config.run.name)).info.run_id
        if run is not None:
            self._client.update_run(self._run_id, status="RUNNING")
            return
        parameters = [Param(key, str(value)) for key, value in leaves(config.model_dump(mode="json"))]
        for begin in range(0, len(parameters), 100):  # the server's limit per request
            self._client.log_batch(self._run_id, params=parameters[begin : begin + 100])

    def send(self, scalars: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        names = {name: name.replace("@", "_at_").replace("%", "percent") for name in scalars}  # MLflow does not allow @ and %
        self._client.log_batch(self._run_id, metrics=[self._metric(names[name], value, now, step) for name, value in scalars.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class _WeightsAndBiases:
    """A run of the project `run.project`, with an id derived from its name and its store."""

    def __init__(self, config: Config) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=config.run.project,
            name=config.run.name,
            id=_identity(config),
            resume="allow",
            config=dict(leaves(config.model_dump(mode="json"))),
            dir=str(private_folder(Path(config.run.scratch) / "wandb")),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def send(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)  # the service ignores steps repeated after a restart

    def close(self) -> None:
        self._run.finish()


_KINDS: dict[str, type[_MLflow | _WeightsAndBiases]] = {"mlflow": _MLflow, "wandb": _WeightsAndBiases}


class Trackers:
    """All trackers of `run.trackers`. A tracker that fails is disabled with a warning; the run continues."""

    def __init__(self, config: Config) -> None:
        """Start opening the trackers in a thread; raise a UserError if one is not installed."""
        for name in config.run.trackers:
            if importlib.util.find_spec(name) is None:
                raise UserError(f"run.trackers = {name}: is not installed; pip install 'recsys[trackers]', or remove it")
        self._config = config
        self._open: dict[str, _MLflow | _WeightsAndBiases] = {}
        self._waiting: queue.SimpleQueue[tuple[Mapping[str, float], int] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
        self._thread.start()

    def send(self, scalars: Mapping[str, float], step: int) -> None:
        """Queue the metrics of a step; returns at once."""
        self._waiting.put((scalars, step))

    def close(self) -> None:
        """Wait at most `GRACE_SECONDS` until all metrics are sent."""
        self._waiting.put(None)
        self._thread.join(GRACE_SECONDS)

    def _work(self) -> None:
        for name in self._config.run.trackers:
            with self._disable_on_error(name):
                self._open[name] = _KINDS[name](self._config)
        while True:
            item = self._waiting.get()
            for opened, tracker in list(self._open.items()):
                with self._disable_on_error(opened):
                    tracker.send(*item) if item is not None else tracker.close()
            if item is None:
                return

    @contextmanager
    def _disable_on_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            logger.warning("run.trackers = %s: disabled for the rest of the run (%s)", name, " ".join(str(error).split())[:300])
            self._open.pop(name, None)


def _identity(config: Config) -> str:
    """Return an id for a run from its name and its store, in characters that both services allow."""
    return hashlib.sha256(f"{config.storage.root}/{config.run.name}".encode()).hexdigest()[:16]
