"""The losses against plain references, and the sampled one against the full one that it estimates."""

import torch

from recsys.model.losses import full_softmax, sampled_softmax, task_losses
from recsys.schema import Task

torch.manual_seed(0)
USERS = torch.randn(7, 5)
ITEMS = torch.randn(12, 5)
TARGETS = torch.tensor([3, 1, 11, 5, 5, 2, 7])


def test_full_softmax_is_the_cross_entropy_over_real_items() -> None:
    expected = 0.0
    for user, target in zip(USERS, TARGETS, strict=True):
        logits = [float(user @ ITEMS[item]) for item in range(1, 12)]
        expected -= logits[int(target) - 1] - torch.tensor(logits).logsumexp(0)
    torch.testing.assert_close(full_softmax(USERS, ITEMS, TARGETS), torch.as_tensor(expected), rtol=1e-5, atol=1e-5)


def test_padding_gets_no_gradient_from_the_full_loss() -> None:
    items = ITEMS.clone().requires_grad_()
    full_softmax(USERS, items, TARGETS).backward()
    assert items.grad is not None
    assert items.grad[0].abs().sum() == 0
    assert items.grad[1:].abs().sum() > 0


def test_sampled_softmax_is_the_formula() -> None:
    negatives, log_q = torch.tensor([2, 9, 5]), torch.tensor([0.1, 0.3, 0.2]).log()
    expected = 0.0
    for user, target in zip(USERS, TARGETS, strict=True):
        positive = float(user @ ITEMS[target])
        others = [float(torch.exp(user @ ITEMS[item]) / (3 * q.exp())) for item, q in zip(negatives, log_q, strict=True) if item != target]
        expected += float(torch.log(torch.exp(torch.tensor(positive)) + sum(others))) - positive
    torch.testing.assert_close(sampled_softmax(USERS, ITEMS, TARGETS, negatives, log_q), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_sampled_softmax_comes_to_the_full_one_with_many_draws() -> None:
    probability = torch.rand(11)
    probability /= probability.sum()
    negatives = 1 + torch.multinomial(probability, 200_000, replacement=True)
    sampled = sampled_softmax(USERS, ITEMS, TARGETS, negatives, probability[negatives - 1].log())
    torch.testing.assert_close(sampled, full_softmax(USERS, ITEMS, TARGETS), rtol=0.01, atol=0)


def test_no_target_gives_a_zero_that_can_be_differentiated() -> None:
    users = torch.zeros(0, 5, requires_grad=True)
    loss = full_softmax(users, ITEMS, TARGETS[:0])
    assert loss == 0
    loss.backward()


def test_task_losses_count_only_what_has_a_label() -> None:
    tasks = (Task("like", "binary", threshold=4.0), Task("rating", "regression"))
    scores = torch.tensor([[0.0, 1.0], [2.0, 3.0], [-1.0, 0.5]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.5]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    losses = task_losses(tasks, scores, labels, mask)
    like = -torch.log(torch.sigmoid(torch.tensor(0.0))) - torch.log(1 - torch.sigmoid(torch.tensor(2.0)))
    torch.testing.assert_close(losses["like"], like)
    torch.testing.assert_close(losses["rating"], torch.tensor(1.0))
