"""Draws the negatives of sampled losses; which samples a step has is the plan's."""

import numpy as np
import torch

from recsys.config import Config
from recsys.data.item_features import ItemFeatures
from recsys.model_config import ModelConfig


def negative_items(catalogue: ItemFeatures, model: ModelConfig) -> torch.Tensor:
    """List the items that a target is compared with, by catalogue index: those that training saw, or every one.

    To be scored low is all that an item which training never saw could learn as a negative. So it is none where training teaches what
    text and features are worth alone; where it does not, nothing else would keep the score of such an item down.
    """
    is_compared = catalogue.train_count > 0
    if not model.scores_unseen_items:
        is_compared = torch.arange(len(is_compared)) > 0
    return torch.nonzero(is_compared).flatten()


class NegativeSampler:
    """Draws each step's negatives, the same on every rank: uniformly from `negative_items`, or as often as training saw them."""

    def __init__(self, catalogue: ItemFeatures, config: Config) -> None:
        loss = config.model.loss
        self._num = loss.num_negatives if loss.draws_negatives else 0
        self._seed = config.training.seed
        weights = catalogue.train_count.double().numpy()
        if loss.negatives != "popularity":
            weights = np.zeros_like(weights)
            weights[negative_items(catalogue, config.model).numpy()] = 1
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
