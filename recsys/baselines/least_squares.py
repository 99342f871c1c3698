"""Implicit matrix factorization by alternating least squares (Hu, Koren, Volinsky 2008).

Shapes: U users, I items, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array

from recsys.arrays import Integers, Scores
from recsys.baselines.baseline import Baseline
from recsys.baselines.fitting import ValidationRanking, choose
from recsys.baselines.interactions import TrainingData, history_matrix
from recsys.config import Config
from recsys.model.scoring import RetrievalScores

NUM_SWEEPS = 10
SETTINGS = ((10.0, 0.01), (3.0, 0.01), (1.0, 0.03))
"""To choose from: how much all that was not taken weighs against all that was, and the penalty."""


@dataclass(frozen=True)
class ImplicitFactors(Baseline):
    """Ranks by item vectors and the user vector that fits the history best, whoever the user is."""

    items: NDArray[np.float32]  # (I + 1, W)
    weight: float
    penalty: float

    def score(self, histories: Sequence[Integers], users: Integers) -> Scores:
        """Solve for the user's vector given the items'."""
        matrix = history_matrix(histories, len(self.items) - 1)
        vectors = solve(matrix, self.items, self.weight, self.penalty)
        scores: Scores = RetrievalScores(torch.from_numpy(self.items))(torch.from_numpy(vectors)).numpy()
        return scores


def fit_implicit(data: TrainingData, config: Config) -> Baseline:
    """Fit with each of some settings and choose by the validation targets."""
    density = data.matrix.nnz / (data.num_users * data.num_items)
    fitted = (factorize(data.matrix, config.model.width, config.training.seed, share * density, penalty) for share, penalty in SETTINGS)
    return choose(fitted, ValidationRanking(data))


def factorize(matrix: csr_array, width: int, seed: int, weight: float, penalty: float) -> ImplicitFactors:
    """Alternate between the users' and the items' vectors, from small random ones."""
    by_item = matrix.T.tocsr()
    items = np.random.default_rng(seed).normal(0, 0.1 * width**-0.5, (matrix.shape[1], width)).astype(np.float32)
    for _ in range(NUM_SWEEPS):
        users = solve(matrix, items, weight, penalty)
        items = solve(by_item, users, weight, penalty)
    return ImplicitFactors(items, weight, penalty)


def solve(matrix: csr_array, others: NDArray[np.float32], weight: float, penalty: float) -> NDArray[np.float32]:
    """Return the row vectors p that minimise their part of the loss given the column vectors q.

    sum over taken (p.q - 1)^2 + weight * sum over all (p.q)^2 + penalty * (number taken + weight * columns) * |p|^2, the penalty
    scaled as in Rendle, Krichene, Zhang, Koren 2022.
    """
    width = others.shape[1]
    everything = weight * others.T @ others
    rows = np.zeros((matrix.shape[0], width), np.float32)
    for row in np.flatnonzero(np.diff(matrix.indptr)):
        taken = others[matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]]]
        ridge = penalty * (len(taken) + weight * len(others))
        rows[row] = np.linalg.solve(everything + taken.T @ taken + ridge * np.eye(width, dtype=np.float32), taken.sum(0))
    return rows
