"""Draws the negatives of sampled losses; which samples a step has is the plan's."""

import numpy as np
import torch

from recsys.config import Config
from recsys.data.item_features import ItemFeatures


class NegativeSampler:
    """Draws each step's negatives, the same on every rank, from the catalogue's items that occur in training."""

    def __init__(self, catalogue: ItemFeatures, config: Config) -> None:
        loss = config.model.loss
        self._num = loss.num_negatives if loss.draws_negatives else 0
        self._seed = config.training.seed
        counts = catalogue.train_count.double()
        weights = (counts if loss.negatives == "popularity" else (counts > 0).double()).numpy()
        self._log_probability = np.log(weights / weights.sum(), where=weights > 0, out=np.full(len(weights), -np.inf))
        cumulative = weights.cumsum() / weights.sum()
        self._cumulative = cumulative / cumulative[-1]

    def draw(self, epoch: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return catalogue indices (K,) drawn with replacement and the log probability of each."""
        if self._num == 0:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0)
        uniform = np.random.default_rng((self._seed, epoch, step, 1)).random(self._num)
        indices = np.searchsorted(self._cumulative, uniform, side="right")
        return torch.from_numpy(indices), torch.from_numpy(self._log_probability[indices]).float()
