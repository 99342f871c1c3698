"""BPR, matrix factorization and the factorization machine; with only ids, the machine is the same model as the other two.

Shapes: N pairs, U users, I items, F features of one side, W width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor, nn

from recsys.arrays import Integers, Scores
from recsys.baselines.baseline import Baseline, ValidationRanking, fit
from recsys.baselines.training_data import TrainingData, UnseenItems, history_matrix, known_rows, task_pairs
from recsys.config import Config
from recsys.model.retrieval import RetrievalScores

VALUE_PENALTY = 0.1
BINARY_PENALTY = 0.03
RANKING_PENALTY = 0.003
"""Weights of the squared vectors of each sample, by what is fitted: values, binary tasks or rankings."""
BIAS_PENALTY = 0.001
TASK_RATE = 0.005
RANKING_RATE = 0.01
"""Learning rates. They and the penalties were tuned on the validation targets of MovieLens 100K."""
NUM_SWEEPS = 10
SETTINGS = ((10.0, 0.01), (3.0, 0.01), (1.0, 0.03))
"""Candidate settings: (total weight of all items as not taken, relative to the items taken; penalty)."""

PredictTask = Callable[[Integers, Integers], Scores]
"""Users and items of pairs (N,) -> probabilities, or values in their original units, (N,)."""


class FactorizationMachine(nn.Module, Baseline):
    """The sum of the biases of binary features and of all pairwise products of their vectors (Rendle 2010).

    By Rendle's identity the sum over pairs is (|sum v|^2 - sum |v|^2) / 2, which costs O(W F). It is computed for user and item separately:
    only the product of the two sums needs both, so one matrix product ranks a catalogue. Row 0 of users is a user not in training.
    """

    user_features: Tensor  # (U + 1, F) rows of the table, 0 if there is none
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
    def of_ids(cls, data: TrainingData, width: int) -> "FactorizationMachine":
        """Build a machine over ids only; users and items without training interactions have no feature."""
        return cls(*_id_features(data), width)

    @classmethod
    def of_features(cls, data: TrainingData, width: int) -> "FactorizationMachine":
        """Build a machine over ids, user attributes and item categories."""
        users, items = _id_features(data)
        attributes, categories = F.pad(torch.from_numpy(data.attributes), (0, 0, 1, 0)), data.catalogue.categories.long()
        first_attribute = data.num_users + data.num_items
        first_category = first_attribute + data.num_attribute_values
        attributes = torch.where(attributes > 0, attributes + first_attribute, 0)
        categories = torch.where(categories > 0, categories + first_category, 0)
        return cls(torch.cat([users, attributes], 1), torch.cat([items, categories], 1), width)

    def forward(self, users: Tensor, items: Tensor, penalty: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the scores of pairs and their penalties, (N,) each."""
        user, user_alone, user_penalty = self.side(self.user_features[users], penalty)
        item, item_alone, item_penalty = self.side(self.item_features[items], penalty)
        return (user * item).sum(1) + user_alone + item_alone + self.bias, user_penalty + item_penalty

    def side(self, features: Tensor, penalty: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Return, for features (N, F), the sum of their vectors (N, W), their score without the other side (N,) and the penalty (N,)."""
        rows = self.table(features)
        vectors, biases = rows[..., :-1], rows[..., -1]
        total, squares = vectors.sum(1), vectors.square().sum((1, 2))
        alone = biases.sum(1) + (total.square().sum(1) - squares) / 2
        return total, alone, penalty * squares + BIAS_PENALTY * biases.square().sum(1)

    @torch.no_grad()
    def score(self, histories: Sequence[Integers], users: Integers) -> Scores:
        """Score every item for each user, without the user-only terms, which do not change the order."""
        user, _, _ = self.side(self.user_features[known_rows(users, self.user_features)])
        item, alone, _ = self.side(self.item_features)
        scores: Scores = (user @ item.T + alone).numpy()
        return scores


def _id_features(data: TrainingData) -> tuple[Tensor, Tensor]:
    """Return the feature rows of users (U + 1, 1) and of items (I + 1, 1), 0 without training interactions or exposures."""
    knows_user, knows_item = data.known
    users = np.where(np.append(False, knows_user), np.arange(data.num_users + 1), 0)
    items = np.where(knows_item, data.num_users + np.arange(data.num_items + 1), 0)
    return torch.from_numpy(users)[:, None], torch.from_numpy(items)[:, None]


@dataclass(frozen=True)
class Factorization(Baseline):
    """Ranks with one model, and predicts each task with another."""

    ranking: Baseline
    tasks: dict[str, PredictTask]

    def score(self, histories: Sequence[Integers], users: Integers) -> Scores:
        """Score every item for each user."""
        return self.ranking.score(histories, users)

    def score_tasks(self, user_indices: Sequence[int], items: Integers, histories: Sequence[Integers]) -> dict[str, Scores] | None:
        """Predict every task of the data."""
        users, pairs = np.asarray(user_indices, np.int64), np.asarray(items, np.int64)
        return {name: predict(users, pairs) for name, predict in self.tasks.items()} or None


def fit_bpr(data: TrainingData, config: Config) -> Baseline:
    """Fit id vectors by BPR."""
    return fit_pairwise(FactorizationMachine.of_ids(data, config.model.width), data, config)


def fit_matrix_factorization(data: TrainingData, config: Config) -> Baseline:
    """Fit id biases and vectors to each task; rank by the factorization of the binary interaction matrix."""
    return Factorization(fit_implicit(data, config), _fit_tasks(FactorizationMachine.of_ids, data, config))


def fit_factorization_machine(data: TrainingData, config: Config) -> Baseline:
    """Fit machines over ids, attributes and categories: one for each task, and one by BPR for ranking."""
    ranking = fit_pairwise(FactorizationMachine.of_features(data, config.model.width), data, config)
    return Factorization(ranking, _fit_tasks(FactorizationMachine.of_features, data, config))


def bpr_loss(machine: FactorizationMachine, users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Return -log sigmoid(score of the positive - score of the negative) (N,), with penalties (Rendle et al. 2009)."""
    high, penalty = machine(users, positives, RANKING_PENALTY)
    low, other_penalty = machine(users, negatives, RANKING_PENALTY)
    return -F.logsigmoid(high - low) + penalty + other_penalty


def fit_pairwise(machine: FactorizationMachine, data: TrainingData, config: Config) -> FactorizationMachine:
    """Fit a machine by BPR; the validation targets choose the epoch."""
    users, items = torch.from_numpy(data.train.owners), torch.from_numpy(data.train.items)
    unseen, quality = UnseenItems(data), ValidationRanking(data)

    def loss(samples: Tensor) -> Tensor:
        chosen = users[samples]
        return bpr_loss(machine, chosen + 1, items[samples], unseen.draw(chosen)).mean()

    fit(machine, len(users), loss, lambda: quality(machine), config.evaluation.baseline_epochs, RANKING_RATE)
    return machine


def _fit_tasks(build: Callable[[TrainingData, int], FactorizationMachine], data: TrainingData, config: Config) -> dict[str, PredictTask]:
    tasks = data.dataset.manifest.tasks
    return {task.name: _fit_task(build(data, config.model.width), data, column, config) for column, task in enumerate(tasks)}


def _fit_task(machine: FactorizationMachine, data: TrainingData, column: int, config: Config) -> PredictTask:
    """Fit a machine to a task, by squared error or cross-entropy; the loss on the validation labels chooses the epoch."""
    manifest = data.dataset.manifest
    is_binary = manifest.tasks[column].kind == "binary"
    criterion, penalty = (F.binary_cross_entropy_with_logits, BINARY_PENALTY) if is_binary else (F.mse_loss, VALUE_PENALTY)
    train, other = task_pairs(data, column, "train"), task_pairs(data, column, "validation")
    users, items, labels = map(torch.from_numpy, (train.users, train.items, train.labels))
    other_users, other_items, other_labels = map(torch.from_numpy, (other.users, other.items, other.labels))

    def loss(samples: Tensor) -> Tensor:
        scores, penalties = machine(users[samples] + 1, items[samples], penalty)
        return criterion(scores, labels[samples]) + penalties.mean()

    @torch.no_grad()
    def quality() -> float:
        return -float(criterion(machine(other_users + 1, other_items)[0], other_labels)) if len(other_labels) else 0.0

    fit(machine, len(labels), loss, quality, config.evaluation.baseline_epochs, TASK_RATE)
    low, high = float(labels.min()), float(labels.max())

    @torch.no_grad()
    def predict(users: Integers, items: Integers) -> Scores:
        raw, _ = machine(known_rows(users, machine.user_features), torch.from_numpy(items))
        answers = raw.sigmoid() if is_binary else raw.clamp(low, high) * manifest.value_std + manifest.value_mean
        predictions: Scores = answers.numpy()
        return predictions

    return predict


@dataclass(frozen=True)
class ImplicitFactors(Baseline):
    """Ranks by item vectors and the user vector that fits the history best."""

    items: NDArray[np.float32]  # (I + 1, W)
    weight: float
    penalty: float

    def score(self, histories: Sequence[Integers], users: Integers) -> Scores:
        """Score every item with the user vectors that solve the least squares for the histories."""
        vectors = solve(history_matrix(histories, len(self.items) - 1), self.items, self.weight, self.penalty)
        scores: Scores = RetrievalScores(torch.from_numpy(self.items))(torch.from_numpy(vectors)).numpy()
        return scores


def fit_implicit(data: TrainingData, config: Config) -> Baseline:
    """Fit by alternating least squares (Hu, Koren, Volinsky 2008) with each of `SETTINGS`; choose by the validation targets."""
    density = data.matrix.nnz / (data.num_users * data.num_items)
    fitted = (_alternate(data.matrix, config, share * density, penalty) for share, penalty in SETTINGS)
    return max(fitted, key=ValidationRanking(data))


def _alternate(matrix: csr_array, config: Config, weight: float, penalty: float) -> ImplicitFactors:
    """Run alternating least squares from small random item vectors."""
    by_item, width = matrix.T.tocsr(), config.model.width
    items = np.random.default_rng(config.training.seed).normal(0, 0.1 * width**-0.5, (matrix.shape[1], width)).astype(np.float32)
    for _ in range(NUM_SWEEPS):
        users = solve(matrix, items, weight, penalty)
        items = solve(by_item, users, weight, penalty)
    return ImplicitFactors(items, weight, penalty)


def solve(matrix: csr_array, others: NDArray[np.float32], weight: float, penalty: float) -> NDArray[np.float32]:
    """Return the row vectors p that minimize their part of the loss given the column vectors q.

    sum over taken (p.q - 1)^2 + weight * sum over all (p.q)^2 + penalty * (number taken + weight * columns) * |p|^2, the penalty
    scaled as in Rendle, Krichene, Zhang, Koren 2022.
    """
    width = others.shape[1]
    everything = weight * others.T @ others
    rows = np.zeros((matrix.shape[0], width), np.float32)
    for row in np.flatnonzero(np.diff(matrix.indptr)):
        taken = others[matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]]]
        ridge = penalty * (len(taken) + weight * len(others))
        rows[row] = np.linalg.solve(everything + taken.T @ taken + ridge * np.eye(width, dtype=np.float32), taken.sum(0))
    return rows
