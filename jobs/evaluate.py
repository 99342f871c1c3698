"""Evaluate a checkpoint by full ranking, popularity beside it, and slice by slice."""

from typing import Any

from recsys.command import run_verb
from recsys.config import Config
from recsys.evaluation.evaluator import evaluate
from recsys.storage import Storage
from recsys.train.checkpoint import build_predictor, load_trained


def run(config: Config) -> dict[str, Any]:
    """Evaluate `evaluation.checkpoint` on `evaluation.split`."""
    storage = Storage.from_config(config.storage)
    _, trained, dataset, recommender = load_trained(storage, config.evaluation.checkpoint, config.run.scratch)
    return {
        "checkpoint": config.evaluation.checkpoint,
        **evaluate(build_predictor(trained, dataset, recommender), dataset, config.evaluation),
    }


if __name__ == "__main__":
    run_verb(run, __doc__)
