"""A bound on how far groups' retrieval losses lie apart, held by dual variables; who is in which group is `recsys.data.user_groups`'s."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recsys.config import FairnessConfig
from recsys.data.user_groups import UserGroups

LARGEST_DUAL_SUM = 0.9
"""Dual variables are kept below it in sum, so that every target counts for at least a tenth."""


class GroupBound(nn.Module):
    """Weighs targets for the Lagrangian of `min loss` under `loss of group g - loss of all <= max_gap` for every group g.

    Its gradient counts a target of group g with 1 + dual_g / share_g - sum of all duals (Cotter et al. 2019 train such constraints
    by the same dual ascent). Shapes: N targets, G groups.
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
        """Return how much each target counts (N,), given its group (N, G)."""
        weights: Tensor = 1.0 + group_mask.float() @ (self.duals / self.shares).float() - self.duals.sum().float()
        return weights

    def set_duals(self, duals: Sequence[float]) -> None:
        """Weigh by these from now on; none are zeros."""
        self.duals = torch.tensor(duals or [0.0] * len(self.shares), dtype=torch.float32, device=self.shares.device)

    def raised(self, duals: Sequence[float], group_losses: Sequence[float]) -> list[float]:
        """Return the dual variables after a step with these mean losses: up where the bound is broken, down to 0 where it holds."""
        shares = self.shares.tolist()
        loss = sum(share * group for share, group in zip(shares, group_losses, strict=True)) / sum(shares)
        before = duals or [0.0] * len(group_losses)
        after = [max(0.0, dual + self.dual_rate * (group - loss - self.max_gap)) for dual, group in zip(before, group_losses, strict=True)]
        return [dual * min(1.0, LARGEST_DUAL_SUM / max(sum(after), 1e-12)) for dual in after]
