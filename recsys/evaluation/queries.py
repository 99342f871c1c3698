"""What a query adds: users' targets ranked once more with words of the target's own text asked for; not a measure of recommendation."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from recsys.data.queries import EVALUATION_VARIANT, MAX_WORDS, drop_words
from recsys.evaluation.judge import Judge
from recsys.evaluation.metrics import ranking_metrics
from recsys.evaluation.ranking import Ranked, Scores, rank_users
from recsys.evaluation.users import EvaluationUser, target_items
from recsys.predictor import Predictor

PROTOCOL = (
    f"each user's first target is asked for with 1 to {MAX_WORDS} words of its own text, which the model could not know: "
    "these figures say what a query adds, and are no measure of recommendation"
)


def evaluate_queries(judge: Judge, ranked: Ranked, predictor: Predictor) -> dict[str, Any]:
    """Compare the rank of each user's first target, where it has text, with a query and without (`ranked`)."""
    texts, has_text = predictor.catalogue.texts, predictor.catalogue.has_text.numpy()

    def score(users: Sequence[EvaluationUser]) -> Scores:
        items = [int(user.targets.items[0]) for user in users]
        queries = [drop_words(texts[item], item, EVALUATION_VARIANT) for item in items]
        return predictor.score_catalogue([user.history for user in users], queries).numpy()

    is_asked = has_text[[user.targets.items[0] for user in judge.users]]
    users = [user for user, asked in zip(judge.users, is_asked, strict=True) if asked]
    result: dict[str, Any] = {"protocol": PROTOCOL, "num_users": len(users)}
    if not users:
        return result
    targets = target_items(users)
    is_first = targets == np.array([[user.targets.items[0]] for user in users])
    answers = {"with_query": rank_users(score, users, judge.config).ranks, "without_query": ranked.ranks[is_asked][:, : targets.shape[1]]}
    for name, ranks in answers.items():
        metrics = ranking_metrics(np.where(is_first, ranks, 0), judge.config.cutoffs)
        result[name] = {metric: float(values.mean()) for metric, values in metrics.items()}
    return result
