"""Scores a (user, item) pair for each task: like, rating, click, purchase, as the data has them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Ranker(nn.Module):
    """A shared trunk over user, item and their product, and one output per task. Shapes: N pairs, W width, T tasks."""

    def __init__(self, width: int, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.trunk = nn.Linear(3 * width, width)
        self.heads = nn.Linear(width, max(1, num_tasks))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Score pairs, (..., W) each; return (..., T): logits for binary tasks, standardised values for regression."""
        scores: Tensor = self.heads(F.silu(self.trunk(torch.cat([users, items, users * items], -1))))
        return scores[..., : self.num_tasks]
