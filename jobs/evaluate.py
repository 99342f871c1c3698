"""Evaluate a checkpoint by full ranking beside baselines, slice by slice, and write a report."""

import hashlib
import logging
from typing import TYPE_CHECKING, Any

from recsys.config import Config
from recsys.launch.command import run_verb
from recsys.store import Storage

if TYPE_CHECKING:
    from recsys.predictor import Predictor
    from recsys.train.checkpoints.manifest import CheckpointManifest

logger = logging.getLogger(__name__)


def run(config: Config) -> dict[str, Any]:
    """Evaluate `evaluation.checkpoint` on `evaluation.split`."""
    from recsys.evaluation.evaluator import evaluate
    from recsys.evaluation.slices import sentence
    from recsys.train.checkpoints.load_recommender import build_predictor, check_given, load_trained

    storage, scratch, settings = Storage.from_config(config.storage), config.run.scratch, config.evaluation

    def load(uri: str) -> "Predictor":
        return build_predictor(*load_trained(storage, uri, scratch)[1:])

    check_given(storage, config, settings.checkpoint)
    checkpoint, trained, dataset, recommender = load_trained(storage, settings.checkpoint, scratch)
    found = evaluate(build_predictor(trained, dataset, recommender), dataset, settings, load)
    result = {"checkpoint": settings.checkpoint, **found}
    if "compare" in result:
        logger.info("evaluate: %s", sentence(result["compare"], settings.metric))
    return {**result, "report": _write_report(storage, checkpoint, result, settings.metric)}


def _write_report(storage: Storage, checkpoint: "CheckpointManifest", result: dict[str, Any], metric: str) -> str:
    """Write the page under a name that tells its content, so that another evaluation never replaces it; return its address."""
    from recsys.evaluation.report.page import REPORT_NAME, make_report

    page = make_report(result, metric).encode()
    name = f"step-{checkpoint.state.step:08d}-{result['split']}-{hashlib.sha256(page).hexdigest()[:8]}"
    uri = storage.uri("runs", checkpoint.run, "evaluations", name, REPORT_NAME)
    storage.create(uri, page)
    return uri


if __name__ == "__main__":
    run_verb("jobs.evaluate", run, __doc__)
