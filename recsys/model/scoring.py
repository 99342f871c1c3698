"""The retrieval score of users and items, and the rule for items without any information."""

import torch
from torch import Tensor


class RetrievalScores:
    """Scores items for users by the product of their vectors. Shapes: B users, I items, C candidates, W width.

    An item without interactions in training that has neither text nor features for the model to go by, has a vector of zeros. Its score
    of 0 would beat every negative one, so it is given one below all others of the user: such items rank last, by index among themselves.
    """

    def __init__(self, items: Tensor) -> None:
        self.items = items  # (I + 1, W), row 0 for padding
        is_unknown = (items == 0).all(1)
        is_unknown[0] = False
        self._is_unknown = is_unknown if bool(is_unknown.any()) else None  # (I + 1,)
        self._longest = items.norm(dim=1).max()

    def __call__(self, users: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Return the scores (B, I + 1) of the whole catalogue for users (B, W), or (B, C) of candidates (C,)."""
        items = self.items if candidates is None else self.items[candidates]
        scores = users @ items.T
        if self._is_unknown is None:
            return scores
        is_unknown = self._is_unknown if candidates is None else self._is_unknown[candidates]
        lowest = -users.norm(dim=1, keepdim=True) * self._longest - 1  # no product is less than minus that of the lengths
        return torch.where(is_unknown, lowest, scores)
