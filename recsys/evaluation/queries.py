"""Evaluates queries: targets are ranked again with what users typed or with words of the target's text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recsys.arrays import Scores
from recsys.data.manifest import Dataset
from recsys.data.text.queries import EVALUATION_VARIANT, MAX_WORDS, drop_words, read_queries
from recsys.evaluation.judge import Judge
from recsys.evaluation.metrics import ranking_metrics
from recsys.evaluation.ranking import Ranked, rank_users
from recsys.evaluation.users import EvaluationUser, target_items
from recsys.predictor import Predictor

TYPED_PROTOCOL = "users whose first target came after a query of theirs; it is asked for with what they typed"
MADE_PROTOCOL = (
    f"each user's first target is asked for with 1 to {MAX_WORDS} words of its own text, which the model could not know: "
    "these figures say what a query adds, and are no measure of recommendation"
)


def evaluate_queries(judge: Judge, ranked: Ranked, predictor: Predictor, dataset: Dataset) -> dict[str, Any]:
    """Compare the rank of each user's first target, where there is a query for it, with it and without (`ranked`)."""
    texts, has_text = predictor.catalogue.texts, predictor.catalogue.has_text.numpy()
    is_typed = any(user.query for user in judge.users)
    typed = read_queries(dataset, Path(predictor.config.run.scratch)) if is_typed else ()

    def query_of(user: EvaluationUser) -> str:
        item = int(user.targets.items[0])
        return typed[user.query - 1] if is_typed else drop_words(texts[item], item, EVALUATION_VARIANT)

    def score(users: Sequence[EvaluationUser]) -> Scores:
        return predictor.score_catalogue([user.history for user in users], [query_of(user) for user in users]).numpy()

    is_asked = np.array([user.query > 0 if is_typed else has_text[user.targets.items[0]] for user in judge.users])
    users = [user for user, asked in zip(judge.users, is_asked, strict=True) if asked]
    result: dict[str, Any] = {"protocol": TYPED_PROTOCOL if is_typed else MADE_PROTOCOL, "num_users": len(users)}
    if not users:
        return result
    targets = target_items(users)
    is_first = targets == np.array([[user.targets.items[0]] for user in users])
    answers = {"with_query": rank_users(score, users, judge.config).ranks, "without_query": ranked.ranks[is_asked][:, : targets.shape[1]]}
    for name, ranks in answers.items():
        metrics = ranking_metrics(np.where(is_first, ranks, 0), judge.config.cutoffs)
        result[name] = {metric: float(values.mean()) for metric, values in metrics.items()}
    return result
