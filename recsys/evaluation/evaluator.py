"""The whole evaluation of a predictor: metrics, baselines, slices, fairness, diversity, comparison."""

import logging
from collections.abc import Callable
from typing import Any

from recsys.config.evaluation import EvaluationConfig
from recsys.data.manifest import Dataset
from recsys.errors import UserError
from recsys.evaluation.baselines import evaluate_baselines
from recsys.evaluation.diversity import diversity_curve
from recsys.evaluation.judge import Judge
from recsys.evaluation.queries import evaluate_queries
from recsys.evaluation.ranking import PROTOCOL, Ranked, score_by
from recsys.evaluation.significance import bootstrap_intervals
from recsys.evaluation.slices import compare, evaluate_slices, fairness_gaps, find_slices
from recsys.evaluation.tasks import predict_by
from recsys.evaluation.users import target_items
from recsys.predictor import Predictor

logger = logging.getLogger(__name__)

Load = Callable[[str], Predictor]
"""The address of a checkpoint -> its predictor."""


def evaluate(predictor: Predictor, dataset: Dataset, config: EvaluationConfig, load: Load | None = None) -> dict[str, Any]:
    """Evaluate a predictor on `evaluation.split`; `load` is needed for `evaluation.compare` and `evaluation.fairness_curve`.

    Raises:
        UserError: the split has no users, or the config names an attribute, a checkpoint or a re-ranking that cannot be.
    """
    judge = Judge.read(dataset, predictor.catalogue, config)
    ranked = judge.rank(score_by(predictor))
    per_user, tasks = judge.per_user(ranked), judge.tasks(predict_by(predictor))
    slices = find_slices(judge.users, judge.train_count)
    result: dict[str, Any] = {
        "split": config.split,
        "protocol": PROTOCOL,
        "num_users": len(judge.users),
        "metrics": {**judge.summarise(ranked), **tasks.values()},
        "absent_tasks": tasks.absent,
        "interval_95": {**bootstrap_intervals(per_user), **tasks.intervals()},
        "baselines": evaluate_baselines(judge, predictor, dataset),
        "slices": evaluate_slices(slices, ranked, config.metric),
        "fairness": fairness_gaps(per_user[config.metric], judge.users, config.fairness_attributes),
    }
    if predictor.query_encoder is not None:
        result["queries"] = evaluate_queries(judge, ranked, predictor, dataset)
    if config.diversity:
        curve = diversity_curve(ranked, target_items(judge.users), judge.vectors, config)
        result["diversity"] = {"method": config.diversity_method, "curve": curve}
    if load and config.compare:
        other = judge.rank(score_by(_load_other(load, "compare", config.compare, dataset)))
        result["compare"] = {"checkpoint": config.compare, **compare(ranked, other, slices, config.cutoffs, config.metric)}
    if load and config.fairness_curve:
        result["curve"] = [_point(judge, ranked, predictor, config.checkpoint)]
        for address in config.fairness_curve:
            other_predictor = _load_other(load, "fairness_curve", address, dataset)
            result["curve"].append(_point(judge, judge.rank(score_by(other_predictor)), other_predictor, address))
    return result


def _load_other(load: Load, key: str, address: str, dataset: Dataset) -> Predictor:
    logger.info("evaluate: ranking by %s", address)
    other = load(address)
    if other.manifest.fingerprint != dataset.manifest.fingerprint:
        raise UserError(
            f"evaluation.{key} = {address}: was trained on another dataset than evaluation.checkpoint, {dataset.uri}; give one of the same"
        )
    return other


def _point(judge: Judge, ranked: Ranked, predictor: Predictor, address: str) -> dict[str, Any]:
    """Return what a model is worth and how far its groups are apart, under the bound that it was trained with."""
    values = judge.per_user(ranked)[judge.config.metric]
    bound = predictor.config.fairness
    gaps = fairness_gaps(values, judge.users, judge.config.fairness_attributes)
    return {
        "checkpoint": address,
        "bound": bound.model_dump() if bound.attribute else None,
        judge.config.metric: float(values.mean()),
        "gaps": {name: found["gap"] for name, found in gaps.items()},
    }
