"""The baseline interface, and fitting by gradient descent, with the best epoch chosen on validation targets."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from recsys.arrays import Integers, Scores
from recsys.baselines.training_data import TrainingData

MAX_VALIDATION_USERS = 1000
USERS_AT_ONCE = 128
BATCH_SIZE = 1024
MAX_EPOCH_SAMPLES = 250_000
FINAL_FRACTION = 0.1


class Baseline(ABC):
    """Scores items for users given by history and index, including users not in training. Shapes: B users, P pairs, I items.

    With `ranks = False` it only predicts tasks. Histories are of positive interactions.
    """

    ranks: ClassVar[bool] = True

    @abstractmethod
    def score(self, histories: Sequence[Integers], users: Integers) -> Scores:
        """Return the scores of all items for each user (B, I + 1); the padding score is not used."""

    def score_catalogue(self, histories: Sequence[Integers], user_indices: Sequence[int]) -> Scores:
        """Return the scores of all items for each user (B, I + 1), -inf for padding; histories are catalogue indices, oldest first."""
        scores = np.array(self.score(histories, np.asarray(user_indices, np.int64)), np.float32)
        scores[:, 0] = -np.inf
        return scores

    def score_tasks(self, user_indices: Sequence[int], items: Integers, histories: Sequence[Integers]) -> dict[str, Scores] | None:
        """Predict tasks for P pairs: probabilities, or values in their original units; None if the baseline predicts no task."""
        return None


class ValidationRanking:
    """Measures how well a baseline ranks the validation targets of some users, to choose between settings or epochs."""

    def __init__(self, data: TrainingData) -> None:
        users = np.random.default_rng(0).permutation(np.flatnonzero(data.validation.lengths))[:MAX_VALIDATION_USERS]
        histories, held_out = data.train[users].split("items"), data.validation[users].split("items")
        targets = [np.setdiff1d(items, history) for items, history in zip(held_out, histories, strict=True)]
        self._users = [user for user in zip(users.tolist(), histories, targets, strict=True) if len(user[2])]

    def __call__(self, baseline: Baseline) -> float:
        """Return the mean reciprocal rank of the unseen targets; ties rank the target last."""
        reciprocals = [np.zeros(0)]
        for begin in range(0, len(self._users), USERS_AT_ONCE):
            users, histories, targets = zip(*self._users[begin : begin + USERS_AT_ONCE], strict=True)
            for row, history, new in zip(baseline.score_catalogue(histories, users), histories, targets, strict=True):
                row[history] = -np.inf
                reciprocals.append(1 / (row >= row[new][:, None]).sum(1))
        return float(np.concatenate(reciprocals).mean()) if self._users else 0.0


def fit(
    module: nn.Module,
    num_samples: int,
    loss: Callable[[Tensor], Tensor],
    quality: Callable[[], float],
    epochs: int,
    learning_rate: float,
) -> None:
    """Fit with Adam and a linearly decaying learning rate; `loss` returns the mean loss of samples, given their indices.

    An epoch is a random permutation of the samples, at most `MAX_EPOCH_SAMPLES` of them.
    """
    optimizer = torch.optim.Adam(module.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, FINAL_FRACTION, epochs)

    def train(epoch: int) -> None:
        for samples in torch.randperm(num_samples)[:MAX_EPOCH_SAMPLES].split(BATCH_SIZE):
            optimizer.zero_grad()
            loss(samples).backward()
            optimizer.step()
        schedule.step()

    keep_best_epoch(module, epochs, train, quality)


def keep_best_epoch(module: nn.Module, epochs: int, train: Callable[[int], None], quality: Callable[[], float]) -> None:
    """Train for all epochs, then load the weights of the best epoch (the last one on ties)."""
    best, weights = -np.inf, module.state_dict()
    for epoch in range(epochs):
        module.train()
        train(epoch)
        module.eval()
        if (now := quality()) >= best:
            best, weights = now, {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(weights)
