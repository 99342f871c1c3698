"""Evaluate a checkpoint by full ranking, next to baselines and by slice, and write a report."""

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any

from recsys.config import Config
from recsys.launch.command import run_verb
from recsys.store import Storage

if TYPE_CHECKING:
    from recsys.predictor import Predictor

logger = logging.getLogger(__name__)


def run(config: Config) -> dict[str, Any]:
    """Evaluate `evaluation.checkpoint` on `evaluation.split`."""
    from recsys.evaluation.evaluator import evaluate
    from recsys.evaluation.slices import sentence
    from recsys.report.pages import EVALUATION, write_report
    from recsys.train.checkpoints.load_recommender import build_predictor, check_given, load_trained, with_given_ranking

    storage, scratch, settings = Storage.from_config(config.storage), config.run.scratch, config.evaluation

    def load(uri: str) -> "Predictor":
        return build_predictor(*load_trained(storage, uri, scratch)[1:])

    check_given(storage, config, settings.checkpoint)
    checkpoint, trained, dataset, recommender = load_trained(storage, settings.checkpoint, scratch)
    found = evaluate(build_predictor(with_given_ranking(trained, config), dataset, recommender), dataset, settings, load)
    result = {"checkpoint": settings.checkpoint, "metric": settings.metric, "ranking_metric": settings.ranking_metric, **found}
    if "compare" in result:
        logger.info("evaluate: %s", sentence(result["compare"], settings.ranking_metric))
    # The folder name has a hash of the result, so that another evaluation never overwrites it.
    digest = hashlib.sha256(json.dumps(result).encode()).hexdigest()[:8]
    folder = storage.uri("runs", checkpoint.run, "evaluations", f"step-{checkpoint.state.step:08d}-{result['split']}-{digest}")
    return {**result, "report": write_report(storage, folder, EVALUATION, result)}


if __name__ == "__main__":
    run_verb("jobs.evaluate", run, __doc__)
