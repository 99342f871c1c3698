"""Losses of the ranking tasks, each a sum over labels, and their weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.config.model import RankerConfig
from recsys.schema import Task


class TaskLosses(nn.Module):
    """Scores and labels -> each task's loss. Shapes: N targets, T tasks.

    BCE for binary tasks, squared error for regression. With `imbalance = weight` a positive weighs 1 / `negative_rates` (T,).

    With `weighting = uncertainty` (Kendall et al. 2018) a task has a learned log variance s, and each of its labels gives
    exp(-s) loss + s / 2, of regression exp(-s) loss / 2 + s / 2. The s / 2 are given per label, so the sums may be taken over any share
    of the labels and divided by their global number: together they are the formula. What is reported can be negative.
    """

    def __init__(self, config: RankerConfig, tasks: Sequence[Task], negative_rates: Tensor) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        is_weighed = config.imbalance == "weight"
        self.register_buffer("positive_weights", 1 / negative_rates if is_weighed else torch.ones(len(tasks)), persistent=False)
        is_learned = config.weighting == "uncertainty" and len(tasks) > 0
        self.log_variances = nn.Parameter(torch.zeros(len(tasks))) if is_learned else None

    def forward(self, scores: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Sum each task's loss over the labels where mask is 1; all (N, T)."""
        losses = {}
        for column, task in enumerate(self.tasks):
            score, label = scores[:, column].float(), labels[:, column]
            loss = F.mse_loss(score, label, reduction="none") if task.kind == "regression" else self._binary(score, label, column)
            if self.log_variances is not None:
                log_variance = self.log_variances[column].float()
                halved = loss / 2 if task.kind == "regression" else loss
                loss = torch.exp(-log_variance) * halved + log_variance / 2
            losses[task.name] = (loss * mask[:, column]).sum()
        return losses

    def _binary(self, score: Tensor, label: Tensor, column: int) -> Tensor:
        weight = self.get_buffer("positive_weights")[column]
        return F.binary_cross_entropy_with_logits(score, label, pos_weight=weight, reduction="none")
