"""The factorization machine (Rendle 2010) over features of users and items; `factorization.py` fits it.

Shapes: N pairs, U users, I items, F features of one side, W width.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.arrays import Integers
from recsys.baselines.interactions import TrainingData

BIAS_PENALTY = 0.001


class FactorisationMachine(nn.Module):
    """The sum of the features' biases and of the products of all pairs of their vectors; a feature is there or it is not.

    By Rendle's identity the sum over pairs is (|sum v|^2 - sum |v|^2) / 2, which costs O(W F). It is taken for user and item apart: only
    the product of their two sums needs both, and so a catalogue is ranked. Users are numbered from 1 here; 0 is a user not known.
    """

    user_features: Tensor  # (U + 1, F) rows of the table, 0 where there is none
    item_features: Tensor  # (I + 1, F)

    def __init__(self, user_features: Tensor, item_features: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("user_features", user_features, persistent=False)
        self.register_buffer("item_features", item_features, persistent=False)
        num_features = int(torch.maximum(user_features.max(), item_features.max()))
        self.table = nn.Embedding(num_features + 1, width + 1, padding_idx=0)  # the last column is the bias
        nn.init.normal_(self.table.weight, std=0.01)
        with torch.no_grad():
            self.table.weight[0] = 0
            self.table.weight[:, -1] = 0
        self.bias = nn.Parameter(torch.zeros(()))

    @classmethod
    def of_ids(cls, data: TrainingData, width: int) -> "FactorisationMachine":
        """Know users and items by their ids alone; one without a training interaction has none."""
        return cls(*_id_features(data), width)

    @classmethod
    def of_features(cls, data: TrainingData, width: int) -> "FactorisationMachine":
        """Know users by their ids and attributes, items by their ids and categories."""
        users, items = _id_features(data)
        attributes = F.pad(torch.from_numpy(data.attributes), (0, 0, 1, 0))
        first = data.num_users + data.num_items
        categories = data.catalogue.categories.long()
        return cls(
            torch.cat([users, _shifted(attributes, first)], 1),
            torch.cat([items, _shifted(categories, first + data.num_attribute_values)], 1),
            width,
        )

    def side(self, features: Tensor, penalty: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Return of features (N, F) the sum of the vectors (N, W), the score of these alone (N,), and the penalty on them (N,)."""
        rows = self.table(features)
        vectors, biases = rows[..., :-1], rows[..., -1]
        total, squares = vectors.sum(1), vectors.square().sum((1, 2))
        alone = biases.sum(1) + (total.square().sum(1) - squares) / 2
        return total, alone, penalty * squares + BIAS_PENALTY * biases.square().sum(1)

    def forward(self, users: Tensor, items: Tensor, penalty: float = 0.0) -> tuple[Tensor, Tensor]:
        """Score pairs; return scores and penalties, (N,) each."""
        user, user_alone, user_penalty = self.side(self.user_features[users], penalty)
        item, item_alone, item_penalty = self.side(self.item_features[items], penalty)
        return (user * item).sum(1) + user_alone + item_alone + self.bias, user_penalty + item_penalty

    def rows(self, user_indices: Integers) -> Tensor:
        """Number users from 1, those it does not know 0."""
        is_known = (user_indices >= 0) & (user_indices < len(self.user_features) - 1)
        return torch.from_numpy(np.where(is_known, user_indices + 1, 0))


def _id_features(data: TrainingData) -> tuple[Tensor, Tensor]:
    """Number users (U + 1, 1), then items (I + 1, 1); who has no training interaction has no number."""
    has_any = np.append(False, data.train.lengths > 0)
    users = np.where(has_any, np.arange(data.num_users + 1), 0)
    items = np.where(data.item_counts > 0, data.num_users + np.arange(data.num_items + 1), 0)
    return torch.from_numpy(users)[:, None], torch.from_numpy(items)[:, None]


def _shifted(features: Tensor, shift: int) -> Tensor:
    """Number features from `shift` on, but leave 0, which is none."""
    return torch.where(features > 0, features + shift, 0)
