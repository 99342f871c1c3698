"""Popularity, over all training data or over its recent part."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recsys.arrays import Integers, Scores
from recsys.baselines.baseline import Baseline
from recsys.baselines.interactions import TrainingData
from recsys.config import Config

RECENT_SHARE = 0.1


@dataclass(frozen=True)
class Popularity(Baseline):
    """One score per item, (I + 1,)."""

    item_scores: Scores

    def score(self, histories: Sequence[Integers], users: Integers) -> Scores:
        """Repeat the items' scores."""
        return np.broadcast_to(self.item_scores, (len(users), len(self.item_scores)))


def fit_popularity(data: TrainingData, config: Config) -> Popularity:
    """Count all training interactions."""
    return Popularity(data.item_counts.astype(np.float32))


def fit_recent_popularity(data: TrainingData, config: Config) -> Popularity:
    """Count the last tenth of the training interactions by time, or without time the last tenth of each user's.

    Of equal counts the item that is taken more in all the training data comes first.
    """
    train = data.train
    if data.manifest.has_time:
        is_recent = train.timestamps >= np.quantile(train.timestamps, 1 - RECENT_SHARE)
    else:
        lengths = train.lengths[train.owners]
        is_recent = train.positions >= np.ceil(lengths * (1 - RECENT_SHARE)).clip(max=lengths - 1)
    recent = np.bincount(train.items[is_recent], minlength=len(data.item_counts))
    return Popularity((recent + data.item_counts / (1 + data.item_counts.max())).astype(np.float32))
