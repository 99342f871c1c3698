"""The retrieval losses, each a sum over targets; dividing by their global number is the training loop's part.

Shapes: N targets, W width, K candidates or negatives. Scores are dot products, held in chunks of at most `chunk_bytes`.
Each loss takes how much each target counts, (N,), and returns the sum so weighed, and each target's own loss (N,) without a gradient.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Loss = tuple[Tensor, Tensor]

SCORE_BYTES = 4
CPU_CHUNK_BYTES = 4 << 20
GPU_CHUNK_BYTES = 256 << 20
"""A CPU is fastest where a chunk stays in its cache, a GPU where a chunk keeps all of it busy."""


def full_softmax(users: Tensor, positives: Tensor, candidates: Tensor, weights: Tensor, chunk_bytes: int | None = None) -> Loss:
    """Sum the cross-entropy over all candidates (K, W), which hold every positive; users and positives (N, W)."""
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
    """Sum the cross-entropy with the other items' part of the partition function estimated from K draws.

    Each draw j stands for 1 / (K q_j) items, so the estimate of the partition function is unbiased (Bengio and Senecal 2008); a draw
    that is the target itself is left out. With `log_q` of -log K the draws are not corrected, which is InfoNCE (van den Oord et al. 2018).
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
    """Sum binary cross-entropy with a calibrated positive (gBCE: Petrov and Macdonald 2023), over uniform negatives.

    With a = K / (num_items - 1), the positive's log probability is weighed by b = 1 - calibration (1 - a); each target's loss is the
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
    """Join the rows (N, ...) of all ranks, each N its own; gradients flow back to the rank that a row came from.

    Every rank must call this; without a process group the rows are returned as they are.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    numbers = [int(size) for size in sizes]
    padded = torch.cat([rows, rows.new_zeros(max(numbers) - len(rows), *rows.shape[1:])])
    gathered = _gather(padded)
    return torch.cat([part[:number] for part, number in zip(gathered, numbers, strict=True)])


class _Gather(torch.autograd.Function):
    """All ranks' tensors of one shape, stacked."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


Others = tuple[Tensor, Tensor, Tensor]


class _SoftmaxLoss(torch.autograd.Function):
    """Weighted sum of log(sum_j exp(score_nj)) - positive_n over targets, with its gradients computed in the same pass.

    What is kept for the backward pass is as large as the inputs: no (N, K) tensor outlives its chunk. Without `others` the candidates
    hold the positive; with them (target ids, candidate ids, what to subtract of each candidate's score) it is added, and candidates that
    are the target are left out.
    """

    @staticmethod
    def forward(
        ctx: Any, users: Tensor, positives: Tensor, candidates: Tensor, weights: Tensor, others: Others | None, num_rows: int
    ) -> Loss:
        positive = (users * positives).sum(-1).float()  # (N,)
        each = torch.empty_like(positive)
        own = torch.full_like(positive, -1.0)  # gradient by the positive's score
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


def _num_rows(candidates: Tensor, chunk_bytes: int | None) -> int:
    """Return how many targets' scores are held at once."""
    chunk_bytes = chunk_bytes or (GPU_CHUNK_BYTES if candidates.is_cuda else CPU_CHUNK_BYTES)
    return max(1, chunk_bytes // (SCORE_BYTES * max(1, len(candidates))))
