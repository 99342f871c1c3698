"""Run all stages, each in its own process: from events and a catalogue to a running service."""

import json
import logging
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jobs.summary import ask_users, render
from recsys import terminal
from recsys.config import Config
from recsys.config.base import leaves
from recsys.config.verb_settings import reads
from recsys.errors import UserError
from recsys.launch.command import run_verb
from recsys.launch.head import local_head
from recsys.metric_names import oriented
from recsys.store import private_folder

logger = logging.getLogger(__name__)

ID_ONLY = {"model.text.mode": "off", "model.use_features": "false"}


def run(config: Config) -> dict[str, Any]:
    """Run `run.stages` in order; a stage whose result exists returns at once.

    Without a cluster in `RAY_ADDRESS` the stages share a local Ray head, which keeps running at the end if a stage serves.
    """
    begin = time.monotonic()
    with local_head(config, outlives="serve" in config.run.stages):
        results = _run_stages(config)
    results["seconds"] = round(time.monotonic() - begin, 1)
    print(render(config, results), file=terminal.stream())
    return results


def _run_stages(config: Config) -> dict[str, Any]:
    name = config.run.name
    results: dict[str, Any] = {}
    dataset = {"data.dataset": config.data.dataset}
    if "prepare_data" in config.run.stages:
        results["prepare_data"] = _stage(config, "jobs.prepare_data")
        dataset = {"data.dataset": results["prepare_data"]["dataset"]}
    if "train" in config.run.stages:
        results["train"] = _stage(config, "jobs.train", dataset)
    if "train_id_only" in config.run.stages:
        results["train_id_only"] = _stage(config, "jobs.train", {**dataset, **ID_ONLY, "run.name": f"{name}-id-only"})
    if "search" in config.run.stages:
        results["search"] = _stage(config, "tune.search", dataset)
    best = best_checkpoint(results, config.evaluation.metric)
    if "evaluate" in config.run.stages:
        results["evaluate"] = _stage(config, "jobs.evaluate", {"evaluation.checkpoint": best})
        if "train_id_only" in results:
            results["evaluate_id_only"] = _stage(config, "jobs.evaluate", {"evaluation.checkpoint": results["train_id_only"]["checkpoint"]})
    if "export" in config.run.stages:
        results["export"] = _stage(config, "jobs.export", {"export.checkpoint": best})
    if "serve" in config.run.stages:
        token = _service_token(config)
        results["serve"] = _stage(config, "serve.deploy")
        results["recommendations"] = ask_users(config, results["serve"]["url"], token, dataset["data.dataset"])
    return results


def best_checkpoint(results: dict[str, Any], metric: str) -> str:
    """Return the checkpoint of the recipe's run or of the search's winner, by validation metric; the recipe wins a tie."""
    found = [(results["train"]["validation"][metric], results["train"]["checkpoint"])] if "train" in results else []
    if "search" in results:
        found.append((results["search"]["winner"]["metrics"][metric], results["search"]["winner"]["checkpoint"]))
    return max(found, key=lambda pair: oriented(pair[0], metric))[1] if found else ""


def _stage(config: Config, module: str, values: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a verb with the given keys that it reads, and with `values`; return the JSON in its last line.

    Raises:
        UserError: the verb failed; its own error is printed above.
    """
    own = dict(leaves(config.model_dump(mode="json")))
    given = {key: json.dumps(own[key], ensure_ascii=False) for key in sorted(config.given) if reads(module, key) and own[key] is not None}
    chosen = {key: value for key, value in (values or {}).items() if value}
    settings = [f"--set={key}={value}" for key, value in (given | chosen).items()]
    logger.info("=== %s", module)
    logger.debug("%s", " ".join(settings))
    begin = time.monotonic()
    verbose = () if terminal.is_quiet() else ("--verbose",)
    finished = subprocess.run(
        [sys.executable, "-m", module, *settings, *verbose], stdout=subprocess.PIPE, stderr=terminal.stream(), check=False
    )
    if finished.returncode:
        raise UserError(f"{module}: failed with exit status {finished.returncode}; its error is above")
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    result["wall_seconds"] = round(time.monotonic() - begin, 1)
    return result


def _service_token(config: Config) -> str:
    """Return the service's bearer token from the environment, or the one created for this scratch folder."""
    name = config.service.token_env
    path = private_folder(Path(config.run.scratch)) / "service.token"
    if name not in os.environ:
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(32), encoding="ascii")
        os.environ[name] = path.read_text(encoding="ascii")
    return os.environ[name]


if __name__ == "__main__":
    run_verb("jobs.pipeline", run, __doc__)
