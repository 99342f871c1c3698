"""Seeded draws that are the same on every machine, device and version: integer hashes, and negatives of sampled losses."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recsys.arrays import Integers
from recsys.config import Config
from recsys.config.model import ModelConfig
from recsys.data.items import ItemFeatures

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def stable_hash(numbers: Tensor, seed: int) -> Tensor:
    """Hash int64 numbers to the range 0 to 2^63 - 1, differently for each seed: splitmix64 (Steele et al. 2014)."""
    words = numbers + _signed(_STEP * (seed + 1))
    words = (words ^ _shift(words, 30)) * _signed(_FIRST)  # wraps at 64 bits
    words = (words ^ _shift(words, 27)) * _signed(_SECOND)
    return (words ^ _shift(words, 31)) & (2**63 - 1)


def sample_draws(sample_ids: Tensor, seed: int, epoch: int) -> Tensor:
    """Return a random number per sample and epoch, to be hashed further; it is the same for any number of ranks."""
    return stable_hash(stable_hash(sample_ids, seed), epoch)


@dataclass(frozen=True)
class AloneDraws:
    """Draws, for a share of the samples, the target that is also predicted from the profile alone."""

    rate: float
    seed: int

    def __call__(self, sample_ids: Integers, owners: Integers, epoch: int) -> Integers:
        """Choose among N targets, given the row of each one's sample, ascending (N,); return the positions of those chosen."""
        draws = sample_draws(torch.from_numpy(sample_ids), self.seed, epoch)
        chance, choice = (stable_hash(draws, number).numpy() for number in (4, 5))  # seeds 0 to 3 draw queries and shuffle histories
        counts = np.bincount(owners, minlength=len(sample_ids))
        chosen = np.flatnonzero((chance < self.rate * 2.0**63) & (counts > 0))
        return (np.cumsum(counts) - counts + choice % np.maximum(counts, 1))[chosen]


def _shift(words: Tensor, bits: int) -> Tensor:
    """Shift right logically: fill with zeros, also for negative numbers."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """Return the lowest 64 bits as a signed number, since tensors hold only int64."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


def negative_items(catalogue: ItemFeatures, model: ModelConfig) -> torch.Tensor:
    """Return the catalogue indices of possible negatives: items seen in training, or all items.

    An item unseen in training could only learn a low score as a negative. It is excluded if training also scores items without their id
    (`id_dropout`, or no ids). Otherwise it is included, since nothing else would keep its score low.
    """
    is_compared = catalogue.train_count > 0
    if model.use_ids and not model.id_dropout:
        is_compared = torch.arange(len(is_compared)) > 0
    return torch.nonzero(is_compared).flatten()


class NegativeSampler:
    """Draws each step's negatives, the same on every rank: uniformly from `negative_items`, or in proportion to training interactions."""

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
