"""Lists made diverse: the best candidates put in another order, as pure functions; what is gained and lost is `diversity.py`'s.

Shapes: B users, N candidates of each, k the list's length. Each step takes the candidate with the most of
(1 - weight) x relevance + weight x what it adds to those taken; the first of equals. A relevance of -inf is no candidate.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

OWN_SHARE = 0.1
"""The part of each item that no other has, for `dpp`: without it no list could be longer than the vectors, or hold two equal ones."""

Values = NDArray[np.float64]
Rerank = Callable[[Values, Values, float, int], NDArray[np.int64]]


def mmr(relevance: Values, similarity: Values, weight: float, k: int) -> NDArray[np.int64]:
    """Rank by maximal marginal relevance: an item adds minus its similarity to the most similar one taken (Carbonell, Goldstein 1998).

    Args:
        relevance: (B, N).
        similarity: (B, N, N).

    Returns:
        Candidates in the order they are taken (B, min(k, N)).
    """
    left = (1 - weight) * relevance
    nearest = np.full(relevance.shape, -np.inf)
    users, taken = np.arange(len(relevance)), []
    for step in range(min(k, relevance.shape[1])):
        gain = left - weight * nearest if step else left
        best = gain.argmax(1)
        taken.append(best)
        left[users, best] = -np.inf
        nearest = np.maximum(nearest, similarity[users, best])
    return np.stack(taken, axis=1)


def dpp(relevance: Values, similarity: Values, weight: float, k: int) -> NDArray[np.int64]:
    """Rank by the greedy MAP of a determinantal point process: an item adds the log of what it multiplies det(S) by.

    S is `similarity` with OWN_SHARE of each item set apart. The Cholesky factor grows by a row each step, O(N k) in all steps but the
    product (Chen et al. 2018, algorithm 1). Arguments and result as in `mmr`.
    """
    num_users, num_candidates = relevance.shape
    k = min(k, num_candidates)
    left = (1 - weight) * relevance
    residual = np.ones((num_users, num_candidates))  # d^2, of S's diagonal of 1
    factor = np.zeros((k, num_users, num_candidates))  # c
    users, taken = np.arange(num_users), []
    for step in range(k):
        best = (left + weight * np.log(residual)).argmax(1)
        taken.append(best)
        left[users, best] = -np.inf
        done = factor[:step]
        row = (1 - OWN_SHARE) * similarity[users, best] - np.einsum("sb,sbn->bn", done[:, users, best], done)
        factor[step] = row / np.sqrt(residual[users, best])[:, None]
        residual = np.maximum(residual - factor[step] ** 2, OWN_SHARE)
    return np.stack(taken, axis=1)


METHODS: dict[str, Rerank] = {"mmr": mmr, "dpp": dpp}
