"""Ranking of users' targets over the whole catalogue."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.arrays import Integers, Mask, Scores
from recsys.config.evaluation import EvaluationConfig
from recsys.evaluation.metrics import coverage, ranking_metrics
from recsys.evaluation.users import EvaluationUser, batches, rectangle
from recsys.predictor import Predictor, top_k
from recsys.schema import PADDING_ITEM, RANK_TIE_RULE, TIE_RULE


def protocol(config: EvaluationConfig) -> str:
    """Describe in a sentence how targets are ranked."""
    repeats = {
        "exclude": "seen items removed",
        "include": "seen items are candidates and targets, too",
        "new_kind": "seen items removed, except where a stronger event than before is the target",
    }[config.repeats]
    targets = f"; targets: {', '.join(config.target_events)}" if config.target_events else ""
    return f"every item ranked, {repeats}{targets}; {TIE_RULE}; {RANK_TIE_RULE}"


NUM_CANDIDATES = 100
"""Number of a user's best items that are re-ranked for diversity."""

ScoreUsers = Callable[[Sequence[EvaluationUser]], Scores]
"""B users -> their scores of every item (B, I + 1); the column of padding is ignored."""


@dataclass(frozen=True)
class Ranked:
    """Per user: the ranks of the distinct targets, sorted by index, and the best items.

    Ranks start at 1 and are padded with 0. `group_ranks` are the ranks of cold targets among cold items and of warm targets among warm
    items. `top` is padded with 0; if lists are re-ranked, it is longer than the largest cutoff.
    """

    ranks: Integers  # (users, targets)
    group_ranks: Integers  # (users, targets)
    top: Integers  # (users, k)
    top_scores: Scores  # (users, k)

    def head(self, num_users: int) -> "Ranked":
        """Return the first users."""
        return replace(self, **{field.name: getattr(self, field.name)[:num_users] for field in fields(self)})

    @classmethod
    def join(cls, parts: Sequence["Ranked"]) -> "Ranked":
        """Concatenate the users of several parts."""
        return cls(*(rectangle([row for part in parts for row in getattr(part, field.name)]) for field in fields(cls)))


def lists_by(predictor: Predictor) -> ScoreUsers:
    """Return a function that scores users as a predictor orders their lists."""
    return lambda users: predictor.score_lists([user.history for user in users], [user.seen for user in users])


def score_by(predictor: Predictor) -> ScoreUsers:
    """Return a function that scores users with a predictor's retrieval alone."""
    return lambda users: predictor.score_catalogue([user.history for user in users]).numpy()


def popularity_of(predictor: Predictor) -> ScoreUsers:
    """Return a function that scores all users by the number of training interactions."""
    return lambda users: predictor.popularity.expand(len(users), -1).numpy()


def rank_users(score: ScoreUsers, users: Sequence[EvaluationUser], config: EvaluationConfig, is_cold: Mask | None = None) -> Ranked:
    """Rank every user's targets over the whole catalogue; `is_cold` (I + 1,) marks the items without training interactions."""
    depth = max(config.cutoffs + (NUM_CANDIDATES,) * bool(config.diversity))
    rows: list[tuple[NDArray[Any], ...]] = []
    for batch in batches(users, config.batch_size):
        scores = score(batch)
        if np.isnan(scores).any():
            raise ValueError("the model returned a NaN score")
        for row, user in zip(scores, batch, strict=True):
            best = top_k(row, depth, np.append(user.seen, PADDING_ITEM))
            rows.append((*target_ranks(row, user, is_cold), best.items, best.scores))
    return Ranked(*(rectangle(column) for column in zip(*rows, strict=True)))


def target_ranks(scores: Scores, user: EvaluationUser, is_cold: Mask | None = None) -> tuple[Integers, Integers]:
    """Rank each distinct target, sorted by index, among all unseen items, and among the unseen items that are cold or warm like it.

    A rank is 1 + the number of candidates with a higher score, or with the same score and a lower index.
    """
    is_unseen = np.ones(len(scores), np.bool_)
    is_unseen[PADDING_ITEM] = False
    is_unseen[user.seen] = False
    targets = np.unique(user.targets.items)
    own = scores[targets][:, None]
    is_before = is_unseen & ((scores > own) | ((scores == own) & (np.arange(len(scores)) < targets[:, None])))  # (T, I + 1)
    ranks: Integers = 1 + is_before.sum(1)
    if is_cold is None:
        return ranks, ranks
    num_cold_before = is_before[:, is_cold].sum(1)
    return ranks, np.where(is_cold[targets], 1 + num_cold_before, ranks - num_cold_before)


def summarize(ranked: Ranked, config: EvaluationConfig, num_items: int) -> dict[str, float]:
    """Average each metric over users and add coverage@k."""
    metrics = {name: float(values.mean()) for name, values in ranking_metrics(ranked.ranks, config.cutoffs).items()}
    return metrics | {f"coverage@{k}": coverage(ranked.top[:, :k], num_items) for k in config.cutoffs}
