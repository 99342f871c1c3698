"""Click models over embedded features: the deep interest network and the deep and cross network. They predict tasks and rank nothing.

Shapes: N pairs, L history length, F features, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.arrays import Integers, Scores
from recsys.baselines.baseline import Baseline, fit
from recsys.baselines.factorization import FactorizationMachine
from recsys.baselines.training_data import HISTORY_LENGTH, Pairs, TrainingData, known_rows, task_pairs
from recsys.config import Config

WIDTH = 16
HIDDEN = (80, 40)
NUM_CROSSES = 2
DROPOUT = 0.2
LEARNING_RATE = 0.001
PREDICT_PAIRS = 8192


class ClickModel(nn.Module):
    """Embeds the features of user and item (ids, attributes, categories), each side summed; subclasses score them."""

    user_features: Tensor  # (U + 1, F)
    item_features: Tensor  # (I + 1, F)

    def __init__(self, data: TrainingData, num_inputs: int) -> None:
        super().__init__()
        machine = FactorizationMachine.of_features(data, WIDTH)
        self.register_buffer("user_features", machine.user_features, persistent=False)
        self.register_buffer("item_features", machine.item_features, persistent=False)
        self.table = nn.Embedding(machine.table.num_embeddings, WIDTH, padding_idx=0)
        nn.init.normal_(self.table.weight, std=0.05)
        with torch.no_grad():
            self.table.weight[0] = 0
        sizes = (num_inputs, *HIDDEN)
        layers = [part for ins, outs in zip(sizes, sizes[1:]) for part in (nn.Linear(ins, outs), nn.PReLU(), nn.Dropout(DROPOUT))]  # noqa: B905, RUF007
        self.hidden = nn.Sequential(*layers)
        self.out = nn.Linear(HIDDEN[-1], 1)

    def sides(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors of users and items (N, W)."""
        return self.table(self.user_features[users]).sum(1), self.table(self.item_features[items]).sum(1)


class DeepInterest(ClickModel):
    """The candidate attends over the history: weights from a network of [h, v, h - v, h * v], not normalized (Zhou et al. 2018)."""

    def __init__(self, data: TrainingData) -> None:
        super().__init__(data, 4 * WIDTH)
        self.attention = nn.Sequential(nn.Linear(4 * WIDTH, 36), nn.PReLU(), nn.Linear(36, 1))

    def forward(self, users: Tensor, items: Tensor, histories: Tensor) -> Tensor:
        """Return the logits of pairs (N,) for histories (N, L)."""
        user, item = self.sides(users, items)
        past = self.table(self.item_features[histories]).sum(2)  # (N, L, W)
        candidate = item.unsqueeze(1).expand_as(past)
        weights = self.attention(torch.cat([past, candidate, past - candidate, past * candidate], -1)).squeeze(-1)
        interest = ((weights * (histories > 0)).unsqueeze(-1) * past).sum(1) / HISTORY_LENGTH**0.5
        scores: Tensor = self.out(self.hidden(torch.cat([user, item, interest, interest * item], 1))).squeeze(1)
        return scores


class DeepCross(ClickModel):
    """Crosses x' = x0 * (A x + b) + x beside a network (Wang et al. 2021, DCN-V2, parallel)."""

    def __init__(self, data: TrainingData) -> None:
        super().__init__(data, 3 * WIDTH)
        self.crosses = nn.ModuleList(nn.Linear(3 * WIDTH, 3 * WIDTH) for _ in range(NUM_CROSSES))
        self.out = nn.Linear(3 * WIDTH + HIDDEN[-1], 1)

    def forward(self, users: Tensor, items: Tensor, histories: Tensor) -> Tensor:
        """Return the logits of pairs (N,) for histories (N, L), whose mean is an input."""
        user, item = self.sides(users, items)
        past = self.table(self.item_features[histories]).sum(2).sum(1) / (histories > 0).sum(1, keepdim=True).clamp(min=1)
        first = torch.cat([user, item, past], 1)
        crossed = first
        for cross in self.crosses:
            crossed = first * cross(crossed) + crossed
        scores: Tensor = self.out(torch.cat([crossed, self.hidden(first)], 1)).squeeze(1)
        return scores


@dataclass(frozen=True)
class ClickBaseline(Baseline):
    """Predicts each binary task with a model of its own."""

    models: dict[str, ClickModel]
    ranks = False

    def score(self, histories: Sequence[Integers], users: Integers) -> Scores:
        """Rank nothing."""
        raise NotImplementedError("click models predict tasks only")

    @torch.no_grad()
    def score_tasks(self, user_indices: Sequence[int], items: Integers, histories: Sequence[Integers]) -> dict[str, Scores] | None:
        """Predict the probability of every binary task."""
        recent = np.zeros((len(items), HISTORY_LENGTH), np.int64)
        for row, history in zip(recent, histories, strict=True):
            if len(history):
                row[-min(len(history), HISTORY_LENGTH) :] = history[-HISTORY_LENGTH:]
        users, pairs = np.asarray(user_indices, np.int64), torch.from_numpy(np.asarray(items, np.int64))
        answers = {}
        for name, model in self.models.items():
            rows = known_rows(users, model.user_features)
            parts = zip(*(part.split(PREDICT_PAIRS) for part in (rows, pairs, torch.from_numpy(recent))), strict=True)
            answers[name] = np.concatenate([np.zeros(0, np.float32), *(model(*part).sigmoid().numpy() for part in parts)])
        return answers or None


def fit_din(data: TrainingData, config: Config) -> Baseline:
    """Fit a deep interest network for each binary task."""
    return _fit(DeepInterest, data, config)


def fit_dcn(data: TrainingData, config: Config) -> Baseline:
    """Fit a deep and cross network for each binary task."""
    return _fit(DeepCross, data, config)


def _fit(kind: type[DeepInterest] | type[DeepCross], data: TrainingData, config: Config) -> Baseline:
    tasks = data.dataset.manifest.tasks
    models = {task.name: _fit_task(kind(data), data, column, config) for column, task in enumerate(tasks) if task.kind == "binary"}
    return ClickBaseline(models)


def _fit_task(model: ClickModel, data: TrainingData, column: int, config: Config) -> ClickModel:
    """Fit by cross-entropy; the loss on the validation labels chooses the epoch."""
    train, validation = (_tensors(task_pairs(data, column, part)) for part in ("train", "validation"))

    def loss_of(parts: tuple[Tensor, ...]) -> Tensor:
        users, items, histories, labels = parts
        return F.binary_cross_entropy_with_logits(model(users + 1, items, histories.long()), labels)

    @torch.no_grad()
    def quality() -> float:
        parts = list(zip(*(column.split(PREDICT_PAIRS) for column in validation), strict=True))
        return -sum(float(loss_of(part)) * len(part[0]) for part in parts) / max(1, len(validation[0]))

    def loss(rows: Tensor) -> Tensor:
        return loss_of(tuple(part[rows] for part in train))

    fit(model, len(train[0]), loss, quality, config.evaluation.baseline_epochs, LEARNING_RATE)
    return model.eval()


def _tensors(pairs: Pairs) -> tuple[Tensor, ...]:
    return tuple(map(torch.from_numpy, (pairs.users, pairs.items, pairs.histories, pairs.labels)))
