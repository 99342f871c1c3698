"""The evaluation of a predictor on a split: metrics, baselines, slices, fairness, queries, diversity and comparisons."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from recsys.arrays import Integers, Scores
from recsys.baselines import Baseline, fit_baseline
from recsys.config.evaluation import EvaluationConfig
from recsys.data.manifest import Dataset
from recsys.data.text.queries import EVALUATION_VARIANT, MAX_WORDS, drop_words, read_queries
from recsys.errors import UserError
from recsys.evaluation.diversity import content_vectors, diversity_curve
from recsys.evaluation.exposures import ExposedTargets
from recsys.evaluation.measures import Measures
from recsys.evaluation.metrics import ranking_metrics
from recsys.evaluation.ranking import Ranked, lists_by, popularity_of, protocol, rank_users, score_by
from recsys.evaluation.significance import bootstrap_intervals
from recsys.evaluation.slices import compare, evaluate_slices, fairness_gaps, find_slices
from recsys.evaluation.tasks import Labelled, Predictions, PredictTasks, predict_all, predict_by
from recsys.evaluation.users import EvaluationUser, TargetRules, find_new_users, find_users, target_items
from recsys.predictor import Predictor

logger = logging.getLogger(__name__)

POPULARITY = "popularity"
RETRIEVAL_ALONE = "retrieval alone"
NEW_USERS_PROTOCOL = "users without any interaction before the split are ranked by their profile alone; no item is removed"
TYPED_PROTOCOL = "users whose first target followed a typed query; it is ranked with that query"
MADE_PROTOCOL = (
    f"each user's first target is asked for with 1 to {MAX_WORDS} words of its own text, which the model could not know: "
    "these figures show what a query adds; they do not measure recommendation quality"
)

Load = Callable[[str], Predictor]
"""The address of a checkpoint -> its predictor."""


def evaluate(predictor: Predictor, dataset: Dataset, config: EvaluationConfig, load: Load | None = None) -> dict[str, Any]:
    """Evaluate a predictor on `evaluation.split`; `load` is needed for `evaluation.compare` and `evaluation.fairness_curve`.

    Raises:
        UserError: the split has no users, or a configured attribute, checkpoint or re-ranking is not possible on this dataset.
    """
    rules, catalogue = TargetRules.of(dataset.manifest, config), predictor.catalogue
    users = list(find_users(dataset, config.split, rules))
    exposed = ExposedTargets.read(dataset, config.split) if dataset.manifest.has_exposures else None
    measures = Measures(config, dataset.manifest, users, catalogue.train_count.numpy(), content_vectors(catalogue), exposed)
    ranked = measures.rank(lists_by(predictor))
    labelled = _predict(measures, predict_by(predictor))
    per_user, tasks = measures.per_user(ranked), measures.tasks(labelled)
    slices = find_slices(users, measures.train_count, dataset.manifest.event_kinds)
    result: dict[str, Any] = {
        "split": config.split,
        "protocol": protocol(config),
        "num_users": len(users),
        "targets": dict(rules.counts),
        "metrics": {**measures.summarize(ranked), **tasks.values()},
        "absent_tasks": tasks.absent,
        "interval_95": {**bootstrap_intervals(per_user), **tasks.intervals()},
        "baselines": _evaluate_baselines(measures, predictor, dataset),
        "slices": evaluate_slices(slices, ranked, config.ranking_metric),
        "task_slices": {
            name: {**found.values(), "interval_95": found.intervals()} for name, found in measures.task_slices(labelled).items()
        },
        "fairness": fairness_gaps(per_user[config.ranking_metric], users, config.fairness_attributes),
    }
    if new_users := find_new_users(dataset, config.split, rules) if predictor.reads_profiles else []:
        result["new_users"] = _evaluate_new_users(measures, new_users, predictor)
    if predictor.query_encoder is not None:
        result["queries"] = _evaluate_queries(measures, ranked, predictor, dataset)
    if config.diversity:
        curve = diversity_curve(ranked, target_items(users), measures.vectors, config)
        result["diversity"] = {"method": config.diversity_method, "curve": curve}
    if load and config.compare:
        other = measures.rank(lists_by(_load_other(load, "compare", config.compare, dataset)))
        result["compare"] = {"checkpoint": config.compare, **compare(ranked, other, slices, config.cutoffs, config.ranking_metric)}
    if load and config.fairness_curve:
        result["curve"] = [_fairness_point(measures, ranked, predictor, config.checkpoint)]
        for address in config.fairness_curve:
            peer = _load_other(load, "fairness_curve", address, dataset)
            result["curve"].append(_fairness_point(measures, measures.rank(lists_by(peer)), peer, address))
    return result


def _evaluate_baselines(measures: Measures, predictor: Predictor, dataset: Dataset) -> dict[str, dict[str, float]]:
    """Fit `evaluation.baselines` on the training data and return the metrics of each; popularity is always included, as the first."""
    results = {POPULARITY: measures.summarize(measures.rank(popularity_of(predictor)))}
    if predictor.config.ranking.num_candidates:
        results[RETRIEVAL_ALONE] = measures.summarize(measures.rank(score_by(predictor)))
    config = predictor.config.model_copy(update={"evaluation": measures.config})
    for name in measures.config.baselines:
        if name == POPULARITY:
            continue
        logger.info("evaluate: fitting %s", name)
        begin = time.monotonic()
        baseline = fit_baseline(name, dataset, predictor.catalogue, config)
        logger.info("evaluate: fitted %s in %.1f s", name, time.monotonic() - begin)
        results[name] = _measure_baseline(measures, baseline)
    return results


def _measure_baseline(measures: Measures, baseline: Baseline) -> dict[str, float]:
    is_target = measures.manifest.target_kinds

    def positives(user: EvaluationUser) -> Integers:
        return user.history.items[is_target[user.history.events]]

    def score(users: Sequence[EvaluationUser]) -> Scores:
        return baseline.score_catalogue([positives(user) for user in users], [user.user_index for user in users])

    def predict(users: Sequence[EvaluationUser]) -> Predictions | None:
        pairs = [(user, item) for user in users for item in user.targets.items]
        return baseline.score_tasks(
            [user.user_index for user, _ in pairs], np.array([item for _, item in pairs]), [positives(user) for user, _ in pairs]
        )

    metrics = measures.summarize(measures.rank(score)) if baseline.ranks else {}
    return metrics | measures.tasks(_predict(measures, predict)).values()


def _predict(measures: Measures, predict: PredictTasks) -> Labelled:
    size, exposed = measures.config.batch_size, measures.exposed
    return measures.labelled(predict_all(predict, measures.users, size), predict_all(predict, exposed.users, size) if exposed else {})


def _evaluate_new_users(measures: Measures, users: Sequence[EvaluationUser], predictor: Predictor) -> dict[str, Any]:
    """Compare the lists by profile with popularity (`other`) for users without a history; all their targets count."""
    own, config = replace(measures, users=users), measures.config
    ranked, by_count = own.rank(lists_by(predictor)), own.rank(popularity_of(predictor))
    metrics = compare(ranked, by_count, {}, config.cutoffs, config.ranking_metric)["metrics"]
    return {"protocol": NEW_USERS_PROTOCOL, "num_users": len(users), "metrics": metrics}


def _evaluate_queries(measures: Measures, ranked: Ranked, predictor: Predictor, dataset: Dataset) -> dict[str, Any]:
    """Compare the ranks of the users' first targets with a query to those without (`ranked`), for targets that have a query.

    Queries are those that users typed or, if there are none, words of the target's text.
    """
    texts, has_text = predictor.catalogue.texts, predictor.catalogue.has_text.numpy()
    is_typed = any(user.query for user in measures.users)
    typed = read_queries(dataset, Path(predictor.config.run.scratch)) if is_typed else ()

    def query_of(user: EvaluationUser) -> str:
        item = int(user.targets.items[0])
        return typed[user.query - 1] if is_typed else drop_words(texts[item], item, EVALUATION_VARIANT)

    def score(users: Sequence[EvaluationUser]) -> Scores:
        return predictor.score_lists([user.history for user in users], [user.seen for user in users], [query_of(user) for user in users])

    is_asked = np.array([user.query > 0 if is_typed else has_text[user.targets.items[0]] for user in measures.users])
    users = list(compress(measures.users, is_asked))
    result: dict[str, Any] = {"protocol": TYPED_PROTOCOL if is_typed else MADE_PROTOCOL, "num_users": len(users)}
    if not users:
        return result
    targets = target_items(users)
    is_first = targets == np.array([[user.targets.items[0]] for user in users])
    asked = rank_users(score, users, measures.config)
    for name, ranks in (("with_query", asked.ranks), ("without_query", ranked.ranks[is_asked][:, : targets.shape[1]])):
        metrics = ranking_metrics(np.where(is_first, ranks, 0), measures.config.cutoffs)
        result[name] = {metric: float(values.mean()) for metric, values in metrics.items()}
    return result


def _load_other(load: Load, key: str, address: str, dataset: Dataset) -> Predictor:
    logger.info("evaluate: ranking by %s", address)
    other = load(address)
    if other.manifest.fingerprint != dataset.manifest.fingerprint:
        raise UserError(
            f"evaluation.{key} = {address}: was trained on another dataset than evaluation.checkpoint, {dataset.uri}; give one of the same"
        )
    return other


def _fairness_point(measures: Measures, ranked: Ranked, predictor: Predictor, address: str) -> dict[str, Any]:
    """Return a model's main metric and gaps between groups, and the bound that it was trained with."""
    config, bound = measures.config, predictor.config.fairness
    values = measures.per_user(ranked)[config.ranking_metric]
    gaps = fairness_gaps(values, measures.users, config.fairness_attributes)
    return {
        "checkpoint": address,
        "bound": bound.model_dump() if bound.attribute else None,
        config.ranking_metric: float(values.mean()),
        "gaps": {name: found["gap"] for name, found in gaps.items()},
    }
