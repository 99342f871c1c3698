"""A bound on how far groups of users fall behind, held by dual variables."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recsys.config.training import FairnessConfig
from recsys.data.labels import UserGroups

LARGEST_DUAL_SUM = 0.9
"""Dual variables are kept below it in sum, so that every target counts for at least a tenth."""


class GroupBound(nn.Module):
    """Weighs targets for the Lagrangian of `min loss` under `loss of group g - loss of all <= some bound` for every group g.

    Its gradient counts a target of group g with 1 + dual_g / share_g - sum of all duals. The duals rise by what is wanted in the end,
    the metric of users held out: losses in training are what the model may learn by heart (two datasets, and a loss in place of a
    metric that has no gradient: Cotter et al. 2019). Shapes: N targets, G groups.
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
        weights: Tensor = 1.0 + group_mask.float() @ (self.duals / self.shares.clamp(min=1e-12)).float() - self.duals.sum().float()
        return weights

    def set_duals(self, duals: Sequence[float]) -> None:
        """Weigh by these from now on; none are zeros."""
        self.duals = torch.tensor(duals or [0.0] * len(self.shares), dtype=torch.float32, device=self.shares.device)

    def raised(self, duals: Sequence[float], group_metrics: Sequence[float], metric: float) -> list[float]:
        """Return the dual variables after a validation with these means of the groups, and `metric` of all users.

        They rise where the bound is broken and fall, down to 0, where it holds.
        """
        excesses = [(metric - group) / max(metric, 1e-12) - self.max_gap for group in group_metrics]
        before = duals or [0.0] * len(excesses)
        after = [max(0.0, dual + self.dual_rate * excess) for dual, excess in zip(before, excesses, strict=True)]
        return [dual * min(1.0, LARGEST_DUAL_SUM / max(sum(after), 1e-12)) for dual in after]
