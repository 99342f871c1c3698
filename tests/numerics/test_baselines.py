"""The baselines' formulas compared with plain loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from recsys.baselines.counting import ItemNeighbors, nearest_neighbors
from recsys.baselines.factorization import BIAS_PENALTY, RANKING_PENALTY, FactorizationMachine, bpr_loss, solve


@pytest.fixture
def machine() -> FactorizationMachine:
    """Return a machine with three users and four items, with one to three features each."""
    torch.manual_seed(0)
    users = torch.tensor([[0, 0], [1, 4], [2, 0], [3, 4]])
    items = torch.tensor([[0, 0, 0], [5, 9, 10], [6, 9, 0], [7, 0, 0], [0, 10, 0]])
    machine = FactorizationMachine(users, items, width=5)
    with torch.no_grad():
        machine.table.weight[1:].normal_()
        machine.bias.fill_(0.3)
    return machine


def features_of(machine: FactorizationMachine, user: int, item: int) -> list[int]:
    return [number for number in (*machine.user_features[user].tolist(), *machine.item_features[item].tolist()) if number]


def plain_score(machine: FactorizationMachine, user: int, item: int) -> float:
    features = features_of(machine, user, item)
    table = machine.table.weight.detach()
    vectors, biases = table[:, :-1], table[:, -1]
    pairs = sum(float(vectors[one] @ vectors[other]) for one, other in itertools.combinations(features, 2))
    return machine.bias.item() + sum(float(biases[feature]) for feature in features) + pairs


def test_a_machine_is_the_sum_over_all_pairs_of_features(machine: FactorizationMachine) -> None:
    for user, item in itertools.product(range(4), range(5)):
        score, penalty = machine(torch.tensor([user]), torch.tensor([item]), 0.7)
        assert score.item() == pytest.approx(plain_score(machine, user, item), abs=1e-5)
        rows = machine.table.weight.detach()[features_of(machine, user, item)]
        expected = 0.7 * float(rows[:, :-1].square().sum()) + BIAS_PENALTY * float(rows[:, -1].square().sum())
        assert penalty.item() == pytest.approx(expected, abs=1e-5)


def test_ranking_by_a_machine_is_its_score_but_for_what_is_the_users_alone(machine: FactorizationMachine) -> None:
    scores = machine.score_catalogue([np.zeros(0, np.int64)] * 4, [-1, 0, 1, 2])
    assert np.isneginf(scores[:, 0]).all()
    for user in range(4):
        plain = np.array([plain_score(machine, user, item) for item in range(1, 5)])
        np.testing.assert_allclose(np.diff(scores[user, 1:]), np.diff(plain), atol=1e-5)


def test_the_bpr_loss_and_its_gradient_are_the_formula(machine: FactorizationMachine) -> None:
    users, taken, others = torch.tensor([1, 2]), torch.tensor([1, 2]), torch.tensor([3, 4])
    losses = bpr_loss(machine, users, taken, others)
    for number, triple in enumerate(zip(users.tolist(), taken.tolist(), others.tolist(), strict=True)):
        user, item, other = triple
        margin = plain_score(machine, user, item) - plain_score(machine, user, other)
        rows = machine.table.weight.detach()[features_of(machine, user, item) + features_of(machine, user, other)]
        penalty = RANKING_PENALTY * float(rows[:, :-1].square().sum()) + BIAS_PENALTY * float(rows[:, -1].square().sum())
        assert losses[number].item() == pytest.approx(math.log1p(math.exp(-margin)) + penalty, abs=1e-5)
    losses[0].backward()
    assert machine.table.weight.grad is not None
    margin = plain_score(machine, 1, 1) - plain_score(machine, 1, 3)
    bias = machine.table.weight[5, -1].item()
    expected = -1 / (1 + math.exp(margin)) + 2 * BIAS_PENALTY * bias  # derivative by the bias of feature 5, which only the taken item has
    assert machine.table.weight.grad[5, -1].item() == pytest.approx(expected, abs=1e-5)


def test_solved_vectors_are_where_the_weighted_squared_error_has_no_slope() -> None:
    generator = np.random.default_rng(0)
    taken = (generator.random((6, 9)) < 0.4).astype(np.float32)
    taken[5] = 0
    others = generator.normal(size=(9, 4)).astype(np.float32)
    solved = torch.from_numpy(solve(csr_array(taken), others, weight=0.2, penalty=0.05)).double().requires_grad_()
    scores, mask = solved @ torch.from_numpy(others).double().T, torch.from_numpy(taken).double()
    ridge = 0.05 * (mask.sum(1) + 0.2 * 9)
    loss = (mask * (scores - 1) ** 2).sum() + 0.2 * scores.square().sum() + (ridge * solved.square().sum(1)).sum()
    (slope,) = torch.autograd.grad(loss, solved)
    assert float(slope.abs().max()) < 1e-4
    assert not solved[5].any()


@pytest.mark.parametrize(("num_neighbors", "shrinkage"), [(3, 0.0), (3, 10.0), (100, 2.0)])
def test_neighbors_are_those_of_a_dense_computation(num_neighbors: int, shrinkage: float) -> None:
    dense = (np.random.default_rng(0).random((40, 12)) < 0.3).astype(np.float32)
    dense[:, 0] = 0
    found = nearest_neighbors(csr_array(dense), num_neighbors, shrinkage).toarray()
    norms = np.sqrt((dense**2).sum(0))
    for item in range(1, 12):
        similarity = [
            float(dense[:, item] @ dense[:, other] / (norms[item] * norms[other] + shrinkage)) if other else 0 for other in range(12)
        ]
        similarity[item] = 0
        kept = np.sort(similarity)[::-1][:num_neighbors]
        np.testing.assert_allclose(np.sort(found[item])[::-1][: len(kept)], kept, atol=1e-6)
        nonzero = np.flatnonzero(found[item])
        np.testing.assert_allclose(found[item][nonzero], np.array(similarity)[nonzero], atol=1e-6)
        assert len(nonzero) <= num_neighbors
    assert not found[0].any()


def test_an_interaction_a_half_life_ago_weighs_half() -> None:
    similarity = csr_array(np.array([[0, 0, 0], [0, 0, 0.4], [0, 0.2, 0]], np.float32))
    neighbors = ItemNeighbors(similarity, np.array([0, 0.001, 0.002], np.float32), half_life=2.0)
    history = np.array([1, 2, 2, 2])  # ages 3, 2, 1, 0
    (row,) = neighbors.score_catalogue([history], [7])
    expected = [-np.inf, 0.2 * (2**-1 + 2**-0.5 + 1) + 0.001, 0.4 * 2**-1.5 + 0.002]
    np.testing.assert_allclose(row, expected, rtol=1e-5)
