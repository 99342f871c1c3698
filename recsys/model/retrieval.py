"""Retrieval: scores of items for users, training losses, and a fairness bound that weights targets by user group.

Losses are sums over targets; the training loop divides by their global number. Shapes: N targets, W width, K candidates or negatives.
Scores are dot products, computed in chunks of at most `chunk_bytes`. Each loss takes target weights (N,) and returns the weighted sum,
and the unweighted loss of each target (N,) without a gradient.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from recsys.config.training import FairnessConfig
from recsys.data.labels.training import UserGroups

Loss = tuple[Tensor, Tensor]

SCORE_BYTES = 4
CPU_CHUNK_BYTES = 4 << 20
GPU_CHUNK_BYTES = 256 << 20
"""Default chunk sizes: small enough for a CPU's cache, large enough to keep a GPU busy."""

LARGEST_DUAL_SUM = 0.9
"""Maximum sum of the dual variables, so that every target has a weight of at least 0.1."""


class RetrievalScores:
    """Scores items for users by dot product. Shapes: B users, I items, C candidates.

    An item without training interactions, text and features has a vector of zeros. Its score of 0 would beat every negative score, so
    these items get a score below all others of the user: they rank last, in the order of their index.
    """

    def __init__(self, items: Tensor) -> None:
        self.items = items  # (I + 1, W), row 0 for padding
        is_unknown = (items == 0).all(1)
        is_unknown[0] = False
        self._is_unknown = is_unknown if bool(is_unknown.any()) else None  # (I + 1,)
        self._longest = items.norm(dim=1).max()

    def __call__(self, users: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Return scores for users (B, W): (B, I + 1) for the whole catalogue, or (B, C) for candidates (C,)."""
        chosen = slice(None) if candidates is None else candidates
        scores = users @ self.items[chosen].T
        if self._is_unknown is None:
            return scores
        lowest = -users.norm(dim=1, keepdim=True) * self._longest - 1  # no dot product is below -|u| |v| (Cauchy-Schwarz)
        return torch.where(self._is_unknown[chosen], lowest, scores)


def full_softmax(users: Tensor, positives: Tensor, candidates: Tensor, weights: Tensor, chunk_bytes: int | None = None) -> Loss:
    """Return the summed cross-entropy over all candidates (K, W), which must include every positive; users and positives are (N, W)."""
    return _softmax_loss(users, positives, candidates, weights, None, _num_rows(candidates, chunk_bytes))


def sampled_softmax(
    users: Tensor,
    positives: Tensor,
    target_ids: Tensor,
    negatives: Tensor,
    negative_ids: Tensor,
    log_q: Tensor,
    weights: Tensor,
    chunk_bytes: int | None = None,
) -> Loss:
    """Return the summed cross-entropy, with the negatives' part of the partition function estimated from K draws.

    Each draw j is weighted by 1 / (K q_j), so the estimate of the partition function is unbiased (Bengio and Senecal 2008). Draws equal
    to the target are masked. With `log_q` = -log K there is no correction, which is InfoNCE (van den Oord et al. 2018).
    Shapes: users and positives (N, W), target_ids (N,), negatives (K, W), negative_ids and log_q (K,).
    """
    others = (target_ids, negative_ids, log_q + math.log(max(1, len(negatives))))
    return _softmax_loss(users, positives, negatives, weights, others, _num_rows(negatives, chunk_bytes))


def gbce(
    users: Tensor,
    positives: Tensor,
    target_ids: Tensor,
    negatives: Tensor,
    negative_ids: Tensor,
    num_items: int,
    calibration: float,
    weights: Tensor,
    chunk_bytes: int | None = None,
) -> Loss:
    """Return the summed binary cross-entropy with a calibrated positive (gBCE: Petrov and Macdonald 2023) and uniform negatives.

    With a = K / (num_items - 1), the positive's log probability is weighted by b = 1 - calibration (1 - a); each target's loss is the
    mean over its K + 1 terms. Shapes as in `sampled_softmax`.
    """
    rate = min(1.0, len(negatives) / max(1, num_items - 1))
    power = 1.0 - calibration * (1.0 - rate)

    def chunk_loss(user: Tensor, ids: Tensor, candidates: Tensor) -> Tensor:
        terms = F.softplus((user @ candidates.T).float())
        return terms.masked_fill(ids.unsqueeze(1) == negative_ids, 0.0).sum(1)

    rows = _num_rows(negatives, chunk_bytes)
    parts = zip(users.split(rows), target_ids.split(rows), strict=True)
    wrong = torch.cat([checkpoint(chunk_loss, user, ids, negatives, use_reentrant=False) for user, ids in parts])
    each = (power * F.softplus(-(users * positives).sum(-1).float()) + wrong) / (len(negatives) + 1)
    return (each * weights).sum(), each.detach()


def gather_from_ranks(rows: Tensor) -> Tensor:
    """Concatenate the rows (N, ...) of all ranks; N may differ per rank. Gradients flow back to the rank that a row came from.

    Every rank must call this. Without a process group the rows are returned unchanged.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    numbers = _stack_ranks(torch.tensor([len(rows)], device=rows.device)).flatten().tolist()
    padded = torch.cat([rows, rows.new_zeros(max(numbers) - len(rows), *rows.shape[1:])])
    return torch.cat([part[:number] for part, number in zip(_gather(padded), numbers, strict=True)])


def _stack_ranks(tensor: Tensor) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


class _Gather(torch.autograd.Function):
    """Stacks the tensors of all ranks, which must have the same shape."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _stack_ranks(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


Others = tuple[Tensor, Tensor, Tensor]


class _SoftmaxLoss(torch.autograd.Function):
    """Weighted sum of log(sum_j exp(score_nj)) - positive_n over targets, with its gradients computed in the same pass.

    Tensors saved for the backward pass are only as large as the inputs: no (N, K) tensor outlives its chunk. Without `others` the
    candidates must include the positive. With `others` (target ids, candidate ids, correction to subtract from each candidate's score)
    the positive is added to the sum, and candidates equal to the target are masked.
    """

    @staticmethod
    def forward(
        ctx: Any, users: Tensor, positives: Tensor, candidates: Tensor, weights: Tensor, others: Others | None, num_rows: int
    ) -> Loss:
        positive = (users * positives).sum(-1).float()  # (N,)
        each = torch.empty_like(positive)
        own = torch.full_like(positive, -1.0)  # gradient with respect to the positive's score
        grad_users, grad_candidates = torch.empty_like(users), torch.zeros_like(candidates)
        for begin in range(0, len(users), num_rows):
            rows = slice(begin, begin + num_rows)
            scores = (users[rows] @ candidates.T).float()  # (rows, K)
            if others is not None:
                target_ids, candidate_ids, correction = others
                scores = scores.sub_(correction).masked_fill_(target_ids[rows, None] == candidate_ids, -torch.inf)
            highest = scores.amax(1) if others is None else torch.maximum(scores.amax(1), positive[rows])
            shares = scores.sub_(highest[:, None]).exp_()
            total = shares.sum(1)
            if others is not None:
                extra = (positive[rows] - highest).exp()
                total += extra
                own[rows] += extra / total
            each[rows] = total.log() + highest - positive[rows]
            shares, scale = shares.to(users.dtype), (weights[rows] / total).to(users.dtype)[:, None]
            grad_users[rows] = (shares @ candidates) * scale
            grad_candidates.addmm_(shares.T, users[rows] * scale)
        own_share = (own * weights).to(users.dtype)[:, None]
        ctx.save_for_backward(grad_users.addcmul_(own_share, positives), own_share * users, grad_candidates)
        ctx.mark_non_differentiable(each)
        return (each * weights).sum(), each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *(saved * gradient.to(saved.dtype) for saved in ctx.saved_tensors), None, None, None


_gather: Callable[[Tensor], Tensor] = _Gather.apply
_softmax_loss: Callable[..., Loss] = _SoftmaxLoss.apply


class GroupBound(nn.Module):
    """Weights targets for the Lagrangian of `min loss` subject to `loss of group g - loss of all <= some bound` for every group g.

    Its gradient weights a target of group g by 1 + dual_g / share_g - sum of all duals. The duals are updated from the validation
    metric, because training losses may overfit (two datasets, and a loss as the proxy of a metric without a gradient: Cotter et al.
    2019). Shape G: groups.
    """

    duals: Tensor
    shares: Tensor

    def __init__(self, config: FairnessConfig, groups: UserGroups) -> None:
        super().__init__()
        self.names = [f"retrieval of {config.attribute} {name}" for name in groups.names]
        self.max_gap, self.dual_rate = config.max_gap, config.dual_rate
        self.register_buffer("shares", torch.tensor(groups.shares), persistent=False)
        self.register_buffer("duals", torch.zeros(len(groups.shares)), persistent=False)

    def weights(self, group_mask: Tensor) -> Tensor:
        """Return the weight of each target (N,), given the mask of its group (N, G)."""
        weights: Tensor = 1.0 + group_mask.float() @ (self.duals / self.shares.clamp(min=1e-12)).float() - self.duals.sum().float()
        return weights

    def set_duals(self, duals: Sequence[float]) -> None:
        """Set the dual variables; an empty sequence sets them to zero."""
        self.duals = torch.tensor(duals or [0.0] * len(self.shares), dtype=torch.float32, device=self.shares.device)

    def raised(self, duals: Sequence[float], group_metrics: Sequence[float], metric: float) -> list[float]:
        """Return the dual variables, updated from a validation: the metric of each group and `metric` of all users.

        They rise where the bound is violated and fall, down to 0, where it holds.
        """
        excesses = [(metric - group) / max(metric, 1e-12) - self.max_gap for group in group_metrics]
        before = duals or [0.0] * len(excesses)
        after = [max(0.0, dual + self.dual_rate * excess) for dual, excess in zip(before, excesses, strict=True)]
        return [dual * min(1.0, LARGEST_DUAL_SUM / max(sum(after), 1e-12)) for dual in after]


def _num_rows(candidates: Tensor, chunk_bytes: int | None) -> int:
    """Return the number of targets per chunk."""
    chunk_bytes = chunk_bytes or (GPU_CHUNK_BYTES if candidates.is_cuda else CPU_CHUNK_BYTES)
    return max(1, chunk_bytes // (SCORE_BYTES * max(1, len(candidates))))
