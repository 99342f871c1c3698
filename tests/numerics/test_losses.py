"""Losses compared with plain references: values, gradients, chunks, ranks; sampled losses compared with the full loss they estimate."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from recsys.model.retrieval import full_softmax, gather_from_ranks, gbce, sampled_softmax
from tests.distributed import run_distributed

torch.manual_seed(0)
USERS = torch.randn(7, 5)
ITEMS = torch.randn(12, 5)
TARGETS = torch.tensor([3, 1, 11, 5, 5, 2, 7])
NEGATIVES = torch.tensor([2, 9, 5, 11])
LOG_Q = torch.tensor([0.1, 0.3, 0.2, 0.05]).log()
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 1.5, 1.0])
CHUNKS = [1 << 20, 12 * 4 * 2, 1]
Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Plain = Callable[[Tensor, Tensor], Tensor]


def full(chunk_bytes: int) -> Loss:
    return lambda users, items: full_softmax(users, items[TARGETS], items[1:], WEIGHTS, chunk_bytes)


def plain_full(users: Tensor, items: Tensor) -> Tensor:
    return F.cross_entropy(users @ items[1:].T, TARGETS - 1, reduction="none")


def sampled(chunk_bytes: int) -> Loss:
    return lambda users, items: sampled_softmax(users, items[TARGETS], TARGETS, items[NEGATIVES], NEGATIVES, LOG_Q, WEIGHTS, chunk_bytes)


def plain_sampled(users: Tensor, items: Tensor) -> Tensor:
    losses = []
    for user, target in zip(users, TARGETS, strict=True):
        positive = user @ items[target]
        others = [torch.exp(user @ items[item]) / (4 * q.exp()) for item, q in zip(NEGATIVES, LOG_Q, strict=True) if item != target]
        losses.append(torch.log(positive.exp() + torch.stack(others).sum()) - positive)
    return torch.stack(losses)


def calibrated(chunk_bytes: int) -> Loss:
    return lambda users, items: gbce(users, items[TARGETS], TARGETS, items[NEGATIVES], NEGATIVES, 11, 0.75, WEIGHTS, chunk_bytes)


def plain_calibrated(users: Tensor, items: Tensor) -> Tensor:
    alpha = 4 / 10
    beta = alpha * (0.75 * (1 - 1 / alpha) + 1 / alpha)  # in the form of the paper
    losses = []
    for user, target in zip(users, TARGETS, strict=True):
        others = [torch.log(1 - torch.sigmoid(user @ items[item])) for item in NEGATIVES if item != target]
        losses.append(-(beta * torch.log(torch.sigmoid(user @ items[target])) + torch.stack(others).sum()) / 5)
    return torch.stack(losses)


@pytest.mark.parametrize("chunk_bytes", CHUNKS)
@pytest.mark.parametrize(("build", "plain"), [(full, plain_full), (sampled, plain_sampled), (calibrated, plain_calibrated)])
def test_a_loss_and_its_gradients_are_the_formula_whatever_the_chunk(build: Callable[[int], Loss], plain: Plain, chunk_bytes: int) -> None:
    users, items = USERS.clone().requires_grad_(), ITEMS.clone().requires_grad_()
    loss, each = build(chunk_bytes)(users, items)
    (3.0 * loss).backward()
    plain_users, plain_items = USERS.clone().requires_grad_(), ITEMS.clone().requires_grad_()
    expected = plain(plain_users, plain_items)
    (3.0 * (expected * WEIGHTS).sum()).backward()
    for ours, reference in (
        (each, expected),
        (loss, (expected * WEIGHTS).sum()),
        (users.grad, plain_users.grad),
        (items.grad, plain_items.grad),
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    assert not each.requires_grad


def test_scores_beyond_the_range_of_exp_are_no_trouble() -> None:
    torch.testing.assert_close(full(96)(USERS * 200, ITEMS)[1], plain_full(USERS * 200, ITEMS))


def test_sampled_softmax_comes_to_the_full_one_with_many_draws() -> None:
    probability = torch.rand(11)
    probability /= probability.sum()
    negatives = 1 + torch.multinomial(probability, 200_000, replacement=True)
    log_q = probability[negatives - 1].log()
    _, estimate = sampled_softmax(USERS, ITEMS[TARGETS], TARGETS, ITEMS[negatives], negatives, log_q, WEIGHTS)
    torch.testing.assert_close(estimate, plain_full(USERS, ITEMS), rtol=0.01, atol=0)


def test_infonce_is_the_cross_entropy_over_the_batch() -> None:
    distinct = torch.tensor([3, 1, 11, 5, 8, 2, 7])
    log_q = torch.full((7,), -math.log(7))
    _, each = sampled_softmax(USERS, ITEMS[distinct], distinct, ITEMS[distinct], distinct, log_q, WEIGHTS)
    torch.testing.assert_close(each, F.cross_entropy(USERS @ ITEMS[distinct].T, torch.arange(7), reduction="none"))


@pytest.mark.parametrize("build", [full, sampled, calibrated])
def test_no_target_gives_a_zero_that_can_be_differentiated(build: Callable[[int], Loss]) -> None:
    users, items = torch.zeros(0, 5, requires_grad=True), ITEMS.clone().requires_grad_()
    none, weights = TARGETS[:0], WEIGHTS[:0]
    losses = {
        full: lambda: full_softmax(users, items[none], items[1:], weights),
        sampled: lambda: sampled_softmax(users, items[none], none, items[NEGATIVES], NEGATIVES, LOG_Q, weights),
        calibrated: lambda: gbce(users, items[none], none, items[NEGATIVES], NEGATIVES, 11, 0.75, weights),
    }
    loss, _ = losses[build]()
    assert loss == 0
    loss.backward()
    assert items.grad is not None
    assert not items.grad.any()


def test_rows_of_all_ranks_with_gradients_are_those_of_one_process() -> None:
    sizes = [3, 0, 4]
    rows, weights = torch.randn(7, 2, generator=torch.Generator().manual_seed(1)), torch.arange(14.0).view(7, 2)
    for rank, (gathered, gradient) in enumerate(run_distributed(gather_on_a_rank, 3, rows, weights, sizes)):
        torch.testing.assert_close(torch.as_tensor(gathered), rows)
        torch.testing.assert_close(
            torch.as_tensor(gradient).view(-1, 2), 3 * rows.new_tensor(weights.split(sizes)[rank].tolist()).view(-1, 2)
        )


def gather_on_a_rank(rows: Tensor, weights: Tensor, sizes: list[int]) -> tuple[list[list[float]], list[list[float]]]:
    own = rows.split(sizes)[dist.get_rank()].clone().requires_grad_()
    gathered = gather_from_ranks(own)
    (gathered * weights).sum().backward()
    assert own.grad is not None
    return gathered.tolist(), own.grad.tolist()
