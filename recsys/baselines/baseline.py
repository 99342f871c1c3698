"""The interface of a baseline."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from recsys.arrays import Integers, Scores


class Baseline(ABC):
    """Answers for users given by their histories and their numbers. Shapes: B users, P pairs, I items.

    A user that training did not have is answered for as well as the history, or nothing at all, allows.
    """

    ranks = True

    @abstractmethod
    def score(self, histories: Sequence[Integers], users: Integers) -> Scores:
        """Score every item for each user, (B, I + 1); what it says of padding is not used."""

    def score_catalogue(self, histories: Sequence[Integers], user_indices: Sequence[int]) -> Scores:
        """Score every item for each user, (B, I + 1), -inf for padding; histories are catalogue indices, oldest first."""
        scores = np.array(self.score(histories, np.asarray(user_indices, np.int64)), np.float32)
        scores[:, 0] = -np.inf
        return scores

    def score_tasks(self, user_indices: Sequence[int], items: Integers, histories: Sequence[Integers]) -> dict[str, Scores] | None:
        """Predict for P pairs the tasks that it can: probabilities, and values in their own units; None where it can none."""
        return None
