"""BPR, matrix factorization and the factorization machine, which with ids alone equals each of the others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.arrays import Integers, Scores
from recsys.baselines.baseline import Baseline
from recsys.baselines.factorization_machine import FactorisationMachine
from recsys.baselines.fitting import UnseenItems, ValidationRanking, fit
from recsys.baselines.interactions import TrainingData, labelled
from recsys.baselines.least_squares import fit_implicit
from recsys.config import Config
from recsys.schema import Task

VALUE_PENALTY = 0.1
BINARY_PENALTY = 0.03
RANKING_PENALTY = 0.003
"""How much the squared vectors of each sample weigh, by what is fitted."""
TASK_RATE = 0.005
RANKING_RATE = 0.01
"""Learning rates; with the penalties they were found on the validation targets of MovieLens 100K."""


@dataclass(frozen=True)
class MachineRanking(Baseline):
    """Ranks by a machine's score; what the user's features alone add to it changes no order and is left out."""

    machine: FactorisationMachine

    @torch.no_grad()
    def score(self, histories: Sequence[Integers], users: Integers) -> Scores:
        """Score every item for each user."""
        machine = self.machine
        user, _, _ = machine.side(machine.user_features[machine.rows(users)])
        item, alone, _ = machine.side(machine.item_features)
        scores: Scores = (user @ item.T + alone).numpy()
        return scores


@dataclass(frozen=True)
class TaskMachine:
    """A machine that predicts one task: a probability, or a value that is within the training data's."""

    machine: FactorisationMachine
    task: Task
    mean: float
    std: float
    low: float
    high: float

    @torch.no_grad()
    def predict(self, users: Integers, items: Integers) -> Scores:
        """Predict the task for pairs."""
        raw, _ = self.machine(self.machine.rows(users), torch.from_numpy(items))
        answers = raw.sigmoid() if self.task.kind == "binary" else raw.clamp(self.low, self.high) * self.std + self.mean
        predictions: Scores = answers.numpy()
        return predictions


@dataclass(frozen=True)
class Factorisation(Baseline):
    """Ranks by one model, and predicts each task of the data by one of its own."""

    ranking: Baseline
    tasks: dict[str, TaskMachine]

    def score(self, histories: Sequence[Integers], users: Integers) -> Scores:
        """Score every item for each user."""
        return self.ranking.score(histories, users)

    def score_tasks(self, user_indices: Sequence[int], items: Integers, histories: Sequence[Integers]) -> dict[str, Scores] | None:
        """Predict every task of the data."""
        users, pairs = np.asarray(user_indices, np.int64), np.asarray(items, np.int64)
        return {name: task.predict(users, pairs) for name, task in self.tasks.items()} or None


def fit_bpr(data: TrainingData, config: Config) -> Baseline:
    """Fit vectors of ids by BPR."""
    return fit_pairwise(FactorisationMachine.of_ids(data, config.model.width), data, config)


def fit_matrix_factorisation(data: TrainingData, config: Config) -> Baseline:
    """Fit biases and vectors of ids to each task; rank by the factorisation of what was taken at all."""
    return Factorisation(fit_implicit(data, config), _fit_tasks(FactorisationMachine.of_ids, data, config))


def fit_factorisation_machine(data: TrainingData, config: Config) -> Baseline:
    """Fit machines over ids, attributes and categories to each task, and one by BPR to rank."""
    ranking = fit_pairwise(FactorisationMachine.of_features(data, config.model.width), data, config)
    return Factorisation(ranking, _fit_tasks(FactorisationMachine.of_features, data, config))


def bpr_loss(machine: FactorisationMachine, users: Tensor, taken: Tensor, others: Tensor) -> Tensor:
    """Return -log sigmoid(score of the item taken - score of another) (N,), with penalties (Rendle et al. 2009)."""
    high, penalty = machine(users, taken, RANKING_PENALTY)
    low, other_penalty = machine(users, others, RANKING_PENALTY)
    return -F.logsigmoid(high - low) + penalty + other_penalty


def fit_pairwise(machine: FactorisationMachine, data: TrainingData, config: Config) -> MachineRanking:
    """Fit a machine by BPR; the validation targets choose the epoch."""
    users, items = torch.from_numpy(data.train.owners), torch.from_numpy(data.train.items)
    unseen, quality = UnseenItems(data), ValidationRanking(data)
    ranking = MachineRanking(machine)

    def loss(samples: Tensor) -> Tensor:
        chosen = users[samples]
        return bpr_loss(machine, chosen + 1, items[samples], unseen.draw(chosen)).mean()

    fit(machine, len(users), loss, lambda: quality(ranking), config.evaluation.baseline_epochs, RANKING_RATE)
    return ranking


def fit_task(machine: FactorisationMachine, data: TrainingData, column: int, epochs: int) -> TaskMachine:
    """Fit a machine to a task, by squared error or cross-entropy; that of the validation labels chooses the epoch."""
    manifest, task = data.manifest, data.manifest.tasks[column]
    criterion = F.binary_cross_entropy_with_logits if task.kind == "binary" else F.mse_loss
    penalty = BINARY_PENALTY if task.kind == "binary" else VALUE_PENALTY
    users, items, labels = labelled(data.train, manifest, column)
    other_users, other_items, other_labels = labelled(data.validation, manifest, column)

    def loss(samples: Tensor) -> Tensor:
        scores, penalties = machine(users[samples] + 1, items[samples], penalty)
        return criterion(scores, labels[samples]) + penalties.mean()

    @torch.no_grad()
    def quality() -> float:
        return -float(criterion(machine(other_users + 1, other_items)[0], other_labels)) if len(other_labels) else 0.0

    fit(machine, len(labels), loss, quality, epochs, TASK_RATE)
    return TaskMachine(machine, task, manifest.value_mean, manifest.value_std, float(labels.min()), float(labels.max()))


def _fit_tasks(build: Callable[[TrainingData, int], FactorisationMachine], data: TrainingData, config: Config) -> dict[str, TaskMachine]:
    epochs, width = config.evaluation.baseline_epochs, config.model.width
    return {task.name: fit_task(build(data, width), data, column, epochs) for column, task in enumerate(data.manifest.tasks)}
