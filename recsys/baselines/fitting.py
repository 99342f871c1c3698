"""Fitting baselines: mini-batches of gradient steps, and choices by validation targets."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from recsys.baselines.baseline import Baseline
from recsys.baselines.interactions import TrainingData

MAX_VALIDATION_USERS = 1000
USERS_AT_ONCE = 128
BATCH_SIZE = 1024
MAX_EPOCH_SAMPLES = 250_000
FINAL_FRACTION = 0.1


class ValidationRanking:
    """Measures how well a baseline ranks the validation targets of some users, to choose between settings or epochs."""

    def __init__(self, data: TrainingData) -> None:
        users = np.random.default_rng(0).permutation(np.flatnonzero(data.validation.lengths))[:MAX_VALIDATION_USERS]
        histories, held_out = data.train[users].split("items"), data.validation[users].split("items")
        targets = [np.setdiff1d(items, history) for items, history in zip(held_out, histories, strict=True)]
        self._users = [user for user in zip(users.tolist(), histories, targets, strict=True) if len(user[2])]

    def __call__(self, baseline: Baseline) -> float:
        """Return the mean reciprocal rank of the targets not seen before; of equal scores the target comes last."""
        reciprocals = [np.zeros(0)]
        for begin in range(0, len(self._users), USERS_AT_ONCE):
            users, histories, targets = zip(*self._users[begin : begin + USERS_AT_ONCE], strict=True)
            for row, history, new in zip(baseline.score_catalogue(histories, users), histories, targets, strict=True):
                row[history] = -np.inf
                reciprocals.append(1 / (row >= row[new][:, None]).sum(1))
        return float(np.concatenate(reciprocals).mean()) if self._users else 0.0


def choose(candidates: Iterable[Baseline], quality: Callable[[Baseline], float]) -> Baseline:
    """Return the best, of equals the first."""
    return max(candidates, key=quality)


def keep_best_epoch(module: nn.Module, epochs: int, train: Callable[[int], None], quality: Callable[[], float]) -> None:
    """Train for all epochs and leave the module with the weights of the best, of equals the last."""
    best, weights = -np.inf, module.state_dict()
    for epoch in range(epochs):
        module.train()
        train(epoch)
        module.eval()
        if (now := quality()) >= best:
            best, weights = now, {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(weights)


def fit(
    module: nn.Module,
    num_samples: int,
    loss: Callable[[Tensor], Tensor],
    quality: Callable[[], float],
    epochs: int,
    learning_rate: float,
) -> None:
    """Fit by Adam, its rate falling from epoch to epoch; `loss` gives the mean loss of the samples whose numbers it gets.

    An epoch is all samples, shuffled, or as many of them as `MAX_EPOCH_SAMPLES`.
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


class UnseenItems:
    """Draws items that occur in training and that a user does not have there."""

    def __init__(self, data: TrainingData) -> None:
        self._items = torch.from_numpy(np.flatnonzero(data.item_counts))
        self._num_rows = data.num_items + 1
        self._taken = torch.from_numpy(np.unique(data.train.owners * self._num_rows + data.train.items))

    def draw(self, users: Tensor) -> Tensor:
        """Draw an item for each user, uniformly; a user who has nearly all items may be given one of them."""
        items = self._items[torch.randint(len(self._items), users.shape)]
        for _ in range(8):
            pairs = users * self._num_rows + items
            is_taken = self._taken[torch.searchsorted(self._taken, pairs).clamp(max=len(self._taken) - 1)] == pairs
            if not is_taken.any():
                break
            items[is_taken] = self._items[torch.randint(len(self._items), (int(is_taken.sum()),))]
        return items
