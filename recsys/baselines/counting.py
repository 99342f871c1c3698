"""Counting baselines: popularity, recent popularity, and item-kNN with a shrunk cosine similarity between the items' users."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array, vstack

from recsys.arrays import Integers, Scores
from recsys.baselines.baseline import Baseline, ValidationRanking
from recsys.baselines.training_data import TrainingData, history_matrix, recency_weights
from recsys.config import Config

RECENT_SHARE = 0.1
NUM_NEIGHBORS = 50
SHRINKAGE = 10.0
HALF_LIVES = (np.inf, 32.0, 8.0, 2.0, 1.0)
CHUNK_CELLS = 1 << 24
"""Maximum number of item pairs in memory."""


@dataclass(frozen=True)
class Popularity(Baseline):
    """Gives every user the same scores."""

    item_scores: Scores  # (I + 1,)

    def score(self, histories: Sequence[Integers], users: Integers) -> Scores:
        """Repeat the items' scores for each user."""
        return np.broadcast_to(self.item_scores, (len(users), len(self.item_scores)))


def fit_popularity(data: TrainingData, config: Config) -> Popularity:
    """Count all training interactions."""
    return Popularity(data.item_counts.astype(np.float32))


def fit_recent_popularity(data: TrainingData, config: Config) -> Popularity:
    """Count the last tenth of the training interactions by time or, without times, of each user's interactions.

    Ties are broken by the counts over all training data.
    """
    train = data.train
    if data.dataset.manifest.has_time:
        is_recent = train.timestamps >= np.quantile(train.timestamps, 1 - RECENT_SHARE)
    else:
        lengths = train.lengths[train.owners]
        is_recent = train.positions >= np.ceil(lengths * (1 - RECENT_SHARE)).clip(max=lengths - 1)
    recent = np.bincount(train.items[is_recent], minlength=len(data.item_counts))
    return Popularity((recent + data.item_counts / (1 + data.item_counts.max())).astype(np.float32))


@dataclass(frozen=True)
class ItemNeighbors(Baseline):
    """Scores an item by its similarity to the history's items; the weight of an interaction halves every `half_life` interactions back."""

    similarity: csr_array  # (I + 1, I + 1) each item's neighbors
    popularity: Scores  # (I + 1,) lower than any similarity; orders items without neighbors in the history
    half_life: float

    def score(self, histories: Sequence[Integers], users: Integers) -> Scores:
        """Sum the similarities to the history's items, weighted by recency."""
        matrix = history_matrix(histories, len(self.popularity) - 1, recency_weights(histories, self.half_life))
        scores: Scores = (matrix @ self.similarity).toarray() + self.popularity
        return scores


def fit_item_knn(data: TrainingData, config: Config) -> Baseline:
    """Compute the neighbors and choose the half life by the validation targets."""
    similarity = nearest_neighbors(data.matrix, NUM_NEIGHBORS, SHRINKAGE)
    popularity = (1e-4 * data.item_counts / (1 + data.item_counts.max())).astype(np.float32)
    return max((ItemNeighbors(similarity, popularity, half_life) for half_life in HALF_LIVES), key=ValidationRanking(data))


def nearest_neighbors(matrix: csr_array, num_neighbors: int, shrinkage: float) -> csr_array:
    """Return each item's largest similarities |users of both| / (sqrt(|users of one| |users of other|) + shrinkage); items are columns."""
    by_item = matrix.T.tocsr()
    norms = np.sqrt(by_item.sum(1)).astype(np.float32)
    num_rows = max(1, CHUNK_CELLS // len(norms))
    chunks = []
    for begin in range(0, len(norms), num_rows):
        both = (by_item[begin : begin + num_rows] @ matrix).tocoo()
        ones, others = both.coords[0] + begin, both.coords[1]
        values = np.where(ones == others, 0, both.data / (norms[ones] * norms[others] + shrinkage))
        chunks.append(_keep_largest(csr_array((values, both.coords), shape=both.shape), num_neighbors))
    return vstack(chunks, format="csr")


def _keep_largest(similarity: csr_array, count: int) -> csr_array:
    """Keep the `count` largest of each row."""
    for begin, end in itertools.pairwise(similarity.indptr.tolist()):
        if end - begin > count:
            row = similarity.data[begin:end]
            row[np.argpartition(row, -count)[:-count]] = 0
    similarity.eliminate_zeros()
    return similarity
