"""The losses, each a sum over valid targets; dividing by their global number is the training loop's part."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.schema import Task


def full_softmax(users: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross-entropy over the whole catalogue.

    Shapes: users (N, W), items (D, W) with padding first, targets (N,) positions in items.
    """
    logits = (users @ items.T).float()
    return F.cross_entropy(_without_padding(logits), targets, reduction="sum")


def sampled_softmax(users: Tensor, items: Tensor, targets: Tensor, negatives: Tensor, log_q: Tensor) -> Tensor:
    """Sum the cross-entropy with the other items' part of the partition function estimated from K draws.

    Each draw j stands for 1 / (K q_j) items, so the estimate of the partition function is unbiased (Bengio and
    Senecal 2008); a draw that is the target itself is left out. Shapes: users (N, W), items (D, W), targets (N,),
    negatives (K,), log_q (K,).
    """
    positive = (users * items[targets]).sum(-1, keepdim=True).float()  # (N, 1)
    sampled = (users @ items[negatives].T).float()  # (N, K)
    corrected = sampled - log_q - torch.log(torch.tensor(float(len(negatives)), device=users.device))
    corrected = corrected.masked_fill(negatives == targets.unsqueeze(1), -torch.inf)
    return (torch.cat([positive, corrected], 1).logsumexp(1) - positive.squeeze(1)).sum()


def task_losses(tasks: tuple[Task, ...], scores: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Sum each task's loss over its labels: BCE for binary tasks, squared error for regression. All (N, T)."""
    losses = {}
    for index, task in enumerate(tasks):
        score, label = scores[:, index].float(), labels[:, index]
        loss = (
            F.mse_loss(score, label, reduction="none")
            if task.kind == "regression"
            else F.binary_cross_entropy_with_logits(score, label, reduction="none")
        )
        losses[task.name] = (loss * mask[:, index]).sum()
    return losses


def _without_padding(logits: Tensor) -> Tensor:
    """Give the padding item, position 0, no probability."""
    is_padding = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    is_padding[0] = True
    return logits.masked_fill(is_padding, -torch.inf)
