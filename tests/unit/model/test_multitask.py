"""The tasks' losses: which labels count, weighting by uncertainty, and weighting of rare positives."""

import pytest
import torch
import torch.nn.functional as F

from recsys.config.model import RankerConfig
from recsys.model.ranker import TaskLosses
from recsys.schema import Task

TASKS = (Task("like", "binary", threshold=4.0), Task("rating", "regression"))
SCORES = torch.tensor([[0.0, 1.0], [2.0, 3.0], [-1.0, 0.5], [0.7, -2.0]])
LABELS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.5], [0.0, -1.0]])
MASK = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])


def build(rates: tuple[float, float] = (1.0, 1.0), **values: object) -> TaskLosses:
    return TaskLosses(RankerConfig.model_validate(values), TASKS, torch.tensor(rates))


def plain_sums() -> dict[str, torch.Tensor]:
    like = F.binary_cross_entropy(SCORES[[0, 1, 3], 0].sigmoid(), LABELS[[0, 1, 3], 0], reduction="sum")
    return {"like": like, "rating": (SCORES[[0, 2, 3], 1] - LABELS[[0, 2, 3], 1]).square().sum()}


def test_only_what_has_a_label_counts() -> None:
    losses = build()(SCORES, LABELS, MASK)
    for name, expected in plain_sums().items():
        torch.testing.assert_close(losses[name], expected)


def test_no_target_gives_zeros_that_can_be_differentiated() -> None:
    scores = SCORES[:0].requires_grad_()
    losses = build(weighting="uncertainty")(scores, LABELS[:0], MASK[:0])
    sum(losses.values()).backward()
    assert all(loss == 0 for loss in losses.values())


def test_uncertainty_is_the_formula_and_so_are_its_gradients() -> None:
    """Kendall et al. 2018: binary L / s^2 + log s, regression L / (2 s^2) + log s, with log s^2 learned and L the mean loss."""
    weigh = build(weighting="uncertainty")
    with torch.no_grad():
        weigh.log_variances.copy_(torch.tensor([0.3, -0.8]))
    log_variances = weigh.log_variances.detach().clone().requires_grad_()
    deviation = torch.exp(log_variances / 2)
    means = {name: total / 3 for name, total in plain_sums().items()}
    expected = means["like"] / deviation[0] ** 2 + deviation[0].log() + means["rating"] / (2 * deviation[1] ** 2) + deviation[1].log()
    loss = sum(total / 3 for total in weigh(SCORES, LABELS, MASK).values())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(weigh.log_variances.grad, log_variances.grad)


def test_uncertainty_may_be_summed_in_shares() -> None:
    weigh = build(weighting="uncertainty")
    with torch.no_grad():
        weigh.log_variances.copy_(torch.tensor([0.3, -0.8]))
    whole = weigh(SCORES, LABELS, MASK)
    parts = [weigh(SCORES[rows], LABELS[rows], MASK[rows]) for rows in (slice(0, 1), slice(1, 4))]
    for name, total in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), total)


def test_learned_weights_settle_where_each_loss_is_its_own_scale() -> None:
    """At the optimum exp(log s^2) is twice the mean loss of a binary task, and the mean squared error of a regression."""
    weigh = build(weighting="uncertainty")
    optimizer = torch.optim.Adam(weigh.parameters(), lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        sum(total / 3 for total in weigh(SCORES, LABELS, MASK).values()).backward()
        optimizer.step()
    means = {name: total / 3 for name, total in plain_sums().items()}
    torch.testing.assert_close(weigh.log_variances.exp().detach(), torch.stack([2 * means["like"], means["rating"]]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("imbalance", ["none", "weight", "sample"])
def test_weighing_counts_a_positive_as_often_as_negatives_outnumber_it(imbalance: str) -> None:
    losses = build((0.25, 1.0), imbalance=imbalance)(SCORES, LABELS, MASK)
    times = 4 if imbalance == "weight" else 1
    like = times * -torch.sigmoid(SCORES[0, 0]).log() - sum((1 - torch.sigmoid(SCORES[row, 0])).log() for row in (1, 3))
    torch.testing.assert_close(losses["like"], like)
    torch.testing.assert_close(losses["rating"], plain_sums()["rating"])
