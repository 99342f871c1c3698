"""Metrics compared with values computed by hand and with slow, plain implementations."""

import itertools
import math

import numpy as np
import pytest
from scipy.sparse import csr_array

from recsys.evaluation.metrics import (
    coverage,
    gini,
    information,
    intra_list_diversity,
    list_mean,
    popularity_percentiles,
    random_metrics,
    ranking_metrics,
)


def test_one_target_per_user() -> None:
    metrics = ranking_metrics(np.array([[1], [3], [11]]), (10,))
    assert metrics["hr@10"].tolist() == [1, 1, 0]
    assert metrics["ndcg@10"].tolist() == [1, 0.5, 0]
    assert metrics["mrr@10"].tolist() == pytest.approx([1, 1 / 3, 0])
    assert metrics["recall@10"].tolist() == [1, 1, 0]


def test_several_targets_per_user_are_divided_by_the_best_that_is_possible() -> None:
    metrics = ranking_metrics(np.array([[2, 4, 30], [1, 2, 0]]), (5,))
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert metrics["ndcg@5"].tolist() == pytest.approx([(1 / math.log2(3) + 1 / math.log2(5)) / ideal, 1.0])
    assert metrics["recall@5"].tolist() == pytest.approx([2 / 3, 1])
    assert metrics["hr@5"].tolist() == [1, 1]


def test_random_ranks_against_a_plain_computation() -> None:
    generator = np.random.default_rng(0)
    ranks = np.array([generator.choice(40, 4, replace=False) for _ in range(50)])  # rank 0 means no target
    ranks[:, 0] += ranks.sum(1) == 0
    for k in (1, 5, 20):
        metrics = ranking_metrics(ranks, (k,))
        for user, row in enumerate(ranks):
            real = [rank for rank in row if rank]
            gain = sum(1 / math.log2(1 + rank) for rank in real if rank <= k)
            ideal = sum(1 / math.log2(1 + rank) for rank in range(1, min(k, len(real)) + 1))
            assert metrics[f"ndcg@{k}"][user] == pytest.approx(gain / ideal)
            assert metrics[f"mrr@{k}"][user] == pytest.approx(1 / min(real) if min(real) <= k else 0)


@pytest.mark.parametrize(("num_targets", "num_candidates"), [(1, 7), (2, 6), (3, 3), (1, 1), (2, 4)])
def test_the_expectation_of_a_random_order_is_the_mean_over_all_orders(num_targets: int, num_candidates: int) -> None:
    cutoffs = (1, 3, 5)
    orders = itertools.combinations(range(1, num_candidates + 1), num_targets)  # all possible ranks of the targets, equally likely
    over_all = ranking_metrics(np.array(list(orders)), cutoffs)
    expected = random_metrics(np.array([num_targets]), np.array([num_candidates]), cutoffs)
    assert expected.keys() == over_all.keys()
    for name, values in over_all.items():
        assert expected[name][0] == pytest.approx(values.mean()), name


def test_coverage_counts_distinct_items_and_no_padding() -> None:
    assert coverage(np.array([[1, 2], [2, 0]]), 8) == 0.25


def test_gini_is_half_the_mean_difference_of_counts_over_their_mean() -> None:
    lists = np.array([[1, 2, 3], [1, 2, 0], [1, 4, 2]])
    counts = np.array([3, 3, 1, 1, 0])  # item 5 is never recommended; padding does not count
    plain = np.abs(counts[:, None] - counts).sum() / (2 * len(counts) ** 2 * counts.mean())
    assert gini(lists, 5) == pytest.approx(plain)
    assert gini(np.array([[1], [2]]), 2) == 0
    assert gini(np.array([[2], [2]]), 4) == pytest.approx(0.75)


def test_novelty_of_items_by_hand() -> None:
    news = information(np.array([0, 3, 0, 1]))  # 4 interactions, 3 items, smoothed shares of 4/7, 1/7, 2/7
    assert news[1:].tolist() == pytest.approx([-math.log2(4 / 7), -math.log2(1 / 7), -math.log2(2 / 7)])
    assert list_mean(news, np.array([[1, 2], [3, 0], [0, 0]])).tolist() == pytest.approx([news[1:3].mean(), news[3], 0])


def test_popularity_percentiles_by_hand() -> None:
    assert popularity_percentiles(np.array([9, 5, 0, 5, 7])).tolist() == pytest.approx([0, 0.5, 0.125, 0.5, 0.875])


def test_intra_list_diversity_against_all_pairs() -> None:
    generator = np.random.default_rng(0)
    dense = generator.random((12, 5)) * (generator.random((12, 5)) < 0.5)
    dense[[0, 4]] = 0  # padding, and an item without content
    norms = np.linalg.norm(dense, axis=1, keepdims=True)
    dense = np.divide(dense, norms, out=np.zeros_like(dense), where=norms > 0)
    lists = np.array([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0], [8, 9, 10, 11]])
    found = intra_list_diversity(lists, csr_array(dense))
    for row, value in zip(lists, found, strict=True):
        pairs = list(itertools.combinations(row[row > 0], 2))
        assert value == pytest.approx(1 - np.mean([dense[a] @ dense[b] for a, b in pairs]) if pairs else 0)
