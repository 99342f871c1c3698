"""The two-tower baseline: one tower of user attributes and mean history, one of item id and features."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.arrays import Integers, Scores
from recsys.baselines.baseline import Baseline, ValidationRanking, fit
from recsys.baselines.training_data import TrainingData, join_histories, known_rows
from recsys.config import Config
from recsys.data.sequences import ranges
from recsys.model.item_encoder import ItemEncoder, ItemText
from recsys.model.retrieval import sampled_softmax

LEARNING_RATE = 0.005


class TwoTower(nn.Module, Baseline):
    """Ranks by the dot product of the towers; a user not in training has only the history.

    Shapes: N users, H interactions in all their histories, U known users, A attributes, I items, W width.
    """

    attributes: Tensor  # (U + 1, 1 + A) row 0 is a user not in training; column 0 is always 0, so that there is a column

    def __init__(self, data: TrainingData, config: Config) -> None:
        super().__init__()
        width = config.model.width
        without_text = config.with_values({"model.use_ids": True, "model.use_features": True, "model.id_dropout": 0.0})
        self.max_history = config.data.max_history
        self.items = ItemEncoder(without_text.model, data.catalogue, ItemText())
        self.register_buffer("attributes", F.pad(torch.from_numpy(data.attributes), (1, 0, 1, 0)), persistent=False)
        self.of_attributes = nn.EmbeddingBag(data.num_attribute_values + 1, width, mode="sum", padding_idx=0)
        nn.init.normal_(self.of_attributes.weight, std=0.1 * width**-0.5)
        self.dropout = nn.Dropout(config.model.dropout)
        self.network = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def users(self, rows: Tensor, history: Tensor, starts: Tensor, item_vectors: Tensor) -> Tensor:
        """Return the vectors (N, W) of users, given their rows (N,) of `attributes` and histories (H,) of rows of `item_vectors`."""
        mean = F.embedding_bag(history, item_vectors, starts, mode="mean")
        known = self.dropout(mean + self.of_attributes(self.attributes[rows]))
        encoded: Tensor = known + self.network(known)
        return encoded

    @torch.no_grad()
    def score(self, histories: Sequence[Integers], users: Integers) -> Scores:
        """Score every item for each user."""
        items = self.items()
        history, offsets = map(torch.from_numpy, join_histories(histories, self.max_history))
        scores: Scores = (self.users(known_rows(users, self.attributes), history, offsets[:-1], items) @ items.T).numpy()
        return scores


def fit_two_tower(data: TrainingData, config: Config) -> Baseline:
    """Fit by predicting each training interaction from those before it, with in-batch negatives.

    The negatives are corrected for their sampling probability, which is their frequency in training (logQ: Yi et al. 2019).
    """
    towers, quality = TwoTower(data, config), ValidationRanking(data)
    users_of, items_of, positions = data.train.owners, data.train.items, data.train.positions
    places = np.flatnonzero(positions > 0)
    log_frequency = torch.from_numpy(np.log(np.maximum(data.item_counts, 1) / len(items_of)).astype(np.float32))

    def loss(samples: Tensor) -> Tensor:
        chosen = places[samples.numpy()]
        lengths = np.minimum(positions[chosen], config.data.max_history)
        history = items_of[ranges(chosen - lengths, lengths)]
        distinct, numbers = np.unique(np.concatenate([items_of[chosen], history]), return_inverse=True)
        vectors = towers.items(torch.from_numpy(distinct))
        targets, history_rows = torch.from_numpy(numbers).split([len(chosen), len(history)])
        starts = torch.from_numpy(np.cumsum(lengths) - lengths)
        users = towers.users(torch.from_numpy(users_of[chosen] + 1), history_rows, starts, vectors)
        positives, ids = F.embedding(targets, vectors), torch.from_numpy(items_of[chosen])
        total, _ = sampled_softmax(users, positives, ids, positives, ids, log_frequency[ids], torch.ones(len(ids)))
        return total / len(ids)

    fit(towers, len(places), loss, lambda: quality(towers), config.evaluation.baseline_epochs, LEARNING_RATE)
    return towers
