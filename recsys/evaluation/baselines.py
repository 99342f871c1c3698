"""Evaluates baselines on the same users as the model, popularity always first."""

import logging
import time
from collections.abc import Sequence

import numpy as np

from recsys.baselines import Baseline, fit_baseline
from recsys.data.manifest import Dataset
from recsys.evaluation.judge import Judge
from recsys.evaluation.ranking import ScoreUsers
from recsys.evaluation.tasks import Predictions, PredictTasks
from recsys.evaluation.users import EvaluationUser
from recsys.predictor import Predictor

logger = logging.getLogger(__name__)

POPULARITY = "popularity"


def evaluate_baselines(judge: Judge, predictor: Predictor, dataset: Dataset) -> dict[str, dict[str, float]]:
    """Fit each baseline of `evaluation.baselines` on the training data; return its metrics by its name."""
    results = {POPULARITY: judge.summarise(judge.rank(lambda users: predictor.popularity.expand(len(users), -1).numpy()))}
    config = predictor.config.model_copy(update={"evaluation": judge.config})
    for name in judge.config.baselines:
        if name == POPULARITY:
            continue
        logger.info("evaluate: fitting %s", name)
        begin = time.monotonic()
        baseline = fit_baseline(name, dataset, predictor.catalogue, config)
        logger.info("evaluate: fitted %s in %.1f s", name, time.monotonic() - begin)
        metrics = judge.summarise(judge.rank(_score_by(baseline)))
        results[name] = metrics | judge.tasks(_predict_by(baseline)).values()
    return results


def _score_by(baseline: Baseline) -> ScoreUsers:
    return lambda users: baseline.score_catalogue([user.history.items for user in users], [user.user_index for user in users])


def _predict_by(baseline: Baseline) -> PredictTasks:
    def predict(users: Sequence[EvaluationUser]) -> Predictions | None:
        pairs = [(user, item) for user in users for item in user.targets.items]
        return baseline.score_tasks(
            [user.user_index for user, _ in pairs], np.array([item for _, item in pairs]), [user.history.items for user, _ in pairs]
        )

    return predict
