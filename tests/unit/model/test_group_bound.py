"""The fairness bound: weights with a mean of 1 per target, and duals that rise only if the bound is broken."""

import numpy as np
import pytest
import torch

from recsys.config.training import FairnessConfig
from recsys.data.labels.training import UserGroups
from recsys.model.retrieval import LARGEST_DUAL_SUM, GroupBound

GROUPS = UserGroups(("F", "M"), np.array([0, 1, 1, 1], np.int8), (0.25, 0.75))


def bound(max_gap: float = 0.1) -> GroupBound:
    return GroupBound(FairnessConfig(attribute="gender", max_gap=max_gap, dual_rate=0.5), GROUPS)


def test_without_duals_every_target_counts_alike() -> None:
    assert bound().weights(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])).tolist() == [1, 1, 1]


def test_weights_are_the_gradient_of_the_lagrangian() -> None:
    constraint = bound()
    constraint.set_duals([0.2, 0.1])
    losses = torch.randn(8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 6, dtype=torch.float64)
    groups = (mask * losses[:, None]).sum(0) / mask.sum(0)
    lagrangian = losses.mean() + (torch.tensor([0.2, 0.1], dtype=torch.float64) * (groups - losses.mean() - 0.1)).sum()
    lagrangian.backward()
    assert losses.grad is not None
    torch.testing.assert_close(constraint.weights(mask), (8 * losses.grad).float())


def test_duals_rise_where_the_bound_is_broken_and_fall_to_zero_where_it_holds() -> None:
    constraint = bound()
    raised = constraint.raised([], [0.12, 0.22], 0.2)
    assert raised == pytest.approx([0.5 * (0.4 - 0.1), 0.0])
    assert constraint.raised(raised, [0.2, 0.2], 0.2) == pytest.approx([raised[0] - 0.05, 0.0])


def test_duals_stay_what_they_are_while_nobody_is_hit() -> None:
    assert bound(max_gap=0.0).raised([0.3, 0.0], [0.0, 0.0], 0.0) == [0.3, 0.0]


def test_no_target_ever_counts_for_nothing() -> None:
    constraint = bound()
    duals: list[float] = []
    for _ in range(50):
        duals = constraint.raised(duals, [0.01, 0.25], 0.2)
    constraint.set_duals(duals)
    assert sum(duals) == pytest.approx(LARGEST_DUAL_SUM)
    assert constraint.weights(torch.eye(2)).min() == pytest.approx(1 - LARGEST_DUAL_SUM, rel=1e-5)
